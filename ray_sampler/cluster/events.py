"""What the pool says of its actors."""

from __future__ import annotations

from typing import NamedTuple

from ray_sampler.cluster.worker import Task, TaskResult, WorkerInfo


class Finished(NamedTuple):
    """An actor wrote a shard's fragment."""

    task: Task
    result: TaskResult


class Failed(NamedTuple):
    """A shard raised by itself, on an actor that is well."""

    task: Task
    error: BaseException


class Lost(NamedTuple):
    """An actor is gone, and with it these shards."""

    tasks: list[Task]
    reason: str
    died: bool
    """Whether one of them may be the cause: False where the pool ended it for other reasons."""
    node: str | None = None
    """The node that died with it; None where that lives."""
    since: float = 0.0
    """When it was ready."""


class Ready(NamedTuple):
    """An actor is ready for shards."""

    info: WorkerInfo


class Waiting(NamedTuple):
    """An actor waits for its output to show what the driver wrote."""

    reason: str


class StartFailed(NamedTuple):
    """An actor could not start."""

    reason: str
    since: float
    """When it was asked for."""
    with_node: bool = False
    """Whether its node died."""
    hopeless: bool = False
    """Whether every other actor would fail as well: the run does not fit on its device."""


Event = Finished | Failed | Lost | Ready | Waiting | StartFailed
