"""A cluster by a virtual clock: nodes that come, drain and die, and actors that compute, fail, hang and die on them.

It answers `ray_sampler.cluster.calls`, through which the pool and the dispatch reach Ray: they run here as they are.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from ray_sampler.cluster.calls import GET_S
from ray_sampler.cluster.worker import Task

NEVER = float("inf")
START_S = 5.0


@dataclass(eq=False, slots=True)
class Ref:
    """A result, which is there from a moment on."""

    at: float = NEVER
    value: Any = None
    error: BaseException | None = None
    actor: Actor | None = None
    timeouts: int = 0
    """Times that it cannot be had although it is said to be there."""
    stray: bool = False
    """Whether it comes although nothing waits for it."""


@dataclass(eq=False, slots=True)
class Actor:
    """A handle; `start`, `work` and `evaluations` have a method `remote`, as those of Ray."""

    cluster: Simulated
    node: str | None = None
    gone: bool = False
    given: dict[Ref, Task] = field(default_factory=dict)
    """What it has to compute, in order."""
    hello: Ref = field(default_factory=Ref)
    frozen_until: float = 0.0
    """Until when it neither computes nor answers."""
    delay: float = 0.0
    """Seconds that the shard at which it is takes longer."""
    fate: str = "ok"
    """What becomes of the shard at which it is."""

    def __post_init__(self) -> None:
        self.hello.actor = self

    @property
    def start(self) -> Any:
        return SimpleNamespace(remote=self._start)

    @property
    def work(self) -> Any:
        return SimpleNamespace(remote=self._work)

    @property
    def evaluations(self) -> Any:
        return SimpleNamespace(remote=self._evaluations)

    def _start(self, patience_s: float | None = None) -> Ref:
        if patience_s is not None:  # once more, as it did not see the output at first
            self.hello = Ref(actor=self)
            self.cluster.later(self.cluster.clock + patience_s, lambda: self.cluster.started(self))
        return self.hello

    def _work(self, packed: list[Any]) -> Ref:
        ref = Ref(actor=self)
        self.given[ref] = Task(*packed)
        self.cluster.submitted(self, self.given[ref])
        if self.gone:  # the pool has not heard of it yet
            self.cluster.later(self.cluster.clock + 1.0, lambda: self.cluster.resolve(ref, error=RayActorError()))
        elif len(self.given) == 1:
            self.begin()
        return ref

    def _evaluations(self) -> Ref:
        ref, clock = Ref(actor=self), self.cluster.clock
        if not self.gone and self.frozen_until <= clock:
            ref.at, ref.value = clock, int(clock)
        return ref

    def begin(self) -> None:
        """Compute the next shard."""
        ref = next(iter(self.given))
        seconds = self.cluster.duration(self, self.given[ref])
        self.cluster.later(self.cluster.clock + seconds, lambda: self._ended(ref))

    def _ended(self, ref: Ref) -> None:
        if self.gone or ref not in self.given:
            return
        if (wait := max(self.delay, self.frozen_until - self.cluster.clock)) > 0:
            self.delay = 0.0
            if wait < NEVER:
                self.cluster.later(self.cluster.clock + wait, lambda: self._ended(ref))
            return
        self.cluster.ended(self, ref)
        if not self.gone and self.given:
            self.begin()


class Simulated:
    """Calls to a Ray that is not there.

    Args:
        nodes: how many come with the cluster.
        work: what becomes of a shard on an actor: ok, die, "node dies" or an exception.
        starts: what becomes of a start on a node: ok, die, "node dies" or an exception.
        more: whether an actor that finds no room gets a separate node.
        seconds: what a shard takes.
        room: actors for which a node has room.
    """

    def __init__(
        self,
        nodes: int,
        work: Callable[[Task, Actor], Any] = lambda task, actor: "ok",
        starts: Callable[[str], Any] = lambda node: "ok",
        more: bool = False,
        seconds: float = 10.0,
        room: int = 1,
    ) -> None:
        self.clock, self.seconds = 0.0, seconds
        self.behave, self.starts, self.more, self.room = work, starts, more, room
        self.numbers = itertools.count()
        self.names = (f"node {number}" for number in itertools.count())
        self.nodes: dict[str, dict[Actor, None]] = {}
        """The actors of each node that lives."""
        self.free: dict[str, None] = {}
        """Nodes with room, as far as is known: in the order in which they got it."""
        self.leaving: set[str] = set()
        self.actors: dict[Actor, None] = {}
        """Those that live, or wait for a node."""
        self.waiting: dict[Actor, None] = {}
        self.asked: list[float] = []
        """When actors were asked for."""
        self.given: list[tuple[float, Task, Actor]] = []
        self.lost_nodes: list[str] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.came: deque[Ref] = deque()
        """Results that were not taken yet."""
        self.place_calls = self.dead_calls = 0
        self.linger: float | None = None
        """Seconds for which more results are awaited once there is one, as by a busy driver; None: not at all."""
        for _ in range(nodes):
            self.add_node()

    def later(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), act))

    # What is played, and what becomes of it:

    def duration(self, actor: Actor, task: Task) -> float:
        return self.seconds

    def submitted(self, actor: Actor, task: Task) -> None:
        self.given.append((self.clock, task, actor))

    def start_outcome(self, actor: Actor) -> Any:
        return self.starts(str(actor.node))

    def ended(self, actor: Actor, ref: Ref) -> None:
        """An actor is through with a shard."""
        outcome = self.behave(actor.given[ref], actor)
        if outcome == "die":
            self.fail(actor)
        elif outcome == "node dies":
            self.lose(str(actor.node))
        elif outcome == "ok":
            self.answer(ref, SimpleNamespace(compute_s=1.0, upload_s=0.0, said=()))
        else:
            self.answer(ref, error=RayTaskError("work", "the actor's own traceback", outcome))

    def answer(self, ref: Ref, value: Any = None, error: BaseException | None = None) -> None:
        """An actor answers for a shard, which it has no longer."""
        assert ref.actor
        del ref.actor.given[ref]
        self.resolve(ref, value, error)

    def resolve(self, ref: Ref, value: Any = None, error: BaseException | None = None) -> None:
        ref.at, ref.value, ref.error = self.clock, value, error
        self.came.append(ref)

    # What comes and goes:

    def add_node(self, name: str | None = None) -> None:
        name = name or next(self.names)
        self.nodes[name] = {}
        self.free[name] = None
        self.place_waiting()

    def start(self) -> Actor:
        actor = Actor(self)
        self.asked.append(self.clock)
        self.actors[actor] = None
        self.waiting[actor] = None
        self.place_waiting()
        return actor

    def place_waiting(self) -> None:
        while self.waiting:
            for name in list(self.free):
                if name not in self.nodes or name in self.leaving or len(self.nodes[name]) >= self.room:
                    del self.free[name]
                else:
                    break
            if not self.free:
                if self.more:
                    self.more = False  # it places actors itself
                    self.add_node()
                    self.more = True
                    continue
                return
            actor, name = next(iter(self.waiting)), next(iter(self.free))
            del self.waiting[actor]
            actor.node = name
            self.nodes[name][actor] = None
            self.later(self.clock + self.start_seconds(), lambda actor=actor: self.started(actor))  # type: ignore[misc]

    def start_seconds(self) -> float:
        return START_S

    def started(self, actor: Actor) -> None:
        if actor.gone:
            return
        if actor.frozen_until > self.clock:
            if actor.frozen_until < NEVER:
                self.later(actor.frozen_until, lambda: self.started(actor))
            return
        outcome = self.start_outcome(actor)
        if outcome == "die":
            self.fail(actor)
        elif outcome == "node dies":
            self.lose(str(actor.node))
        elif outcome == "ok":
            self.resolve(actor.hello, SimpleNamespace(node_id=actor.node, said=()))
        elif outcome != "hang":
            self.resolve(actor.hello, error=RayTaskError("start", "", outcome))

    def fail(self, *actors: Actor, after: float = 0.0, reason: str | None = None) -> None:
        """They are gone, and with them all that they have not given back, which is known `after` seconds."""
        refs = [ref for actor in actors for ref in (list(actor.given) if actor.hello.at < NEVER else [actor.hello])]
        error = RayActorError() if reason is None else RayActorError(error_msg=reason)
        for actor in actors:
            self.vanish(actor)

        def told() -> None:
            for ref in refs:
                self.resolve(ref, error=error)

        if after:
            self.later(self.clock + after, told)
        else:
            told()

    def vanish(self, actor: Actor) -> None:
        """It has no process any more."""
        actor.gone = True
        self.actors.pop(actor, None)
        self.waiting.pop(actor, None)
        if actor.node in self.nodes:
            self.nodes[actor.node].pop(actor, None)
            self.free[actor.node] = None
            self.later(self.clock, self.place_waiting)

    def lose(self, *nodes: str, after: float = 0.0) -> None:
        """These nodes die."""
        self.lost_nodes += nodes
        self.fail(*[actor for node in nodes for actor in self.nodes.pop(node, ())], after=after)

    # As `Calls`:

    def now(self) -> float:
        return self.clock

    def wait(self, refs: Collection[Ref], timeout: float) -> list[Ref]:
        until = self.clock + timeout
        assert self.clock < 1e7, "it never ends"
        while not (done := self._there(refs)):
            if not self.events or self.events[0][0] > until:
                self.clock = max(self.clock, until)
                return []
            self._step()
        if self.linger is None or not isinstance(refs, dict):
            return done
        until = self.clock + self.linger
        while self.events and self.events[0][0] <= until:
            self._step()
        return done + self._there(refs)

    def _step(self) -> None:
        at, _, act = heapq.heappop(self.events)
        self.clock = max(self.clock, at)
        act()

    def _there(self, refs: Collection[Ref]) -> list[Ref]:
        """Results that are there: of very many references without going through them."""
        if not isinstance(refs, dict):
            return [ref for ref in refs if ref.at <= self.clock]
        came, self.came = self.came, deque()
        return [ref for ref in came if ref.stray or ref in refs]

    def get(self, ref: Ref) -> Any:
        if ref.timeouts:
            ref.timeouts -= 1
            self.clock += GET_S
            self.came.append(ref)
            raise GetTimeoutError
        if ref.error:
            raise ref.error
        return ref.value

    def kill(self, actor: Actor) -> None:
        self.vanish(actor)

    def places(self, hellos: Collection[Ref]) -> list[str | None]:
        self.place_calls += 1
        return [self.place(hello) for hello in hellos]

    def place(self, hello: Ref) -> str | None:
        return hello.actor.node if hello.actor else None

    def draining(self) -> set[str]:
        return set(self.leaving)

    def dead(self, nodes: Collection[str]) -> set[str]:
        self.dead_calls += bool(nodes)
        return {node for node in nodes if node not in self.nodes}
