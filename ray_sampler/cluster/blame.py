"""What is counted of things that go wrong, and how much of it is borne."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
