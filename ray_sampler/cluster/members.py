"""The actors of a pool: what each is doing, what happens to them, and how much of what goes wrong is borne."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from ray_sampler.cluster.worker import Task, TaskResult, WorkerInfo

ATTEMPTS = 3
"""Times that a shard may fail by itself before it is given up."""

NON_FINITE_ATTEMPTS = 2
"""The same where values were not finite, on two actors: a network repeats that, a card that is broken does not."""

DEATHS = 5
"""Actors that may die with one shard, on nodes that live, before it is given up. From the first death on it is a
suspect: it has actors to itself, so that no other shard is blamed, and waits until all others were tried."""

NODE_DEATHS = 3
"""Nodes that may die with one shard, with no shard finished between, before it is given up: nodes go by themselves too,
but then others finish something."""

DEATHS_IN_A_ROW = 25
"""Actors that may die, each ready only after the one before had died, with no shard finished between, before the run
stops: it is not one shard that kills them."""

START_FAILURES = 3
"""Actors that may fail to start one after another before the run stops, unless one is ready, or more of them are on
their way: among a thousand machines three are broken."""

FAILURES_IN_A_ROW = 12
"""Failures, with no shard finished between, at which the run stops, or as many as actors are ready if those are more:
the cause is none of the shards', but perhaps a bucket that takes nothing any more."""

NOTHING_BUT_NON_FINITE = 50
"""Failures by values that are not finite, with no shard ever finished, at which the run stops: the model gives nothing
else."""

SILENCE_FACTOR = 10
"""An actor is silent after this multiple of the median shard time without a sign, and at least the timeout."""

START_FACTOR = 3
"""A start may take this many times longer: networks are compiled in it."""

START_S = 180.0
"""Minimum start timeout in seconds: Ray 2.60 schedules onto a frozen node until it declares it dead, and only then
gives them elsewhere."""

BROKEN_AFTER = 2
"""Shards in a row that raise on an actor before it is replaced: its device may be broken, and theirs not the fault."""

STRAGGLER_FACTOR = 2
"""A shard straggles when it has taken this multiple of the median."""


@dataclass
class Streak:
    """Mishaps in a row. One of something that began before the last was counted is not counted: many fall at once."""

    length: int = 0
    last: float = -math.inf
    """When the last one was counted."""

    def add(self, began: float, now: float) -> None:
        if began >= self.last:
            self.length, self.last = self.length + 1, now


@dataclass
class Suspicion:
    """What died while an actor had a shard."""

    actors: int = 0
    """On nodes that live."""
    nodes: set[str] = field(default_factory=set)
    """With no shard finished between."""
    finished: int = 0
    """Shards that were finished when the last of the nodes died."""

    def add(self, node: str | None, finished: int) -> bool:
        """One more death; returns whether the shard is given up."""
        if node is None:
            self.actors += 1
        elif self.finished != finished:
            self.nodes, self.finished = {node}, finished
        else:
            self.nodes.add(node)
        return self.actors >= DEATHS or len(self.nodes) >= NODE_DEATHS


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
