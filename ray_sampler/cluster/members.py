"""The actors of a pool: what each of them is doing, and who is there."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from ray_sampler.cluster.worker import Task, TaskResult, WorkerInfo


@dataclass(eq=False)
class Member:
    """An actor of the pool and what it is doing."""

    handle: Any
    hello: ray.ObjectRef[WorkerInfo]
    since: float
    """When it was asked for, or was ready; seconds of the pool's clock, as all times here."""
    gone: bool = False
    info: WorkerInfo | None = None
    """None until it is ready."""
    node_id: str | None = None
    """Where it is or starts; None while it waits for a machine."""
    tasks: dict[ray.ObjectRef[TaskResult], Task] = field(default_factory=dict)
    """In the order of submission."""
    depth: int = 2
    """Shards that it may have at once, so that one computes while others are written."""
    last_result: float = 0.0
    """When it last gave a result, or was given work while idle."""
    last_sign: float = 0.0
    """When it last gave a result, or showed that it had got on."""
    pulse: ray.ObjectRef[int] | None = None
    """Its answer to the question how far it is."""
    evaluations: int = 0
    """What it answered last."""
    raised: int = 0
    """Shards in a row that raised on it."""
    level: int | None = None
    """Where it is in the pool's `room`."""

    def work_begins(self, now: float) -> None:
        self.last_result = self.last_sign = now


class Roster(NamedTuple):
    """Who is there, as of the last change."""

    ready: list[Member]
    staying: list[Member]
    """Actors, ready or not, whose nodes are not about to go."""
    starting: list[Member]
    """Those of them that are not ready."""
    at_work: int
    """Those of them that are."""
    pending: int
    """Actors that wait for a machine."""


def roster_of(members: Sequence[Member], draining: Container[str | None]) -> Roster:
    """Args:
    draining: ids of the nodes that are about to go.
    """
    staying = [member for member in members if member.node_id not in draining]
    starting = [member for member in staying if not member.info]
    ready = [member for member in members if member.info]
    pending = sum(member.node_id is None for member in members)
    return Roster(ready, staying, starting, len(staying) - len(starting), pending)
