"""A dispatch on a cluster by a virtual clock, whose actors and nodes do what a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import Task
from ray_sampler.reporting.progress import Snapshot
from tests.simulation.cluster import Simulated


class Listener:
    """A reporter that keeps what it hears."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.snapshots: list[Snapshot] = []

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def message(self, text: str, level: str = "info") -> None:
        self.messages.append(text)


class Play:
    """A dispatch of tasks on a simulated cluster, and what came of it."""

    def __init__(
        self,
        cluster: Simulated,
        tasks: Iterable[Task],
        max_actors: int,
        background: Callable[[], list[Task] | None] = lambda: None,
        min_actors: int = 0,
        **more: Any,
    ) -> None:
        self.cluster, self.listener, self.finished = cluster, Listener(), list[Task]()
        tasks = list(tasks)
        self.tally = Tally(sum(task.stop - task.start for task in tasks), 0)
        self.pool = Pool(cluster.start, Fleet(0, 1, max_actors), 600.0, cast(Any, cluster))
        self.dispatch = Dispatch(
            self.pool,
            tasks,
            [self.tally],
            self.listener,
            lambda task, result: self.finished.append(task),
            background,
            min_actors,
            cast(
                DriverMetrics, SimpleNamespace(retries=SimpleNamespace(inc=lambda: None), fleet=lambda *numbers: None)
            ),
            **more,
        )

    def run(self) -> dict[Task, str]:
        return self.dispatch.run()
