"""An elastic set of actors: it grows as capacity comes, and says what finished, failed or was lost."""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ray_sampler.cluster.actor import ActorInfo, ShardResult
from ray_sampler.cluster.session import Fleet

MOST_IN_FLIGHT = 8
"""Shards of one actor at once, however slow its uploads are: this bounds its memory."""

SILENCE_FACTOR = 10
"""An actor is silent when it gave no result for so many times the median shard, and for the timeout at least."""

STRAGGLER_FACTOR = 2
"""A shard straggles when it has taken so many times the median."""


class Shard(NamedTuple):
    """Samples [start, stop), the content of one fragment."""

    start: int
    stop: int


class Finished(NamedTuple):
    """An actor wrote a shard's fragment."""

    shard: Shard
    result: ShardResult


class Failed(NamedTuple):
    """A shard raised by itself, on an actor that is well."""

    shard: Shard
    error: BaseException


class Lost(NamedTuple):
    """An actor is gone, and with it these shards, that it was computing first."""

    shards: list[Shard]
    reason: str
    guilty: bool
    """Whether the first shard may have killed it: it was computing, and its node lives."""


class Ready(NamedTuple):
    """An actor is ready for shards."""

    info: ActorInfo


class StartFailed(NamedTuple):
    """An actor could not start."""

    reason: str


Event = Finished | Failed | Lost | Ready | StartFailed


@dataclass
class Member:
    """An actor of the pool and what it is doing."""

    handle: Any
    hello: ray.ObjectRef[ActorInfo]
    info: ActorInfo | None = None
    """None until it is ready."""
    tasks: dict[ray.ObjectRef[ShardResult], Shard] = field(default_factory=dict)
    """In the order of submission."""
    depth: int = 2
    """Shards that it may have at once, so that one computes while others are written."""
    last_sign: float = 0.0
    """When it last gave a result, or was given work while idle; seconds of the monotonic clock."""


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
        self.durations: deque[float] = deque(maxlen=100)

    @property
    def ready(self) -> list[Member]:
        return [member for member in self.members if member.info]

    def idle(self) -> list[Member]:
        return [member for member in self.ready if not member.tasks]

    def in_flight(self) -> int:
        return sum(len(member.tasks) for member in self.members)

    def pending(self) -> int:
        """Actors that wait for a machine. Ray 2.60 gives an actor's address only once it has its resources."""
        waiting = [member for member in self.members if not member.info]
        if not waiting:
            return 0
        placed = {
            actor_id: bool(actor["Address"]["IPAddress"]) or actor["State"] == "ALIVE"
            for actor_id, actor in cluster_state.actor_table(None).items()
        }
        return sum(not placed.get(member.handle._actor_id.hex(), False) for member in waiting)

    def median_s(self) -> float | None:
        """The median time from submission to result of recent shards, in seconds."""
        return statistics.median(self.durations) if self.durations else None

    def scale(self, wanted: int) -> None:
        """Ask for actors until there are `wanted`, those that still start counted in; take back surplus requests."""
        for _ in range(len(self.members), wanted):
            handle = self.start()
            self.members.append(Member(handle, handle.start.remote(), last_sign=time.monotonic()))
        surplus = len(self.members) - wanted
        for member in [m for m in self.members if not m.info][: max(surplus, 0)]:
            self.remove(member)

    def remove(self, member: Member) -> None:
        """End an actor at once, and forget it."""
        self.members.remove(member)
        ray.kill(member.handle)

    def release_idle(self, keep: int) -> None:
        """End idle actors as long as more than `keep` actors are left, so that their nodes can go."""
        for member in self.idle()[: max(0, len(self.members) - keep)]:
            self.remove(member)

    def close(self) -> None:
        for member in list(self.members):
            self.remove(member)

    def assign(self, queue: deque[Shard]) -> list[Shard]:
        """Give shards from the front of `queue` to the least busy actors that have room; returns those given.

        While the queue is long an actor has a second shard waiting; near its end it takes one at a time, so that
        none waits behind another. Nodes that are about to go get no more.
        """
        given: list[Shard] = []
        if not queue or not self.ready:
            return given
        draining = draining_nodes()
        members = [m for m in self.ready if m.info and m.info.node_id not in draining]
        for busy in range(MOST_IN_FLIGHT):
            for member in members:
                if not queue or (busy and len(queue) < len(members)):
                    return given
                if len(member.tasks) == busy < member.depth:
                    given.append(queue.popleft())
                    self.submit(member, given[-1])
        return given

    def submit(self, member: Member, shard: Shard) -> None:
        if not member.tasks:
            member.last_sign = time.monotonic()
        member.tasks[member.handle.sample.remote(shard.start, shard.stop)] = shard

    def straggler(self, unfinished: Container[Shard]) -> Shard | None:
        """A shard of `unfinished` that one actor alone has, and that takes long or waits behind another.

        An actor may still be at a shard that another one finished; that is no straggler.
        """
        median = self.median_s()
        copies = Counter(shard for member in self.members for shard in member.tasks.values())
        now = time.monotonic()
        for member in self.ready:
            late = median is not None and now - member.last_sign > STRAGGLER_FACTOR * median
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
        done, _ = ray.wait(refs, num_returns=1, timeout=timeout)
        if done:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        events: list[Event] = []
        for ref in done:
            if owners[ref] in self.members:
                events.append(self._greet(owners[ref]) if not owners[ref].info else self._collect(owners[ref], ref))
        return events + self._silent()

    def _greet(self, member: Member) -> Event:
        try:
            member.info = ray.get(member.hello)
        except RayError as error:
            self.remove(member)
            return StartFailed(reason_of(error))
        return Ready(member.info)

    def _collect(self, member: Member, ref: ray.ObjectRef[ShardResult]) -> Event:
        try:
            result: ShardResult = ray.get(ref, timeout=60)
        except RayTaskError as error:
            member.last_sign = time.monotonic()
            return Failed(member.tasks.pop(ref), error.cause)
        except (RayActorError, GetTimeoutError, RayError) as error:
            return self._lose(member, reason_of(error), guilty=not is_unavailable(error) and node_lives(member))
        shard = member.tasks.pop(ref)
        now = time.monotonic()
        self.durations.append(now - member.last_sign)
        member.last_sign = now
        if result.compute_s > 0:
            member.depth = min(MOST_IN_FLIGHT, 2 + int(result.upload_s / result.compute_s))
        return Finished(shard, result)

    def _lose(self, member: Member, reason: str, guilty: bool) -> Lost:
        self.remove(member)
        return Lost(list(member.tasks.values()), reason, guilty)

    def _silent(self) -> list[Event]:
        limit = max(self.shard_timeout, SILENCE_FACTOR * (self.median_s() or 0))
        now = time.monotonic()
        silent = [m for m in self.ready if m.tasks and now - m.last_sign > limit]
        return [self._lose(m, f"no result for {limit:.0f} s", guilty=True) for m in silent]


def is_unavailable(error: BaseException) -> bool:
    """Whether an actor is only out of reach: what Ray reports first when a node is lost."""
    return isinstance(error, ray.exceptions.ActorUnavailableError | GetTimeoutError)


def node_lives(member: Member) -> bool:
    assert member.info
    return any(node["NodeID"] == member.info.node_id and node["Alive"] for node in ray.nodes())


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
