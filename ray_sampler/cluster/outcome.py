"""What a run leaves: its archive, which a task merges, and preview.png, report.html and summary.json."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import ray
import torch

from ray_sampler.cluster.calls import reason_of
from ray_sampler.cluster.dispatch import Tally
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.machine import killed_for_memory
from ray_sampler.cluster.session import beside_driver
from ray_sampler.cluster.tasks import Merged, merge_fragments, merge_task, pack_pieces
from ray_sampler.errors import RunError, show_traceback
from ray_sampler.reporting.progress import Reporter, Snapshot
from ray_sampler.reporting.report import render_report
from ray_sampler.reporting.sheet import PreviewKeeper, class_rows_of
from ray_sampler.reporting.summary import summary_of
from ray_sampler.resolve import command_of, settings_json
from ray_sampler.storage.archive import DamagedPiece, archive_intact
from ray_sampler.storage.archive_layout import ArchiveLayout
from ray_sampler.storage.run_dir import REPORT, SUMMARY

MERGE_ATTEMPTS = 3
"""Times that the process which writes the archive may be killed."""


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
            "computing": inventory.seconds(),
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
        made=made_of(job),
    )
    page = render_report(summary, preview.finish(merged.tiles), class_rows_of(merged.tiles))
    # A path may hold bytes that are not text.
    job.run_dir.write_view(REPORT, page.encode(errors="backslashreplace"))
    job.run_dir.write_file(SUMMARY, json.dumps(summary, indent=1).encode())
    return summary


def made_of(job: Job) -> dict[str, Any]:
    """When, where and by what a run was finished, and the command that repeats it; None for what is not known."""
    command = command_of(job.config)
    return {
        "command": shlex.join(["ray-sampler", *command["argv"]]) if command else None,
        "folder": os.getcwd(),
        "output": job.run_dir.url,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit_here(),
        "versions": {
            "ray-sampler": sys.modules["ray_sampler"].__version__,
            "torch": torch.__version__,
            "ray": ray.__version__,
            "python": platform.python_version(),
        },
    }


def commit_here() -> str | None:
    """The git commit of the working folder; None where there is none."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def members_of(layout: ArchiveLayout) -> list[tuple[str, int, int]]:
    """The archive's arrays: the name of each, and the size and CRC-32 of its values."""
    crcs = (layout.image_crc32, layout.label_crc32 or 0)
    return [(f"arr_{i}", member.size, crc) for i, (member, crc) in enumerate(zip(layout.members, crcs, strict=False))]


def already_done(job: Job) -> dict[str, Any] | None:
    """The summary of a finished run in the directory, if its archive is complete and what this run would write."""
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


def merge(job: Job, inventory: Inventory, tally: Tally, report: Reporter, here: bool = False) -> Merged | DamagedPiece:
    """Have a task write the archive, or say which fragment is in the way.

    Args:
        here: do it in this process, which needs no Ray.

    Raises:
        RunError: the archive cannot be written.
    """
    tally.latest = Snapshot(
        num_samples=job.num_samples,
        reused=tally.reused,
        done=job.num_samples - tally.reused,
        failures=tally.failures,
        stage="merging",
        elapsed_s=tally.latest.elapsed_s,
        rate=tally.latest.rate,
    )
    report.update(tally.latest)
    packed = pack_pieces(inventory.fragments.cover(), inventory.fragments.known)
    wanted = (job.output, job.fingerprint, packed, job.num_samples, job.image_shape, job.labelled)
    if here:
        return merge_fragments(*wanted)
    kills, merging = killed_for_memory(), merge_task.options(scheduling_strategy=beside_driver())
    for attempt in range(1, MERGE_ATTEMPTS + 1):
        try:
            return ray.get(merging.remote(*wanted))
        except ray.exceptions.RayTaskError as error:
            show_traceback(error)
            if isinstance(error.cause, RunError):
                raise error.cause from None
            raise RunError(f"the archive could not be written: {reason_of(error)}") from error
        except ray.exceptions.RayError as error:
            show_traceback(error)
            by_ray = isinstance(error, ray.exceptions.OutOfMemoryError)
            sure = by_ray or killed_for_memory() > kills
            cause = f"{'' if sure else 'perhaps '}{'by Ray' if by_ray else 'by the system'} for lack of memory"
            if attempt < MERGE_ATTEMPTS:
                report.message(
                    f"the process that writes the archive was killed, {cause}; it is started again", "warning"
                )
    raise RunError(
        f"the archive could not be written: its process was killed {MERGE_ATTEMPTS} times, {cause}; the samples are "
        "kept: free memory on the driver's node and run the same command again, or run `ray-sampler merge "
        f"{job.run_dir.url}` on a machine that has more"
    )
