"""What is true of a simulated run, whatever its driver believes, and what must hold of it at every moment."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray_sampler.cluster.members import ATTEMPTS, NON_FINITE_ATTEMPTS
from ray_sampler.cluster.pool import LONGEST_PAUSE_S, MOST_IN_FLIGHT
from ray_sampler.cluster.worker import Task

SIZE = 8
"""Samples of a shard."""

IDLE_S = 5.0
"""An actor that has nothing to do gets a shard at the next turn, or after a second where it failed at the next one."""

UNASKED_S = LONGEST_PAUSE_S + 10.0
"""No pause before an actor is asked for is longer."""

STUCK_S = 6 * 3600.0
"""Seconds with actors and work in which something comes back: ten times as long as a start may take."""

MOST_TURNS = 20_000
"""Turns of the driver's loop that may go by without the clock: it spins."""


class Broken(Exception):
    """An invariant does not hold."""


def number_of(task: Task) -> int:
    return task.start // SIZE


class Ledger:
    """Files that were written, answers that were counted, and tries, of each shard by its number."""

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.written, self.counted, self.tries = bytearray(shards), bytearray(shards), bytearray(shards)
        self.damaged: dict[int, None] = {}
        self.ended: Counter[int] = Counter()
        """Tries that came to nothing, of shards that are not finished."""
        self.raised: Counter[tuple[int, str]] = Counter()
        self.failures = 0
        """Tries that came to nothing, of all."""
        self.duplicated = 0
        self.turns, self.clock, self.moved = 0, 0.0, 0.0
        self.idle_since: float | None = None
        self.unasked_since: float | None = None

    def submitted(self, task: Task) -> None:
        """Raises Broken: a shard is tried without end."""
        number = number_of(task)
        self.tries[number] = min(255, self.tries[number] + 1)
        if self.tries[number] > 2 * (1 + self.ended[number]):
            raise Broken(f"bounded retries: shard {number} is given to an actor for no reason")

    def fell(self, task: Task) -> None:
        """A try came to nothing with its actor."""
        self.ended[number_of(task)] += 1
        self.failures += 1

    def failed(self, task: Task, kind: str) -> None:
        """Raises Broken: a shard that fails is tried too often."""
        self.fell(task)
        if kind != "refused":  # which is not a shard's fault
            self.raised[number_of(task), kind] += 1
            most = NON_FINITE_ATTEMPTS if kind == "not finite" else ATTEMPTS
            if self.raised[number_of(task), kind] > most + 1:  # a second copy may be on its way
                raise Broken(f"bounded retries: shard {number_of(task)} failed more than {most} times")

    def wrote(self, task: Task, damaged: bool = False) -> None:
        number = number_of(task)
        self.written[number] = 1
        if damaged:
            self.damaged[number] = None
        else:
            self.damaged.pop(number, None)

    def count(self, task: Task) -> None:
        """The driver takes a shard as finished."""
        number = number_of(task)
        self.moved = self.clock
        self.duplicated += self.counted[number]
        self.counted[number] = 1
        if not self.written[number]:
            raise Broken(f"no index lost: shard {number} counts as finished, and its file was not written")

    def rejected(self, number: int) -> None:
        """A damaged file was moved away."""
        self.written[number] = self.counted[number] = self.tries[number] = 0
        self.ended.pop(number, None)
        self.damaged.pop(number, None)

    def turn(self, now: float, queued: int, idle: bool) -> None:
        """Raises Broken: an actor waits, or the driver does not.

        Args:
            queued: shards that are for any actor.
            idle: whether an actor has nothing to do.
        """
        self.turns = self.turns + 1 if now <= self.clock else 0
        self.clock = max(now, self.clock)
        if self.turns > MOST_TURNS:
            raise Broken(f"no waiting with work and capacity at hand: the driver spins at {now:.0f} s")
        self.idle_since = (self.idle_since or now) if queued and idle else None
        if self.idle_since and now - self.idle_since > IDLE_S:
            raise Broken(f"no waiting with work and capacity at hand: an actor has nothing to do at {now:.0f} s")

    def tick(self, now: float, unasked: bool, stuck: bool) -> None:
        """Raises Broken: no request for an actor that would have room and work, or nothing comes back.

        Args:
            stuck: whether there are actors and work.
        """
        self.unasked_since = (self.unasked_since or now) if unasked else None
        if self.unasked_since and now - self.unasked_since > UNASKED_S:
            raise Broken(f"no waiting with work and capacity at hand: no actor is asked for at {now:.0f} s")
        if not stuck:
            self.moved = now
        if now - self.moved > STUCK_S:
            raise Broken(f"no waiting with work and capacity at hand: nothing comes back at {now:.0f} s")

    def check_memory(self, dispatch: Any) -> None:
        """Raises Broken: the driver remembers more than what is under way and what failed."""
        pool = dispatch.pool
        members = len(pool.members)
        kept = {
            "shards under way": (len(dispatch.copies), MOST_IN_FLIGHT * members),
            "references": (len(pool.owners), (MOST_IN_FLIGHT + 1) * members),
            "suspects": (len(dispatch.suspects), self.failures),
            "failed shards": (len(dispatch.attempts) + len(dispatch.non_finite) + len(pool.shunned), 3 * self.failures),
            "queued shards": (len(dispatch.queue), self.shards),
        }
        for what, (number, most) in kept.items():
            if number > most:
                raise Broken(f"bounded driver memory: {number} {what}, where {most} are the most")
