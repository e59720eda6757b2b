"""A cluster by a virtual clock: nodes that come, drain and die at once, and actors that do what a script says."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from ray.exceptions import RayActorError, RayTaskError

from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import Task
from ray_sampler.reporting.progress import Snapshot

NEVER = float("inf")
START_S = 5.0


@dataclass(eq=False)
class Ref:
    """A result, which is there from a moment on."""

    at: float = NEVER
    value: Any = None
    error: BaseException | None = None
    actor: Actor | None = None


@dataclass(eq=False)
class Actor:
    """A handle; `start` and `work` have a method `remote`, as those of Ray."""

    cluster: Simulated
    node: str | None = None
    placed: bool = False
    free_at: float = 0.0
    """When it is done with all that it was given."""
    refs: list[Ref] = field(default_factory=list)
    hello: Ref = field(default_factory=Ref)

    def __post_init__(self) -> None:
        self.hello.actor = self
        self.start = SimpleNamespace(remote=lambda *patience: self.hello)
        self.work = SimpleNamespace(remote=self._work)
        self.evaluations = SimpleNamespace(remote=lambda: Ref(self.cluster.clock, 0))

    def _work(self, packed: list[Any]) -> Ref:
        self.free_at = max(self.free_at, self.cluster.clock) + self.cluster.seconds
        ref = Ref()
        self.refs.append(ref)
        task = Task(*packed)
        self.cluster.given.append((self.cluster.clock, task, self))
        self.cluster.later(self.free_at, lambda: self.cluster.work_ends(self, task, ref))
        return ref

    def fail(self) -> None:
        """It is gone, and with it all that it has not given back."""
        for ref in [self.hello, *self.refs]:
            if ref.at == NEVER:
                ref.at, ref.error = self.cluster.clock, RayActorError()
        self.cluster.actors.discard(self)


class Simulated:
    """Calls to a Ray that is not there.

    Args:
        nodes: how many come with the cluster, each with room for one actor.
        work: what becomes of a task on an actor: ok, die, "node dies" or an exception.
        starts: what becomes of a start on a node: ok, die or an exception.
        more: whether an actor that finds no room gets a node of its own.
    """

    def __init__(
        self,
        nodes: int,
        work: Callable[[Task, Actor], Any] = lambda task, actor: "ok",
        starts: Callable[[str], Any] = lambda node: "ok",
        more: bool = False,
        seconds: float = 10.0,
    ) -> None:
        self.clock, self.seconds = 0.0, seconds
        self.behave, self.starts, self.more = work, starts, more
        self.names = (f"node {number}" for number in itertools.count())
        self.nodes = {next(self.names) for _ in range(nodes)}
        self.leaving: set[str] = set()
        self.actors: set[Actor] = set()
        self.waiting: list[Actor] = []
        self.asked: list[float] = []
        """When actors were asked for."""
        self.given: list[tuple[float, Task, Actor]] = []
        self.lost_nodes: list[str] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = itertools.count()
        self.place_calls = self.dead_calls = 0

    def later(self, at: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.numbers), act))

    def start(self) -> Actor:
        actor = Actor(self)
        self.asked.append(self.clock)
        self.actors.add(actor)
        self.waiting.append(actor)
        self._place()
        return actor

    def _place(self) -> None:
        for actor in list(self.waiting):
            taken = {each.node for each in self.actors}
            free = sorted(self.nodes - taken - self.leaving)
            if not free and self.more:
                free = [next(self.names)]
                self.nodes.update(free)
            if not free:
                return
            self.waiting.remove(actor)
            actor.node = free[0]
            self.later(self.clock + START_S, lambda actor=actor: self._started(actor))  # type: ignore[misc]

    def _started(self, actor: Actor) -> None:
        if actor not in self.actors:
            return
        outcome = self.starts(str(actor.node))
        if outcome == "die":
            actor.fail()
        elif outcome == "node dies":
            self.lose(str(actor.node))
        elif outcome == "ok":
            actor.hello.at, actor.hello.value = self.clock, SimpleNamespace(node_id=actor.node, said=())
        else:
            actor.hello.at, actor.hello.error = self.clock, RayTaskError("start", "", outcome)

    def work_ends(self, actor: Actor, task: Task, ref: Ref) -> None:
        if actor not in self.actors:
            return
        outcome = self.behave(task, actor)
        if outcome == "die":
            actor.fail()
        elif outcome == "node dies":
            self.lose(str(actor.node))
        elif outcome == "ok":
            ref.at, ref.value = self.clock, SimpleNamespace(compute_s=1.0, upload_s=0.0, said=())
        else:
            ref.at, ref.error = self.clock, RayTaskError("work", "the actor's own traceback", outcome)

    def lose(self, *nodes: str) -> None:
        self.nodes -= set(nodes)
        self.lost_nodes += nodes
        for actor in [actor for actor in self.actors if actor.node in nodes]:
            actor.fail()

    # As `Calls`:

    def now(self) -> float:
        return self.clock

    def wait(self, refs: Sequence[Ref], timeout: float) -> list[Ref]:
        until = self.clock + timeout
        assert self.clock < 1e5, "it never ends"
        while not (done := [ref for ref in refs if ref.at <= self.clock]):
            if not self.events or self.events[0][0] > until:
                self.clock = until
                return []
            self.clock, _, act = heapq.heappop(self.events)
            act()
        return done

    def get(self, ref: Ref) -> Any:
        if ref.error:
            raise ref.error
        return ref.value

    def kill(self, actor: Actor) -> None:
        self.actors.discard(actor)
        if actor in self.waiting:
            self.waiting.remove(actor)
        self._place()

    def places(self, hellos: Collection[Ref]) -> list[str | None]:
        self.place_calls += 1
        return [self.place(hello) for hello in hellos]

    def place(self, hello: Ref) -> str | None:
        return hello.actor.node if hello.actor else None

    def draining(self) -> set[str]:
        return self.leaving

    def dead(self, nodes: Collection[str]) -> set[str]:
        self.dead_calls += bool(nodes)
        return set(nodes) - self.nodes


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
