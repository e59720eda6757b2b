"""From missing shards to written fragments: the loop that keeps actors busy and lets none of them lose a sample."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ray_sampler.cluster.calls import reason_of
from ray_sampler.cluster.members import (
    ATTEMPTS,
    DEATHS_IN_A_ROW,
    FAILURES_IN_A_ROW,
    NON_FINITE_ATTEMPTS,
    NOTHING_BUT_NON_FINITE,
    START_FAILURES,
    Event,
    Failed,
    Finished,
    Lost,
    Member,
    Ready,
    StartFailed,
    Streak,
    Suspicion,
    Waiting,
)
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import shared, start_failure, why_unplaced, worker_starting
from ray_sampler.cluster.worker import IMAGES, Task, TaskResult
from ray_sampler.errors import RequestError, RunError, counted
from ray_sampler.reporting.progress import Rates, Reporter, Snapshot
from ray_sampler.reporting.summary import Timeline
from ray_sampler.sampling.engine import NonFiniteError, OutOfDeviceMemoryError
from ray_sampler.storage.store import NoRoom

REFUSED_S = 15.0
"""Seconds for which writing is retried where the output refuses it and no shard is finished: somebody may make room."""

IN_FLIGHT_PER_ACTOR = 2
"""Shards left for each actor that is asked for, at least: a start costs more than a shard is worth."""

TICK_S = 1.0

PLACE_S = 60.0
"""Seconds in which an actor has a process; it may still import, compile or load then."""

WORKER_START_S = 180.0
"""The same where Ray's worker process is there and not ready: a slow machine."""


def samples_in(tasks: Iterable[Task], product: str = IMAGES) -> int:
    """Samples that are computed by these tasks, or of which they make a product."""
    return sum(task.stop - task.start for task in tasks if task.product == product)


@dataclass
class Tally:
    """What the figures of one run are made of."""

    num_samples: int
    reused: int
    """Samples that earlier runs left, as far as they are not found damaged."""
    rates: Rates = field(default_factory=Rates)
    timeline: Timeline = field(default_factory=Timeline)
    failures: int = 0
    retries: int = 0
    max_actors: int = 0
    compute_s: float = 0.0
    """Seconds that devices computed finished shards."""
    idle_s: float = 0.0
    """Seconds that they had nothing to do between those."""
    first_shard: float | None = None
    """When the first shard was given to an actor, on the monotonic clock."""
    last_sample: float | None = None
    latest: Snapshot = field(default_factory=lambda: Snapshot(num_samples=0))
    """What was reported last."""


class Dispatch:
    """Tasks of one or several runs, on their way to actors and back.

    Args:
        pool: the actors.
        tasks: what to do, the most urgent first.
        tallies: counted into, one for each run.
        reporter: told about failures and progress.
        finished: called with each task and its result, once.
        background: called about once a second, while sampling runs; returns more tasks, of fragments found damaged.
            None says that it has nothing left to do.
        min_actors: kept until the last task is done.
        metrics: counted into.
        checks: what `background` waits for at present, as references; where nothing else is to be done, it is called
            when the first of them is there.
        on_ready: called once, when the first actor is ready, before it is given anything.
        counted: the product whose samples progress counts.
    """

    def __init__(
        self,
        pool: Pool,
        tasks: Iterable[Task],
        tallies: Sequence[Tally],
        reporter: Reporter,
        finished: Callable[[Task, TaskResult], None],
        background: Callable[[], list[Task] | None],
        min_actors: int,
        metrics: DriverMetrics,
        checks: Callable[[], Collection[Any]] = tuple,
        on_ready: Callable[[], None] | None = None,
        counted: str = IMAGES,
    ) -> None:
        self.pool, self.tallies = pool, tallies
        self.queue = deque(tasks)
        self.counted, self.stage = counted, "sampling" if counted == IMAGES else f"making {counted}"
        self.left = [samples_in((t for t in self.queue if t.run == run), counted) for run in range(len(tallies))]
        """Samples of each run that are not there yet."""
        self.rates = tallies[0].rates if len(tallies) == 1 else Rates()
        """Of all runs together."""
        self.reporter = reporter
        self.finished = finished
        self.background = background
        self.min_actors = min_actors
        self.metrics = metrics
        self.checks = checks
        self.on_ready = on_ready
        self.now = pool.calls.now
        self.copies: Counter[Task] = Counter()
        self.attempts: Counter[Task] = Counter()
        self.non_finite: Counter[Task] = Counter()
        self.suspects: dict[Task, Suspicion] = {}
        """Shards that were in flight when their actor or its node died."""
        self.shards_finished = 0
        self.start_failures = 0
        self.fallen = Streak()
        """Starts that failed because their nodes died, with none that did not between: those of one node are one."""
        self.deaths = Streak()
        """Actors that died, with no shard finished between."""
        self.failures_in_a_row = 0
        self.refused_since: float | None = None
        """When the output began to refuse writes."""
        self.given_up: dict[Task, str] = {}
        self.told_unplaced = False
        """Whether the user knows that no actor could be scheduled."""

    def run(self) -> dict[Task, str]:
        """Compute everything; returns the shards that were given up, with the reason.

        Raises:
            RunError: actors cannot start, or no batch fits on their device.
        """
        last_tick, more_to_come = self.now() - TICK_S, True
        while self.queue or self.copies or more_to_come:
            self._scale()
            for shard in self.pool.assign(self.queue, self.suspects.keys()):
                self._begin(shard)
            if not self.queue and (idle := self.pool.idle()):
                self._copy_straggler(idle[0])
            checks = () if self.queue or self.copies else self.checks()
            for event in self.pool.wait(TICK_S if self.queue or self.copies or checks else 0.05, checks):
                self._handle(event)
            ticks = self.now() - last_tick >= TICK_S
            if ticks:
                last_tick = self.now()
                self.pool.look_around()
                self._check_placement()
            if ticks or not (self.queue or self.copies):
                found = self.background()
                more_to_come = found is not None
                self.queue.extend(found or ())
                for task in found or ():
                    self.left[task.run] += samples_in([task], self.counted)
            if ticks:
                self._report()
        self._report()
        return self.given_up

    def _check_placement(self) -> None:
        """Report resources that no actor gets. Raises RunError: no other machine can join a local Ray."""
        unplaced_s, fleet = self.pool.unplaced_s(), self.pool.fleet
        if unplaced_s < PLACE_S:
            self.told_unplaced = False
        elif not fleet.local:
            if not self.told_unplaced:
                self.told_unplaced = True
                self.reporter.message(f"no actor has started in {unplaced_s:.0f} s: {why_unplaced(fleet)}", "warning")
        elif not shared() and (unplaced_s > WORKER_START_S or not worker_starting()):
            raise RunError(f"no actor has started on this machine in {unplaced_s:.0f} s: {why_unplaced(fleet)}")

    def _begin(self, shard: Task) -> None:
        now = self.now()
        tally = self.tallies[shard.run]
        tally.first_shard = tally.first_shard or now
        tally.rates.start(now)
        self.rates.start(now)
        self.copies[shard] += 1

    def _copy_straggler(self, member: Member) -> None:
        """Have an idle actor compute what takes long, unless it is a suspect, which might cost that actor too."""
        if straggler := self.pool.straggler(self.copies, self.suspects):
            self.pool.submit(member, straggler)
            self._begin(straggler)

    def _scale(self) -> None:
        """Ask for as many actors as the queue can use, and let those go that it cannot.

        Only actors that stay count, here as in the pool. Those that start are kept while each of them may get a shard;
        at the end of the queue no other ones are asked for.
        """
        queued, busy, most = len(self.queue), self.pool.busy(), self.pool.fleet.max_actors
        if queued:
            useful = max(-(-queued // IN_FLIGHT_PER_ACTOR), busy + queued // IN_FLIGHT_PER_ACTOR)
            wanted = min(most, max(useful, min(self.min_actors, queued + busy)))
            self.pool.scale(wanted, keep=max(wanted, min(most, queued + busy)))
            return
        self.pool.scale(0, keep=0)
        # One more than is busy, for a straggler's copy, or for a fragment that turns out to be damaged: the first
        # repair does not wait for a node, and the others do not keep theirs for hours in which files are read.
        self.pool.release_idle(keep=max(self.min_actors, len(self.copies) + 1))

    def _handle(self, event: Event) -> None:
        match event:
            case Ready():
                if self.on_ready:
                    self.on_ready()
                    self.on_ready = None
                self.start_failures, self.fallen = 0, Streak()
                for tally in self.tallies:
                    tally.max_actors = max(tally.max_actors, len(self.pool.ready))
            case Finished(shard, result):
                self.shards_finished += 1
                self.failures_in_a_row, self.deaths, self.refused_since = 0, Streak(), None
                self.suspects.pop(shard, None)
                if self.copies.pop(shard, 0):
                    self._count(shard)
                    self.finished(shard, result)
            case Failed(shard, error):
                self._failed(shard, error)
            case Lost():
                self._lost(event)
            case Waiting(reason):
                self.reporter.message(reason, "warning")
            case StartFailed():
                self._start_failed(event)

    def _lost(self, lost: Lost) -> None:
        """Take back the shards of an actor that is gone; those with which too much died are given up.

        Raises:
            RunError: one actor after another dies.
        """
        self._count_failure(lost.tasks)
        self.reporter.message(f"lost an actor; requeued {counted(len(lost.tasks), 'shard')}: {lost.reason}", "warning")
        if not lost.died:
            for shard in reversed(lost.tasks):
                self._return(shard, front=shard not in self.suspects, give_up=False)
            return
        for shard in lost.tasks:
            if shard in self.copies:
                given_up = self.suspects.setdefault(shard, Suspicion()).add(lost.node, self.shards_finished)
                self._return(shard, front=False, give_up=given_up and lost.reason)
        if lost.tasks:
            self.deaths.add(lost.since, self.now())
        if self.deaths.length >= DEATHS_IN_A_ROW:
            raise RunError(
                f"{DEATHS_IN_A_ROW} actors died one after another with no shard finished between, so the run stopped; "
                f"the last one: {lost.reason}"
            )

    def _start_failed(self, failed: StartFailed) -> None:
        """Raises RunError: actors do not start, and none is at work that could finish something."""
        if failed.hopeless:
            raise RunError(failed.reason)
        self._count_failure(())
        if failed.with_node:
            self.fallen.add(failed.since, self.now())
        else:
            self.start_failures += 1
        reason = start_failure(failed.reason, self.pool.fleet)
        self.reporter.message(f"an actor could not start: {reason}", "warning")
        failures = self.start_failures + self.fallen.length
        if not self.pool.ready and failures >= max(START_FAILURES, len(self.pool.members) - self.pool.pending()):
            raise RunError(f"{failures} actors in a row could not start; the last one said: {reason}")

    def _count(self, task: Task) -> None:
        """A task was finished for the first time."""
        samples, now, tally = samples_in([task], self.counted), self.now(), self.tallies[task.run]
        self.left[task.run] -= samples
        tally.last_sample = now
        tally.rates.add(now, samples)
        if self.rates is not tally.rates:
            self.rates.add(now, samples)

    def _count_failure(self, tasks: Iterable[Task]) -> None:
        """Something failed in the course of these tasks; of none, on behalf of all runs."""
        for run in {task.run for task in tasks} or range(len(self.tallies)):
            self.tallies[run].failures += 1

    def _nothing_finished(self) -> bool:
        return not any(tally.rates.done or tally.reused for tally in self.tallies)

    def _failed(self, shard: Task, error: BaseException) -> None:
        if isinstance(error, OutOfDeviceMemoryError):
            raise RunError(str(error)) from error
        self._count_failure([shard])
        reason = reason_of(error)
        if isinstance(error, NoRoom | RequestError):
            self._refused(shard, reason)
            return
        self.reporter.message(f"samples {shard.start} to {shard.stop - 1} failed: {reason}", "warning")
        if isinstance(error, NonFiniteError):
            self.non_finite[shard] += 1
            self._return(shard, front=False, give_up=self.non_finite[shard] >= NON_FINITE_ATTEMPTS and reason)
            failures = self.non_finite.total()
            if failures >= NOTHING_BUT_NON_FINITE and self._nothing_finished():
                raise RunError(f"shards failed {failures} times and none was finished, so the run stopped: {reason}")
            return
        self.attempts[shard] += 1
        self._return(shard, front=False, give_up=self.attempts[shard] >= ATTEMPTS and reason)
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= max(FAILURES_IN_A_ROW, len(self.pool.ready)):
            often = f"{self.failures_in_a_row} times with no shard finished between, so the run stopped"
            where = f"the last time at samples {shard.start} to {shard.stop - 1}"
            raise RunError(f"sampling failed {often}; {where}: {reason}")

    def _refused(self, shard: Task, reason: str) -> None:
        """The output refused a fragment, as it would any: no shard is blamed. Raises RunError: it did for long."""
        now = self.now()
        if self.refused_since is None:
            self.refused_since = now
            shown = f"samples {shard.start} to {shard.stop - 1} could not be written"
            self.reporter.message(f"{shown}; retrying for {REFUSED_S:.0f} s: {reason}", "warning")
        elif now - self.refused_since >= REFUSED_S:
            raise RunError(reason)
        self._return(shard, front=False, give_up=False)

    def _return(self, shard: Task, *, front: bool, give_up: str | bool) -> None:
        """Take back a copy of a shard, and queue it again if that was the last and it was not finished meanwhile."""
        if shard not in self.copies:
            return
        self.copies[shard] -= 1
        if self.copies[shard]:
            return
        del self.copies[shard]
        if give_up:
            self.given_up[shard] = str(give_up)
            self.suspects.pop(shard, None)
            return
        self.tallies[shard.run].retries += 1
        self.metrics.retries.inc()
        if front:
            self.queue.appendleft(shard)
        else:
            self.queue.append(shard)

    def _report(self) -> None:
        now = self.now()
        tallies, rates, ready = self.tallies, self.rates, len(self.pool.ready)
        for tally, left in zip(tallies, self.left, strict=True):
            tally.reused = max(0, tally.num_samples - left - tally.rates.done)
        num_samples, reused = sum(tally.num_samples for tally in tallies), sum(tally.reused for tally in tallies)
        pending = self.pool.pending()
        waiting = self.queue and not ready and pending
        snapshot = Snapshot(
            num_samples=num_samples,
            reused=reused,
            done=num_samples - sum(self.left) - reused,
            shards_in_flight=self.pool.in_flight(),
            actors_ready=ready,
            actors_starting=len(self.pool.members) - ready - pending,
            actors_pending=pending,
            failures=max(tally.failures for tally in tallies),
            stage=self.stage if ready else "waiting for capacity" if waiting else "starting",
            elapsed_s=rates.elapsed_s(now),
            rate_now=rates.rate_now(now),
            rate=rates.rate(now),
        )
        self.metrics.fleet(snapshot.actors_ready, snapshot.actors_starting, snapshot.actors_pending)
        for tally in tallies:
            tally.timeline.add(snapshot.elapsed_s, snapshot.rate_now, ready)
            tally.latest = snapshot
        self.reporter.update(snapshot)
