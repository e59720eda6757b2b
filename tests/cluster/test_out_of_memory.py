"""A batch that does not fit stops the run at once with what to do, also where it shows while an actor starts."""

from __future__ import annotations

import os

import pytest
import ray

from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import Task
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import reporter
from ray_sampler.sampling.memory import OutOfDeviceMemoryError

pytestmark = pytest.mark.usefixtures("local_ray")

SENTENCE = "cuda ran out of memory with --batch_size 64; try --batch_size 32, or --precision fp16 if this is fp32"


@ray.remote(num_cpus=0)
class Full:
    """An actor that learns while it starts that nothing fits."""

    def start(self) -> None:
        raise OutOfDeviceMemoryError(SENTENCE)


def test_an_actor_that_finds_no_room_ends_the_run_with_its_own_sentence() -> None:
    started = []

    def start() -> object:
        started.append(os.getpid())
        return Full.remote()  # type: ignore[attr-defined]

    pool = Pool(start, Fleet(0, 1, 1), 60.0)
    tasks = [Task(0, 0, 8), Task(0, 8, 16)]
    with reporter("none", False) as report, pytest.raises(RunError) as failed:
        Dispatch(
            pool, tasks, [Tally(16, 0)], report, lambda task, result: None, lambda: None, 1, DriverMetrics("test")
        ).run()
    pool.close()
    assert str(failed.value) == SENTENCE
    assert len(started) == 1
