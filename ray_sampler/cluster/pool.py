"""An elastic set of actors: it grows as capacity comes, and says what finished, failed or was lost."""

from __future__ import annotations

import logging
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Container, Iterable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, WorkerCrashedError

from ray_sampler.cluster.blame import Streak
from ray_sampler.cluster.calls import Calls, RayCalls
from ray_sampler.cluster.events import Event, Failed, Finished, Lost, Ready, StartFailed, Waiting
from ray_sampler.cluster.heard import Tracebacks
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import HiddenError, Task, TaskResult, WorkerInfo
from ray_sampler.sampling.engine import NonFiniteError, OutOfDeviceMemoryError
from ray_sampler.sampling.trial import WrongNetworkError
from ray_sampler.storage.retry import HIDDEN_S
from ray_sampler.storage.store import NoRoom

logger = logging.getLogger(__name__)

MOST_IN_FLIGHT = 8
"""Shards of one actor at once, however slow its uploads are: this bounds its memory."""

MOST_PENDING = 100
"""Actors that may wait for a machine at once, or as many as are ready if those are more: a queue of a million shards
is no reason to ask for a million machines."""

SILENCE_FACTOR = 10
"""An actor is silent when it gave no sign for so many times the median shard, and for the timeout at least."""

START_FACTOR = 3
"""A start may take so many times that long: networks are compiled in it."""

START_S = 180.0
"""And so many seconds at least: Ray 2.60 gives actors to a frozen node until it declares it dead, and only then
gives them elsewhere."""

START_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""After a start that failed, others are asked for so much later: twice as long after each one in a row on a node."""

NEVER_RAN = "never ran"
"""What Ray 2.60 says of an actor that still waited at a node when that one died."""

BROKEN_AFTER = 2
"""Shards in a row that raise on an actor before it is replaced: its device may be broken, and theirs not the fault."""

STRAGGLER_FACTOR = 2
"""A shard straggles when it has taken so many times the median."""


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

    def work_begins(self, now: float) -> None:
        self.last_result = self.last_sign = now


class Pool:
    """Actors that come and go.

    Args:
        start: starts one actor and returns its handle.
        fleet: what an actor takes.
        shard_timeout: seconds without a result after which an actor counts as silent, at least.
        calls: to the Ray in which they are.
    """

    def __init__(
        self, start: Callable[[], Any], fleet: Fleet, shard_timeout: float, calls: Calls | None = None
    ) -> None:
        self.calls: Calls = calls or RayCalls()
        self.start = start
        self.fleet = fleet
        self.shard_timeout = shard_timeout
        self.members: list[Member] = []
        self.draining: set[str] = set()
        """Ids of the nodes that are about to go."""
        self.durations: deque[float] = deque(maxlen=100)
        self.unplaced_since = self.calls.now()
        """When an actor had a process last; before that, when the pool began."""
        self.troubles: defaultdict[str | None, Streak] = defaultdict(Streak)
        """Starts that failed in a row, by node."""
        self.no_start_before = 0.0
        """Until when no actor is asked for."""
        self.shunned: dict[Task, Member] = {}
        """Shards that are for other actors, if there are any, than the one on which they failed."""
        self.tracebacks = Tracebacks()

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.info]

    def staying(self) -> list[Member]:
        """Actors, ready or not, whose nodes are not about to go."""
        return [member for member in self.members if member.node_id not in self.draining]

    def idle(self) -> list[Member]:
        """Those of them that have nothing to do."""
        return [member for member in self.staying() if member.info and not member.tasks]

    def busy(self) -> int:
        """How many of them have something to do."""
        return sum(bool(member.tasks) for member in self.staying())

    def in_flight(self) -> int:
        return sum(len(member.tasks) for member in self.members)

    def pending(self) -> int:
        """Actors that wait for a machine."""
        return sum(member.node_id is None for member in self.members)

    def unplaced_s(self) -> float:
        """Seconds for which actors were asked for and none had a process."""
        if not self.members or self.pending() < len(self.members):
            self.unplaced_since = self.calls.now()
        return self.calls.now() - self.unplaced_since

    def look_around(self) -> None:
        """Learn where actors are and which nodes are about to go; actors with nothing to do leave those."""
        self.draining = self.calls.draining()
        starting = [member for member in self.members if not member.info]
        places = self.calls.places([member.hello for member in starting]) if starting else []
        for member, node_id in zip(starting, places, strict=True):
            if node_id != member.node_id:
                member.node_id = node_id
                member.work_begins(self.calls.now())
        for member in [m for m in self.members if m.node_id in self.draining and not m.tasks]:
            self.remove(member)

    def median_s(self) -> float | None:
        """The median time from submission to result of recent shards, in seconds."""
        return statistics.median(self.durations) if self.durations else None

    def scale(self, wanted: int, keep: int) -> None:
        """Ask for actors until there are `wanted`, those that still start counted in; take back those beyond `keep`.

        Actors on nodes that are about to go do not count, so that others are asked for while they finish.
        """
        staying = self.staying()
        now = self.calls.now()
        room = max(MOST_PENDING, len(self.ready)) - self.pending() if now >= self.no_start_before else 0
        for _ in range(min(wanted - len(staying), room)):
            handle = self.start()
            self.members.append(Member(handle, handle.start.remote(), now))
        starting = [member for member in staying if not member.info]
        starting.sort(key=lambda member: member.node_id is not None)
        for member in starting[: max(len(staying) - keep, 0)]:
            self.remove(member)

    def remove(self, member: Member) -> None:
        """End an actor at once, and forget it."""
        self.members.remove(member)
        member.gone = True
        self.calls.kill(member.handle)

    def release_idle(self, keep: int) -> None:
        """End idle actors as long as more than `keep` actors are left, so that their nodes can go."""
        for member in self.idle()[: max(0, len(self.members) - keep)]:
            self.remove(member)

    def close(self) -> None:
        for member in list(self.members):
            self.remove(member)

    def assign(self, queue: deque[Task], alone: Set[Task]) -> list[Task]:
        """Give shards from the front of `queue` to the least busy actors that have room; returns those given.

        While the queue is long an actor has a second shard waiting; near its end it takes one at a time, so that
        none waits behind another. The shards of `alone` share an actor with no other, and one that is shunned goes to
        another actor than before, for which the last one makes room. Nodes that are about to go get no more.
        """
        given: list[Task] = []
        if not queue or not self.ready:
            return given
        members = [member for member in self.staying() if member.info]
        for busy in range(max((member.depth for member in members), default=0)):
            for member in members:
                if not queue or (busy and len(queue) < len(members)):
                    return given
                if not len(member.tasks) == busy < member.depth or self.shunned.get(queue[0]) is member:
                    continue
                if not (busy and alone) or alone.isdisjoint([queue[0], *member.tasks.values()]):
                    given.append(queue.popleft())
                    self.submit(member, given[-1])
        placed = [member for member in self.staying() if member.node_id is not None]
        if queue and len(placed) == 1 and not placed[0].tasks and self.shunned.get(queue[0]) is placed[0]:
            self.remove(placed[0])
        return given

    def submit(self, member: Member, task: Task) -> None:
        if not member.tasks:
            member.work_begins(self.calls.now())
        member.tasks[member.handle.work.remote(list(task))] = task

    def straggler(self, unfinished: Container[Task]) -> Task | None:
        """A shard of `unfinished` that one actor alone has, and that takes long or waits behind another.

        An actor may still be at a shard that another one finished; that is no straggler.
        """
        median = self.median_s()
        copies = Counter(shard for member in self.members for shard in member.tasks.values())
        now = self.calls.now()
        for member in self.ready:
            late = median is not None and now - member.last_result > STRAGGLER_FACTOR * median
            for position, shard in enumerate(member.tasks.values()):
                if shard in unfinished and copies[shard] == 1 and (late or position > 0):
                    return shard
        return None

    def wait(self, timeout: float, others: Collection[Any] = ()) -> list[Event]:
        """What happened since the last call; waits for something to happen up to `timeout` seconds.

        Args:
            others: references for which it stops waiting too.
        """
        owners: dict[ray.ObjectRef[Any], Member] = {}
        for member in self.members:
            owners.update(dict.fromkeys(member.tasks if member.info else [member.hello], member))
        events: list[Event] = []
        dead: dict[Member, RayError] = {}
        for ref in self.calls.wait([*owners, *others], timeout):
            if ref not in owners or (member := owners[ref]).gone:
                continue
            try:
                result = self.calls.get(ref)
            except RayTaskError as error:
                self._explain(error)
                events += self._raised(member, ref, error) if member.info else [self._start_raised(member, error)]
            except GetTimeoutError:  # should it never come, its actor is silent
                continue
            except RayError as error:
                self.tracebacks.keep(error)
                dead[member] = error
            else:
                events.append(self._collect(member, ref, result) if member.info else self._greet(member, result))
        return (
            events + self._bury({member: error for member, error in dead.items() if not member.gone}) + self._silent()
        )

    def _explain(self, error: RayTaskError) -> None:
        """Keep a traceback. Raises WrongNetworkError: every actor would find the same."""
        if not isinstance(error.cause, HiddenError):
            self.tracebacks.keep(error)
        if isinstance(error.cause, WrongNetworkError):
            raise error.cause

    def _hear(self, lines: Iterable[str]) -> None:
        for line in lines:
            logger.warning("an actor printed: %s", line)

    def _greet(self, member: Member, info: WorkerInfo) -> Event:
        self._hear(info.said)
        member.info, member.node_id, member.since = info, info.node_id, self.calls.now()
        self.troubles.pop(member.node_id, None)
        return Ready(info)

    def _start_raised(self, member: Member, error: RayTaskError) -> Event:
        if isinstance(error.cause, HiddenError):
            member.hello = member.handle.start.remote(HIDDEN_S)
            return Waiting(reason_of(error))
        failed = self._fail_start(member, reason_of(error))
        return failed._replace(hopeless=isinstance(error.cause, OutOfDeviceMemoryError))

    def _fail_start(self, member: Member, reason: str, with_node: bool = False) -> StartFailed:
        """An actor did not start; if starts keep failing on its node, the next one there waits longer."""
        self.remove(member)
        now, trouble = self.calls.now(), self.troubles[member.node_id]
        trouble.add(member.since, now)
        pause = min(LONGEST_PAUSE_S, START_PAUSE_S * 2.0 ** min(trouble.length - 1, 10))
        self.no_start_before = max(self.no_start_before, now + pause)
        return StartFailed(reason, member.since, with_node)

    def _collect(self, member: Member, ref: Any, result: TaskResult) -> Event:
        self._hear(result.said)
        shard = member.tasks.pop(ref)
        self.shunned.pop(shard, None)
        now = self.calls.now()
        self.durations.append(now - member.last_result)
        member.work_begins(now)
        member.raised = 0
        if result.compute_s > 0:
            member.depth = min(MOST_IN_FLIGHT, 2 + int(result.upload_s / result.compute_s))
        return Finished(shard, result)

    def _raised(self, member: Member, ref: Any, raised: RayTaskError) -> list[Event]:
        shard, error = member.tasks.pop(ref), raised.cause
        member.work_begins(self.calls.now())
        if isinstance(error, NonFiniteError):
            self.shunned[shard] = member
        elif not isinstance(error, NoRoom):
            member.raised += 1
        events: list[Event] = [Failed(shard, error)]
        if member.raised >= BROKEN_AFTER:
            events.append(self._lose(member, f"{member.raised} shards in a row failed on it", died=False))
        return events

    def _lose(self, member: Member, reason: str, died: bool, node: str | None = None) -> Lost:
        self.remove(member)
        return Lost(list(member.tasks.values()), reason, died, node, member.since)

    def _bury(self, dead: dict[Member, RayError]) -> list[Event]:
        """Actors are gone: some by themselves, others with their nodes, which are asked all at once."""
        for member in dead:
            member.node_id = member.node_id or self.calls.place(member.hello)
        nodes = self.calls.dead({member.node_id for member in dead if member.node_id is not None})
        events: list[Event] = []
        for member, error in dead.items():
            fell = member.node_id in nodes
            if member.info:
                events.append(self._lose(member, reason_of(error), died=True, node=member.node_id if fell else None))
            else:
                events.append(self._fail_start(member, reason_of(error), fell or NEVER_RAN in str(error)))
        return events

    def _silent(self) -> list[Event]:
        """Give up actors that hang. Those that take long are asked how far they are, and get time while they get on."""
        events: list[Event] = []
        now = self.calls.now()
        # No limit is shorter, and a median for each shard that comes back would cost more than the rest.
        if all(now - member.last_sign <= self.shard_timeout / 4 for member in self.members):
            return events
        limit = max(self.shard_timeout, SILENCE_FACTOR * (self.median_s() or 0))
        for member in list(self.members):
            silence = now - member.last_sign
            if member.info and member.tasks:
                if silence > limit:
                    events.append(self._lose(member, f"no sign of progress for {limit:.0f} s", died=True))
                elif silence > limit / 4:
                    self._feel_pulse(member)
            elif member.node_id and not member.info and silence > max(START_S, START_FACTOR * limit):
                events.append(self._fail_start(member, f"no sign of it for {silence:.0f} s"))
        return events

    def _feel_pulse(self, member: Member) -> None:
        if member.pulse is None:
            member.pulse = member.handle.evaluations.remote()
        if not self.calls.wait([member.pulse], 0.0):
            return
        answer, member.pulse = member.pulse, None
        with suppress(RayError):  # its shards will say what is wrong with it
            if (evaluations := self.calls.get(answer)) != member.evaluations:
                member.evaluations, member.last_sign = evaluations, self.calls.now()


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line: of a long account by Ray its last sentence, of ours all."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, WorkerCrashedError):  # of which Ray says where it would look itself
        return "its process was killed, perhaps by the system for lack of memory"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    if not lines:
        return type(cause).__name__
    return lines[-1].partition(" Worker exit detail:")[0] if isinstance(cause, RayError) else " ".join(lines)
