"""What a finished run leaves beside its archive: preview.png, report.html and summary.json."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ray_sampler.cluster.dispatch import Tally
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.tasks import Merged
from ray_sampler.reporting.preview import class_strips
from ray_sampler.reporting.report import render_report
from ray_sampler.reporting.sheet import PreviewKeeper, Tile
from ray_sampler.reporting.summary import ArchiveMember, Summary
from ray_sampler.resolve import settings_json
from ray_sampler.storage.archive import archive_intact
from ray_sampler.storage.archive_layout import ArchiveLayout

SUMMARY = "summary.json"
REPORT = "report.html"


def write_outcome(
    job: Job, tally: Tally, inventory: Inventory, merged: Merged, preview: PreviewKeeper, began: float, merge_s: float
) -> dict[str, Any]:
    """Write preview.png, report.html and, last, summary.json, whose content this returns.

    Args:
        began: when the driver started, on the monotonic clock.
        merge_s: seconds that the archive took.
    """
    first, last = tally.first_shard, tally.last_sample
    summary = Summary(
        fingerprint=job.fingerprint,
        settings=settings_json(job.config),
        identity=job.identity,
        num_samples=job.num_samples,
        nfe=job.plan.evaluations(),
        sigmas=tuple(job.plan.sigmas()),
        reused=tally.reused,
        computed=tally.rates.done,
        start_s=first - began if first else 0.0,
        sampling_s=last - first if first and last else 0.0,
        merge_s=merge_s,
        device_s=(tally.compute_s, tally.idle_s) if job.gpus else None,
        max_actors=tally.max_actors,
        failures=tally.failures,
        retries=tally.retries,
        rejected=tuple(inventory.rejected),
        parts=inventory.parts(),
        archive=job.run_dir.archive_name(job.num_samples, job.image_shape),
        archive_bytes=merged.layout.size,
        archive_members=members_of(merged.layout),
        labels=merged.labels,
        pixels=merged.pixels,
        timeline=tally.timeline,
        weights=job.fetched(),
    ).as_json()
    page = render_report(summary, preview.finish(merged.tiles), class_views(merged.tiles))
    # A path may hold bytes that are no text.
    job.run_dir.write_view(REPORT, page.encode(errors="backslashreplace"))
    job.run_dir.write_file(SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def members_of(layout: ArchiveLayout) -> tuple[ArchiveMember, ...]:
    """The archive's arrays, with the size and CRC-32 of their values."""
    crcs = [layout.image_crc32, *([] if layout.label_crc32 is None else [layout.label_crc32])]
    return tuple(
        ArchiveMember(f"arr_{i}", member.size, crc)
        for i, (member, crc) in enumerate(zip(layout.members, crcs, strict=True))
    )


def class_views(tiles: dict[int, Tile]) -> dict[int, bytes] | None:
    """A strip of pictures for each class on the sheet; None for an unconditional model."""
    shown = [tiles[i] for i in sorted(tiles)]
    labels = [tile.label for tile in shown if tile.label is not None]
    return class_strips(np.stack([tile.image for tile in shown]), np.array(labels)) if labels else None


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
