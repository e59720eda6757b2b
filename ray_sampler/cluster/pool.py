"""An elastic set of actors: it grows as capacity comes, and says what finished, failed or was lost."""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Set
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import HiddenError, Task, TaskResult, WorkerInfo
from ray_sampler.sampling.engine import NonFiniteError, OutOfDeviceMemoryError
from ray_sampler.storage.retry import HIDDEN_S
from ray_sampler.storage.store import NoRoom

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

START_PAUSE_S = 1.0
"""After a start that failed, others are asked for so much later."""

NEVER_RAN = "never ran"
"""What Ray 2.60 says of an actor that still waited at a node when that one died."""

KNOCK_S = 0.5
"""Seconds in which a node that lives accepts a connection."""

BROKEN_AFTER = 2
"""Shards in a row that raise on an actor before it is replaced: its device may be broken, and theirs not the fault."""

STRAGGLER_FACTOR = 2
"""A shard straggles when it has taken so many times the median."""


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
    guilty: bool
    """Whether one of them may have killed it: its node lives."""


class Ready(NamedTuple):
    """An actor is ready for shards."""

    info: WorkerInfo


class Waiting(NamedTuple):
    """An actor waits for its output to show what the driver wrote."""

    reason: str


class StartFailed(NamedTuple):
    """An actor could not start."""

    reason: str
    guilty: bool
    """Whether it may be its own fault: its node lives."""
    hopeless: bool = False
    """Whether every other actor would fail as well: the run does not fit on its device."""


Event = Finished | Failed | Lost | Ready | Waiting | StartFailed


@dataclass
class Member:
    """An actor of the pool and what it is doing."""

    handle: Any
    hello: ray.ObjectRef[WorkerInfo]
    info: WorkerInfo | None = None
    """None until it is ready."""
    node_id: str | None = None
    """Where it is or starts; None while it waits for a machine."""
    tasks: dict[ray.ObjectRef[TaskResult], Task] = field(default_factory=dict)
    """In the order of submission."""
    depth: int = 2
    """Shards that it may have at once, so that one computes while others are written."""
    last_result: float = 0.0
    """When it last gave a result, or was given work while idle; seconds of the monotonic clock."""
    last_sign: float = 0.0
    """When it last gave a result, or showed that it had got on."""
    pulse: ray.ObjectRef[int] | None = None
    """Its answer to the question how far it is."""
    evaluations: int = 0
    """What it answered last."""
    raised: int = 0
    """Shards in a row that raised on it."""

    def work_begins(self) -> None:
        self.last_result = self.last_sign = time.monotonic()


class Pool:
    """Actors that come and go.

    Args:
        start: starts one actor and returns its handle.
        fleet: what an actor takes.
        shard_timeout: seconds without a result after which an actor counts as silent, at least.
    """

    def __init__(self, start: Callable[[], Any], fleet: Fleet, shard_timeout: float) -> None:
        self.start = start
        self.fleet = fleet
        self.shard_timeout = shard_timeout
        self.members: list[Member] = []
        self.draining: set[str] = set()
        """Ids of the nodes that are about to go."""
        self.durations: deque[float] = deque(maxlen=100)
        self.unplaced_since = time.monotonic()
        """When an actor had a process last, on the monotonic clock; before that, when the pool began."""
        self.start_failed = -START_PAUSE_S
        """When an actor failed to start last, on the monotonic clock."""

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.info]

    def idle(self) -> list[Member]:
        return [member for member in self.ready if not member.tasks]

    def in_flight(self) -> int:
        return sum(len(member.tasks) for member in self.members)

    def pending(self) -> int:
        """Actors that wait for a machine."""
        return sum(member.node_id is None for member in self.members)

    def unplaced_s(self) -> float:
        """Seconds for which actors were asked for and none had a process."""
        if not self.members or self.pending() < len(self.members):
            self.unplaced_since = time.monotonic()
        return time.monotonic() - self.unplaced_since

    def look_around(self) -> None:
        """Learn where actors are and which nodes are about to go; actors with nothing to do leave those."""
        self.draining = draining_nodes()
        for member in self.members:
            if not member.info and (node_id := place_of(member.handle._actor_id.hex())) != member.node_id:
                member.node_id = node_id
                member.work_begins()
        for member in [m for m in self.members if m.node_id in self.draining and not m.tasks]:
            self.remove(member)

    def median_s(self) -> float | None:
        """The median time from submission to result of recent shards, in seconds."""
        return statistics.median(self.durations) if self.durations else None

    def scale(self, wanted: int) -> None:
        """Ask for actors until there are `wanted`, those that still start counted in; take back surplus requests.

        Actors on nodes that are about to go do not count, so that others are asked for while they finish.
        """
        staying = [member for member in self.members if member.node_id not in self.draining]
        room = max(MOST_PENDING, len(self.ready)) - self.pending()
        if time.monotonic() < self.start_failed + START_PAUSE_S:
            room = 0
        for _ in range(min(wanted - len(staying), room)):
            handle = self.start()
            self.members.append(Member(handle, handle.start.remote()))
        starting = [member for member in staying if not member.info]
        starting.sort(key=lambda member: member.node_id is not None)
        for member in starting[: max(len(staying) - wanted, 0)]:
            self.remove(member)

    def remove(self, member: Member) -> None:
        """End an actor at once, and forget it."""
        self.members.remove(member)
        with suppress(RayError):  # one whose creation was cancelled is gone already
            ray.kill(member.handle)

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
        none waits behind another. The shards of `alone` share an actor with no other. Nodes that are about to go get
        no more.
        """
        given: list[Task] = []
        if not queue or not self.ready:
            return given
        members = [member for member in self.ready if member.node_id not in self.draining]
        for busy in range(max((member.depth for member in members), default=0)):
            for member in members:
                if not queue or (busy and len(queue) < len(members)):
                    return given
                if not len(member.tasks) == busy < member.depth:
                    continue
                if not (busy and alone) or alone.isdisjoint([queue[0], *member.tasks.values()]):
                    given.append(queue.popleft())
                    self.submit(member, given[-1])
        return given

    def submit(self, member: Member, task: Task) -> None:
        if not member.tasks:
            member.work_begins()
        member.tasks[member.handle.work.remote(list(task))] = task

    def straggler(self, unfinished: Container[Task]) -> Task | None:
        """A shard of `unfinished` that one actor alone has, and that takes long or waits behind another.

        An actor may still be at a shard that another one finished; that is no straggler.
        """
        median = self.median_s()
        copies = Counter(shard for member in self.members for shard in member.tasks.values())
        now = time.monotonic()
        for member in self.ready:
            late = median is not None and now - member.last_result > STRAGGLER_FACTOR * median
            for position, shard in enumerate(member.tasks.values()):
                if shard in unfinished and copies[shard] == 1 and (late or position > 0):
                    return shard
        return None

    def wait(self, timeout: float) -> list[Event]:
        """What happened since the last call; waits for something to happen up to `timeout` seconds."""
        owners: dict[ray.ObjectRef[Any], Member] = {}
        for member in self.members:
            owners.update(dict.fromkeys(member.tasks if member.info else [member.hello], member))
        if not owners:
            time.sleep(timeout)
            return []
        refs = list(owners)
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        if not done:
            done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        events: list[Event] = []
        for ref in done:
            if (member := owners[ref]) in self.members:
                events += self._collect(member, ref) if member.info else [self._greet(member)]
        return events + self._silent()

    def _greet(self, member: Member) -> Event:
        try:
            member.info = ray.get(member.hello)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, HiddenError):
                member.hello = member.handle.start.remote(HIDDEN_S)
                return Waiting(reason_of(error))
            self.remove(member)
            self.start_failed = time.monotonic()
            too_large = isinstance(error, RayTaskError) and isinstance(error.cause, OutOfDeviceMemoryError)
            return StartFailed(reason_of(error), not went_with_its_node(error, member), hopeless=too_large)
        member.node_id = member.info.node_id
        return Ready(member.info)

    def _collect(self, member: Member, ref: ray.ObjectRef[TaskResult]) -> list[Event]:
        try:
            result: TaskResult = ray.get(ref, timeout=60)
        except RayTaskError as error:
            return self._raised(member, member.tasks.pop(ref), error.cause)
        except (RayActorError, GetTimeoutError, RayError) as error:
            return [self._lose(member, reason_of(error), guilty=not went_with_its_node(error, member))]
        shard = member.tasks.pop(ref)
        self.durations.append(time.monotonic() - member.last_result)
        member.work_begins()
        member.raised = 0
        if result.compute_s > 0:
            member.depth = min(MOST_IN_FLIGHT, 2 + int(result.upload_s / result.compute_s))
        return [Finished(shard, result)]

    def _raised(self, member: Member, shard: Task, error: BaseException) -> list[Event]:
        member.work_begins()
        if not isinstance(error, NonFiniteError | NoRoom):
            member.raised += 1
        events: list[Event] = [Failed(shard, error)]
        if member.raised >= BROKEN_AFTER:
            events.append(self._lose(member, f"{member.raised} shards in a row failed on it", guilty=False))
        return events

    def _lose(self, member: Member, reason: str, guilty: bool) -> Lost:
        self.remove(member)
        return Lost(list(member.tasks.values()), reason, guilty)

    def _silent(self) -> list[Event]:
        """Give up actors that hang. Those that take long are asked how far they are, and get time while they get on."""
        events: list[Event] = []
        now = time.monotonic()
        # No limit is shorter, and a median for each shard that comes back would cost more than the rest.
        if all(now - member.last_sign <= self.shard_timeout / 4 for member in self.members):
            return events
        limit = max(self.shard_timeout, SILENCE_FACTOR * (self.median_s() or 0))
        for member in list(self.members):
            silence = now - member.last_sign
            if member.info and member.tasks:
                if silence > limit:
                    events.append(self._lose(member, f"no sign of progress for {limit:.0f} s", guilty=True))
                elif silence > limit / 4:
                    self._feel_pulse(member)
            elif member.node_id and not member.info and silence > max(START_S, START_FACTOR * limit):
                self.remove(member)
                events.append(StartFailed(f"no sign of it for {silence:.0f} s", guilty=True))
        return events

    def _feel_pulse(self, member: Member) -> None:
        if member.pulse is None:
            member.pulse = member.handle.evaluations.remote()
        if not ray.wait([member.pulse], timeout=0)[0]:
            return
        answer, member.pulse = member.pulse, None
        with suppress(RayError):  # what ails it, its shards will tell
            if (evaluations := ray.get(answer)) != member.evaluations:
                member.evaluations, member.last_sign = evaluations, time.monotonic()


def went_with_its_node(error: RayError, member: Member) -> bool:
    """Whether an actor is lost by no fault of its own.

    Ray 2.60 reports any death first as unavailability, and that of a node tens of seconds later; whether the node
    still listens tells at once.
    """
    if isinstance(error, GetTimeoutError) or NEVER_RAN in str(error):
        return True
    node_id = member.node_id or place_of(member.handle._actor_id.hex())
    node = next((node for node in ray.nodes() if node["NodeID"] == node_id), None)
    return node is not None and not (node["Alive"] and listens(node["NodeManagerAddress"], node["NodeManagerPort"]))


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), KNOCK_S).close()
    except OSError:
        return False
    return True


def place_of(actor_id: str) -> str | None:
    """The id of the node on which an actor has its resources and a process, None where it waits for them.

    In Ray 2.60 an actor that queues at a node has its address, but no process yet.
    """
    actor = cluster_state.actor_table(actor_id) or {}
    return actor["Address"]["NodeID"] if actor.get("Pid") else None


def draining_nodes() -> set[str]:
    """Ids of the nodes that Ray is about to take away. Private in Ray 2.60, and used nowhere else."""
    return set(cluster_state.get_draining_nodes())


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line: of a long account by Ray its last sentence, of ours all."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    if not lines:
        return type(cause).__name__
    return lines[-1].partition(" Worker exit detail:")[0] if isinstance(cause, RayError) else " ".join(lines)
