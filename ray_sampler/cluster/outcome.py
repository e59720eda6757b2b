"""What a finished run leaves beside its archive: preview.png, report.html and summary.json."""

from __future__ import annotations

import json
from typing import Any

from ray_sampler.cluster.dispatch import Tally
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.tasks import Merged
from ray_sampler.reporting.report import render_report
from ray_sampler.reporting.sheet import PreviewKeeper, class_rows_of
from ray_sampler.reporting.summary import summary_of
from ray_sampler.resolve import settings_json
from ray_sampler.storage.archive import archive_intact
from ray_sampler.storage.archive_layout import ArchiveLayout
from ray_sampler.storage.run_dir import REPORT, SUMMARY


def write_outcome(
    job: Job, tally: Tally, inventory: Inventory, merged: Merged, preview: PreviewKeeper, began: float, merge_s: float
) -> dict[str, Any]:
    """Write preview.png, report.html and, last, summary.json, whose content this returns.

    Args:
        began: when the driver started, on the monotonic clock.
        merge_s: seconds that the archive took.
    """
    first, last = tally.first_shard, tally.last_sample
    idle = {"gpu_computing": tally.compute_s, "gpu_idle": tally.idle_s} if job.gpus else {}
    summary = summary_of(
        fingerprint=job.fingerprint,
        settings=settings_json(job.config),
        identity=job.identity,
        num_samples=job.num_samples,
        nfe=job.plan.evaluations(),
        sigmas=tuple(job.plan.sigmas()),
        reused=tally.reused,
        computed=tally.rates.done,
        seconds={
            "start": first - began if first else 0.0,
            "sampling": last - first if first and last else 0.0,
            "merge": merge_s,
            **idle,
        },
        max_actors=tally.max_actors,
        failures=tally.failures,
        retries=tally.retries,
        rejected=inventory.rejected,
        parts=inventory.parts(),
        archive=job.run_dir.archive_name(job.num_samples, job.image_shape),
        archive_bytes=merged.layout.size,
        archive_members=members_of(merged.layout),
        labels=merged.labels,
        pixels=merged.pixels,
        timeline=tally.timeline,
        weights=job.fetched(),
    )
    page = render_report(summary, preview.finish(merged.tiles), class_rows_of(merged.tiles))
    # A path may hold bytes that are no text.
    job.run_dir.write_view(REPORT, page.encode(errors="backslashreplace"))
    job.run_dir.write_file(SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def members_of(layout: ArchiveLayout) -> list[tuple[str, int, int]]:
    """The archive's arrays: the name of each, and the size and CRC-32 of its values."""
    crcs = (layout.image_crc32, layout.label_crc32 or 0)
    return [(f"arr_{i}", member.size, crc) for i, (member, crc) in enumerate(zip(layout.members, crcs, strict=False))]


def already_done(job: Job) -> dict[str, Any] | None:
    """The summary of the finished run that stands there, if its archive is what this run would write, and whole."""
    text = None if job.overwrite else job.run_dir.read_file(SUMMARY)
    try:
        summary: dict[str, Any] = json.loads(text) if text else {}
        if summary.get("fingerprint") != job.fingerprint or summary["num_samples"] != job.num_samples:
            return None
        crcs = [int(member["crc32"], 16) for member in summary["archive"]["members"]]
        label_crc = crcs[1] if job.labelled else None
        dtype = job.plan.columns()["image"].dtype
        layout = ArchiveLayout(job.num_samples, job.image_shape, crcs[0], label_crc, dtype)
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    if layout.size != summary["archive"]["bytes"] or not archive_intact(job.run_dir, layout):
        return None
    return summary
