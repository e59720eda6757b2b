"""A simulated cluster on which things go wrong as a seed has it: what, where and when."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from ray.exceptions import RayTaskError

from ray_sampler.cluster.members import Finished
from ray_sampler.cluster.pool import NEVER_RAN
from ray_sampler.cluster.worker import HiddenError, Task, TaskResult
from ray_sampler.sampling.engine import NonFiniteError
from ray_sampler.storage.record import LABEL, Column, FragmentName, Record
from ray_sampler.storage.store import NoRoom
from tests.simulation.cluster import NEVER, Actor, Ref, Simulated
from tests.simulation.ledger import SIZE, Ledger, number_of

WEIGHTS = {
    "actor dies": 24.0,
    "answer lost": 6.0,
    "node dies": 6.0,
    "all nodes die": 0.02,
    "capacity late": 1.0,
    "capacity never": 1.0,
    "drain": 5.0,
    "hang": 8.0,
    "late answer": 6.0,
    "slow answer": 4.0,
    "duplicate answer": 6.0,
    "straggler": 14.0,
    "start fails": 4.0,
    "start hangs": 2.0,
    "start dies": 2.0,
    "start waits": 2.0,
    "damage": 2.0,
    "error": 6.0,
    "not finite": 3.0,
    "refused": 2.0,
    "poison": 0.05,
}
"""How often each kind of fault is drawn. Those of a start and of a shard meet the one that is under way or next."""

FATES = ("answer lost", "slow answer", "duplicate answer", "damage", "error", "not finite", "refused")
STARTS = ("start fails", "start hangs", "start dies", "start waits")
NODES = ("node dies", "all nodes die", "capacity late", "capacity never", "drain")

TAIL = 0.2
"""Share of the faults that strike in the last hundredth of the shards, where each of them matters."""

PATIENCE_S = 3600.0
"""After so long without a node, and none to come, the user of a simulated run interrupts it."""

SHARD_S = 10.0
COLUMNS = {"image": Column("uint8", (64, 64, 3)), "label": LABEL}
MADE = {"numerics_key": "a CPU, torch, batch 8, fp32", "device": "a CPU"}
FINGERPRINT = "ab" * 32


class Interrupted(Exception):
    """No machine comes any more."""


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    actors: int = 100
    shards: int = 10_000
    kills: int = 1_000
    broken: str | None = None
    """The safeguard of the driver that is disabled: requeue, duplicate or forget."""
    nodes: int | None = None
    """Nodes that there are, in place of those that the seed has."""


class Fault(NamedTuple):
    shards: int
    """It strikes when this many were computed."""
    after_s: float
    """And so much later."""
    kind: str


def draw_plan(settings: Settings) -> deque[Fault]:
    chance = random.Random(f"plan {settings.seed}")
    kinds = chance.choices(list(WEIGHTS), list(WEIGHTS.values()), k=settings.kills)
    faults = []
    for kind in kinds:
        low = 0.99 if chance.random() < TAIL else 0.0
        faults.append(Fault(int(settings.shards * chance.uniform(low, 1.0)), chance.uniform(0.0, 60.0), kind))
    return deque(sorted(faults))


def record_of(start: int, stop: int) -> Record:
    return Record(FINGERPRINT, start, stop, COLUMNS, {"image": start, "label_int64": start}, MADE)


class Storm(Simulated):
    """The cluster of a seed. Faults strike as shards come back, so that they are spread over a run of any length."""

    def __init__(self, settings: Settings) -> None:
        chance = self.chance = random.Random(f"storm {settings.seed}")
        super().__init__(0, room=chance.randint(1, 8), seconds=SHARD_S)
        self.settings = settings
        self.ledger = Ledger(settings.shards)
        self.plan = draw_plan(settings)
        self.hits: Counter[str] = Counter()
        self.linger = chance.choice((0.0, 0.01, 0.2, 1.0))
        self.upload_s = chance.choice((0.0, 0.5, 2.0, 20.0))
        """Of a shard, beside a second of computing: where it is long, an actor has more shards at once."""
        self.computed = 0
        self.starts_to_spoil: deque[str] = deque(maxlen=1)
        self.poison: set[int] = set()
        self.unasked: deque[Finished] = deque(maxlen=100)
        """Answers that came late or twice, for a driver without the safeguard against them."""
        self.idle: dict[Actor, None] = {}
        self.coming = self.gone_for_good = 0
        self.nodeless_since: float | None = None
        self.driver: Any = None
        """The dispatch that runs on it."""
        wanted = -(-int(settings.actors * chance.choice((0.5, 1.0, 1.0, 1.2))) // self.room)
        self.size = max(1, wanted) if settings.nodes is None else settings.nodes
        for _ in range(self.size):
            self.arrive(chance.uniform(0.0, 1800.0) if chance.random() < 0.2 else 0.0)

    def arrive(self, after: float) -> None:
        """A node comes `after` seconds."""

        def come() -> None:
            self.coming -= 1
            self.add_node()

        self.coming += 1
        self.later(self.clock + after, come)

    # How long things take, and what becomes of them:

    def duration(self, actor: Actor, task: Task) -> float:
        return self.seconds * (0.8 + 0.4 * self.chance.random())

    def start_seconds(self) -> float:
        return self.chance.uniform(5.0, 30.0)

    def submitted(self, actor: Actor, task: Task) -> None:
        self.idle.pop(actor, None)
        self.ledger.submitted(task)
        if actor.gone:
            self.ledger.fell(task)

    def start_outcome(self, actor: Actor) -> Any:
        kind = self.starts_to_spoil.popleft() if self.starts_to_spoil else "ok"
        if kind != "ok":
            self.hits[kind] += 1
        match kind:
            case "start fails":
                return RuntimeError("the driver of the card does not answer")
            case "start waits":
                return HiddenError("a cache hides what was written")
            case "start hangs":
                return "hang"
            case "start dies":
                self.fail(actor, after=1.0, reason=NEVER_RAN if self.chance.random() < 0.3 else None)
                return "hang"
        return "ok"

    def ended(self, actor: Actor, ref: Ref) -> None:
        task, fate, actor.fate = actor.given[ref], actor.fate, "ok"
        if number_of(task) in self.poison:
            self.hits["poison"] += 1
            self.fail(actor, after=1.0)
            return
        if fate != "ok":
            self.hits[fate] += 1
        errors = {
            "error": RuntimeError("no luck"),
            "not finite": NonFiniteError("not finite"),
            "refused": NoRoom("no room"),
        }
        if fate in errors:
            self.ledger.failed(task, fate)
            self.answer(ref, error=RayTaskError("work", "", errors[fate]))
            return
        self.ledger.wrote(task, damaged=fate == "damage")
        self.strike_due()
        if fate == "answer lost":
            self.fail(actor, after=self.chance.uniform(0.0, 2.0))
            return
        if fate == "slow answer":
            ref.timeouts = self.chance.randint(1, 20)
            self.ledger.fell(task)  # the pool may lose the actor before it has the answer
        self.answer(ref, result_of(task, self.upload_s))
        if fate == "duplicate answer":
            self.later(self.clock + self.chance.uniform(0.0, 30.0), lambda: self.come_unasked(ref, task))

    def come_unasked(self, ref: Ref, task: Task) -> None:
        """A result comes though nothing waits for it."""
        ref.stray = True
        self.came.append(ref)
        self.unasked.append(Finished(task, ref.value))

    def vanish(self, actor: Actor) -> None:
        if not actor.gone:
            for task in actor.given.values():
                self.ledger.fell(task)
        self.idle.pop(actor, None)
        super().vanish(actor)

    def kill(self, actor: Actor) -> None:
        """Of one that is cut off, what it had comes late."""
        if not actor.gone and self.clock < actor.frozen_until < NEVER and actor.given:
            ref, task = next(iter(actor.given.items()))

            def late() -> None:
                self.ledger.wrote(task)
                ref.value, ref.error = result_of(task, 0.0), None
                self.come_unasked(ref, task)

            self.later(actor.frozen_until, late)
        super().kill(actor)

    # What strikes:

    def strike_due(self) -> None:
        """One more shard was computed."""
        self.computed += 1
        while self.plan and self.plan[0].shards < self.computed:
            fault = self.plan.popleft()
            self.later(self.clock + fault.after_s, lambda kind=fault.kind: self.strike(kind))  # type: ignore[misc]

    def strike(self, kind: str) -> None:
        if kind in STARTS:
            self.starts_to_spoil.append(kind)
        elif kind == "poison":
            self.poison.add(self.chance.randrange(self.settings.shards))
        elif kind in NODES:
            self.strike_node(kind)
        elif actors := [each for each in self.actors if (each.node if kind == "actor dies" else each.given)]:
            self.strike_actor(kind, self.chance.choice(actors))

    def strike_actor(self, kind: str, actor: Actor) -> None:
        if kind in FATES:
            actor.fate = kind
            return
        self.hits[kind] += 1
        match kind:
            case "actor dies":
                self.fail(actor, after=self.chance.uniform(0.0, 2.0))
            case "hang":
                actor.frozen_until = NEVER
            case "late answer":
                actor.frozen_until = self.clock + self.chance.uniform(60.0, 1500.0)
            case "straggler":
                actor.delay = SHARD_S * self.chance.uniform(5.0, 60.0)

    def strike_node(self, kind: str) -> None:
        staying = [name for name in self.nodes if name not in self.leaving]
        if not staying or (kind == "capacity never" and self.gone_for_good >= self.size // 2):
            return
        self.hits[kind] += 1
        name = self.chance.choice(staying)
        match kind:
            case "node dies":
                self.fall([name], self.chance.uniform(5.0, 180.0))
            case "all nodes die":
                self.fall(list(self.nodes), self.chance.uniform(5.0, 600.0))
            case "capacity late":
                self.fall([name], self.chance.uniform(1800.0, 7200.0))
            case "capacity never":
                self.gone_for_good += 1
                self.fall([name], None)
            case "drain":
                self.leaving.add(name)
                after, again = self.chance.uniform(10.0, 300.0), self.chance.uniform(0.0, 300.0)
                self.later(self.clock + after, lambda: self.fall([name], again))

    def fall(self, names: list[str], again: float | None) -> None:
        """Nodes die, which come back after this many seconds."""
        names = [name for name in names if name in self.nodes]
        self.lose(*names, after=self.chance.uniform(0.0, 5.0))
        self.leaving.difference_update(names)
        for _ in names if again is not None else ():
            self.arrive(again or 0.0)

    # As `Calls`, and what must hold whenever the driver waits:

    def get(self, ref: Ref) -> Any:
        try:
            return super().get(ref)
        finally:
            actor = ref.actor
            if actor and not (actor.gone or actor.given or ref.timeouts) and actor.hello.value:
                self.idle[actor] = None

    def turn(self) -> None:
        """Raises Broken: an actor waits for what is queued."""
        queue = self.driver.queue
        idle = bool(queue and self.idle) and any(
            actor.node not in self.leaving and not self.shuns(actor, queue) for actor in self.idle
        )
        self.ledger.turn(self.clock, len(queue), idle)

    def shuns(self, actor: Actor, queue: deque[Task]) -> bool:
        """Whether what is queued failed on this actor, all of it."""
        shunned = self.driver.pool.shunned
        return all(task in shunned and shunned[task].handle is actor for task in queue)

    def draining(self) -> set[str]:
        """Asked once a second.

        Raises:
            Broken: there is room for an actor and work, and none is asked for, or the driver's memory grows.
            Interrupted: there is no node and none will come.
        """
        driver, known = self.driver, len(self.driver.pool.members)
        for name in list(self.free):
            if name not in self.nodes or name in self.leaving or len(self.nodes[name]) >= self.room:
                del self.free[name]
        short = known < driver.pool.fleet.max_actors and len(driver.queue) >= 2 * (known + 1)
        self.ledger.tick(
            self.clock, bool(short and self.free and not self.waiting), bool(driver.copies and len(self.nodes))
        )
        self.ledger.check_memory(driver)
        if self.nodes or self.coming:
            self.nodeless_since = None
        elif self.nodeless_since is None:
            self.nodeless_since = self.clock
        elif self.clock - self.nodeless_since > PATIENCE_S:
            raise Interrupted
        return super().draining()


def result_of(task: Task, upload_s: float) -> TaskResult:
    start, stop = task.start, task.stop
    assert stop - start <= SIZE
    return TaskResult(FragmentName(start, stop, "parquet"), record_of(start, stop), 1.0, 0.0, upload_s)
