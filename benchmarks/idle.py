"""Does the accelerator wait? Idle share inside an actor, with shards of about 2 s and a store 100 ms away.

The store is `rclone serve s3` behind a proxy that answers each request 100 ms late. The actor computes on one core, as
on an accelerator: it waits whenever nothing is queued for it. The share counts from the first shard's end. gpu_cases.py
asks the same of a GPU, by its own clock.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from ray_sampler import RunConfig
from ray_sampler.cluster import driver
from ray_sampler.cluster.dispatch import Dispatch
from ray_sampler.cluster.session import connect
from ray_sampler.cluster.worker import Task, TaskResult
from table import Goal, Row, parser, report
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.servers import BUCKET, environment, rclone_server

LATENCY_S = 0.1
SHARDS, SHARD = 40, 6
REPEATS = 3


def request(output: str) -> RunConfig:
    """About 2 s a shard on one core: three images a second."""
    return RunConfig(
        model="digits-v1", output=output, num_samples=SHARDS * SHARD, batch_size=SHARD, shard_size=SHARD,
        max_actors=1, gpus_per_actor=0, progress="none",
    )  # fmt: skip


def shares(output: str) -> tuple[float, float, float]:
    """Of a run: percent of the time that the actor waited, median seconds of a shard, and of its upload."""
    results: list[TaskResult] = []

    class Listening(Dispatch):
        """A dispatch whose results are kept."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            finished = self.finished

            def keep(task: Task, result: TaskResult) -> None:
                results.append(result)
                finished(task, result)

            self.finished = keep

    with mock.patch.object(driver, "Dispatch", Listening):
        driver.run(request(output))
    assert len(results) == SHARDS
    later = sorted(results, key=lambda result: result.name)[1:]
    waited, computed = (sum(getattr(r, field) for r in later) for field in ("wait_s", "compute_s"))
    middle = sorted(r.compute_s for r in later)[len(later) // 2]
    upload = sorted(r.upload_s for r in later)[len(later) // 2]
    return 100 * waited / (waited + computed), middle, upload


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        rclone_server(Path(folder)) as upstream,
        FaultProxy(upstream) as proxy,
    ):
        os.environ |= environment(proxy.url)
        with connect(None):
            proxy.plan(Fault("slow", seconds=LATENCY_S))
            found = [shares(f"s3://{BUCKET}/{repeat}") for repeat in range(REPEATS)]
    shards = sorted(middle for _, middle, _ in found)[REPEATS // 2]
    uploads = sorted(upload for _, _, upload in found)[REPEATS // 2]
    idle = tuple(share for share, _, _ in found)
    row = Row("idle share inside an actor, a store 100 ms away", idle, (), "%", Goal("at most", 1, "ours"))
    note = f"A shard of {SHARD} digits took {shards:.2f} s, its encoding and upload {uploads:.2f} s (medians)."
    report([row], [note], arguments.json)


if __name__ == "__main__":
    main()
