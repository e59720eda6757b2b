"""An elastic set of actors: it grows as capacity comes, and says what finished, failed or was lost."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Container, Mapping, Set
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from ray_sampler.cluster.calls import Calls, RayCalls, reason_of
from ray_sampler.cluster.heard import Tracebacks, pass_on
from ray_sampler.cluster.members import (
    BROKEN_AFTER,
    SILENCE_FACTOR,
    START_FACTOR,
    START_S,
    STRAGGLER_FACTOR,
    Event,
    Failed,
    Finished,
    Lost,
    Member,
    Ready,
    Roster,
    StartFailed,
    Streak,
    Waiting,
    roster_of,
)
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import HiddenError, Task, TaskResult, WorkerInfo
from ray_sampler.sampling.engine import NonFiniteError, OutOfDeviceMemoryError
from ray_sampler.sampling.trial import WrongNetworkError
from ray_sampler.storage.retry import HIDDEN_S
from ray_sampler.storage.store import NoRoom

MOST_IN_FLIGHT = 8
"""Shards of one actor at once, however slow its uploads are: this bounds its memory."""

MOST_PENDING = 100
"""Actors that may wait for a machine at once, or as many as are ready if those are more: a queue of a million shards
is no reason to ask for a million machines."""

START_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""After a start that failed, others are asked for so much later: twice as long after each one in a row on a node."""

NEVER_RAN = "never ran"
"""What Ray 2.60 says of an actor that still waited at a node when that one died."""

LOOK_S = 1.0
"""Maximum seconds between searches for stragglers while there is none."""

LOOKS = 40
"""How often silent actors are looked for within the time after which an actor is silent."""


class Pool:
    """Actors that come and go.

    What it does for one shard takes the same time however many actors there are: they are gone through when one comes
    or goes, or once a second, and not for every shard that is given or comes back.

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
        self.owners: dict[ray.ObjectRef[Any], Member] = {}
        """Whose result each reference is: of ready actors those of their shards, of others that they are ready."""
        self.room: list[dict[Member, None]] = [{} for _ in range(MOST_IN_FLIGHT)]
        """Actors that may be given a shard, by the number that they have; who waits longest comes first."""
        self._roster: Roster | None = None
        """None when somebody came or went."""
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
        self.silence_due = self.straggler_due = 0.0
        """When silent actors and stragglers are looked for next."""

    def roster(self) -> Roster:
        if self._roster is None:
            self._roster = roster_of(self.members, self.draining)
        return self._roster

    @property
    def ready(self) -> list[Member]:
        return self.roster().ready

    def idle(self) -> list[Member]:
        """Actors that have nothing to do, and whose nodes are not about to go."""
        return list(self.room[0])

    def busy(self) -> int:
        """How many actors on nodes that stay have something to do."""
        return self.roster().at_work - len(self.room[0])

    def in_flight(self) -> int:
        return len(self.owners) - (len(self.members) - len(self.ready))

    def pending(self) -> int:
        """Actors that wait for a machine."""
        return self.roster().pending

    def unplaced_s(self) -> float:
        """Seconds for which actors were asked for and none had a process."""
        if not self.members or self.pending() < len(self.members):
            self.unplaced_since = self.calls.now()
        return self.calls.now() - self.unplaced_since

    def look_around(self) -> None:
        """Learn where actors are and which nodes are about to go; actors with nothing to do leave those."""
        draining = self.calls.draining()
        if draining != self.draining:
            self.draining, self._roster = draining, None
            for member in self.members:
                self._sort_in(member)
        starting = [member for member in self.members if not member.info]
        places = self.calls.places([member.hello for member in starting]) if starting else []
        for member, node_id in zip(starting, places, strict=True):
            if node_id != member.node_id:
                member.node_id, self._roster = node_id, None
                member.work_begins(self.calls.now())
        if self.draining:
            for member in [m for m in self.members if m.node_id in self.draining and not m.tasks]:
                self.remove(member)

    def median_s(self) -> float | None:
        """The median time from submission to result of recent shards, in seconds."""
        return statistics.median(self.durations) if self.durations else None

    def scale(self, wanted: int, keep: int) -> None:
        """Ask for actors until there are `wanted`, those that still start counted in; take back those beyond `keep`.

        Actors on nodes that are about to go do not count, so that others are asked for while they finish.
        """
        roster, now = self.roster(), self.calls.now()
        missing, surplus = wanted - len(roster.staying), len(roster.staying) - keep
        if missing > 0 and now >= self.no_start_before:
            for _ in range(min(missing, max(MOST_PENDING, len(roster.ready)) - roster.pending)):
                handle = self.start()
                member = Member(handle, handle.start.remote(), now)
                self.members.append(member)
                self.owners[member.hello] = member
                self._roster = None
        if surplus > 0 and roster.starting:
            for member in sorted(roster.starting, key=lambda member: member.node_id is not None)[:surplus]:
                self.remove(member)

    def remove(self, member: Member) -> None:
        """End an actor at once, and forget it."""
        self.members.remove(member)
        for ref in member.tasks if member.info else [member.hello]:
            del self.owners[ref]
        member.gone, self._roster = True, None
        self._sort_in(member)
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
        for busy, level in enumerate(self.room):
            for member in list(level) if level and self._worth(queue, alone, busy) else ():
                if self.shunned.get(queue[0]) is member:
                    queue.rotate(-1)  # it gets what comes next, unless it failed at that as well
                if self.shunned.get(queue[0]) is member:
                    continue
                if busy and alone and not alone.isdisjoint([queue[0], *member.tasks.values()]):
                    continue
                given.append(queue.popleft())
                self.submit(member, given[-1])
                if not self._worth(queue, alone, busy):
                    break
        if queue and (only := self.shunned.get(queue[0])) and not only.tasks:
            placed = [member for member in self.roster().staying if member.node_id is not None]
            if placed == [only]:
                self.remove(only)
        return given

    def _worth(self, queue: deque[Task], alone: Set[Task], busy: int) -> bool:
        """Whether an actor that has `busy` shards may be given the next one."""
        return bool(queue) and (not busy or (len(queue) >= self.roster().at_work and queue[0] not in alone))

    def submit(self, member: Member, task: Task) -> None:
        if not member.tasks:
            member.work_begins(self.calls.now())
        ref = member.handle.work.remote(list(task))
        member.tasks[ref] = task
        self.owners[ref] = member
        self._sort_in(member)

    def _sort_in(self, member: Member) -> None:
        """Keep `room` true of an actor whose shards, depth or node changed."""
        if member.level is not None:
            del self.room[member.level][member]
        busy = len(member.tasks)
        fits = member.info and not member.gone and busy < member.depth and member.node_id not in self.draining
        member.level = busy if fits else None
        if fits:
            self.room[busy][member] = None

    def straggler(self, copies: Mapping[Task, int], alone: Container[Task]) -> Task | None:
        """A shard that one actor alone has, and that takes long or waits behind another; none of `alone`.

        Args:
            copies: how many actors have each unfinished shard; one may still be at a shard that another finished.
        """
        now = self.calls.now()
        if now < self.straggler_due:
            return None
        median = self.median_s()
        for member in self.ready:
            late = median is not None and now - member.last_result > STRAGGLER_FACTOR * median
            if late or len(member.tasks) > 1:
                for position, shard in enumerate(member.tasks.values()):
                    if copies.get(shard) == 1 and shard not in alone and (late or position > 0):
                        return shard
        self.straggler_due = now + min(LOOK_S, (median or 0) / 4)
        return None

    def wait(self, timeout: float, others: Collection[Any] = ()) -> list[Event]:
        """What happened since the last call; waits for something to happen up to `timeout` seconds.

        Args:
            others: references for which it stops waiting too.
        """
        events: list[Event] = []
        dead: dict[Member, RayError] = {}
        for ref in self.calls.wait([*self.owners, *others] if others else self.owners, timeout):
            if (member := self.owners.get(ref)) is None:
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
        if dead:
            events += self._bury({member: error for member, error in dead.items() if not member.gone})
        return events + self._silent()

    def _explain(self, error: RayTaskError) -> None:
        """Keep a traceback. Raises WrongNetworkError: every actor would find the same."""
        if not isinstance(error.cause, HiddenError):
            self.tracebacks.keep(error)
        if isinstance(error.cause, WrongNetworkError):
            raise error.cause

    def _greet(self, member: Member, info: WorkerInfo) -> Event:
        pass_on(info.said)
        del self.owners[member.hello]
        member.info, member.node_id, member.since = info, info.node_id, self.calls.now()
        self._roster = None
        self._sort_in(member)
        self.troubles.pop(member.node_id, None)
        return Ready(info)

    def _start_raised(self, member: Member, error: RayTaskError) -> Event:
        if isinstance(error.cause, HiddenError):
            del self.owners[member.hello]
            member.hello = member.handle.start.remote(HIDDEN_S)
            self.owners[member.hello] = member
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
        pass_on(result.said)
        shard = self._take(member, ref)
        self.shunned.pop(shard, None)
        now = self.calls.now()
        self.durations.append(now - member.last_result)
        member.work_begins(now)
        member.raised = 0
        if result.compute_s > 0:
            member.depth = min(MOST_IN_FLIGHT, 2 + int(result.upload_s / result.compute_s))
        self._sort_in(member)
        return Finished(shard, result)

    def _take(self, member: Member, ref: Any) -> Task:
        """The shard of a reference, removed from the actor."""
        del self.owners[ref]
        return member.tasks.pop(ref)

    def _raised(self, member: Member, ref: Any, raised: RayTaskError) -> list[Event]:
        shard, error = self._take(member, ref), raised.cause
        member.work_begins(self.calls.now())
        self._sort_in(member)
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
        if now < self.silence_due:
            return events
        self.silence_due = now + self.shard_timeout / LOOKS
        # No limit is shorter than the timeout.
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
