"""From missing shards to written fragments: the loop that keeps actors busy and lets none of them lose a sample."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Failed, Finished, Lost, Pool, Ready, StartFailed, Waiting, reason_of
from ray_sampler.cluster.session import shared, start_failure, why_unplaced, worker_starting
from ray_sampler.cluster.worker import IMAGES, Task, TaskResult
from ray_sampler.errors import RequestError, RunError
from ray_sampler.reporting.progress import Rates, Reporter, Snapshot
from ray_sampler.reporting.summary import Timeline
from ray_sampler.sampling.engine import NonFiniteError, OutOfDeviceMemoryError
from ray_sampler.storage.store import NoRoom

ATTEMPTS = 3
"""Times that a shard may fail by itself before it is given up."""

DEATHS = 5
"""Actors that may die with one shard before it is given up. From the first death on it has actors to itself, so that
no other shard is blamed."""

START_FAILURES = 3
"""Actors in a row that may fail to start, with no shard finished between, before the run stops."""

FAILURES_IN_A_ROW = 12
"""Failures, with no shard finished between, at which the run stops: the cause is none of the shards', but perhaps a
bucket that takes nothing any more."""

REFUSED_S = 15.0
"""Seconds for which writing is retried where the output refuses it and no shard is finished: somebody may make room."""

NOTHING_BUT_NON_FINITE = 25
"""Shards given up, with none ever finished, at which the run stops: the model gives nothing else."""

SHARDS_PER_ACTOR = 2
"""Shards left for each actor that is asked for, at least: a start costs more than a shard is worth."""

TICK_S = 1.0

PLACE_S = 60.0
"""Seconds in which an actor has a process; it may still import, compile or load then."""

WORKER_START_S = 180.0
"""The same where Ray's worker process is there and not ready: a slow machine."""


def tasks_of(
    missing: Iterable[tuple[int, int]],
    shard_size: int,
    run: int = 0,
    product: str = IMAGES,
    early: int = 0,
    early_size: int = 1,
) -> Iterator[Task]:
    """Cut missing ranges at the multiples of `shard_size`; the `early` first tasks at those of `early_size`.

    As many more are at most twice as large, and so on, so that a run soon shows whether it works and how fast it is,
    and never goes silent for much longer than before.
    """
    size, made = early_size if early else shard_size, 0
    for start, stop in missing:
        while start < stop:
            end = min(stop, *((start // each + 1) * each for each in (size, shard_size)))
            yield Task(run, start, end, product)
            start, made = end, made + 1
            if size < shard_size and made % early == 0:
                size = min(shard_size, 2 * size)


def samples_in(tasks: Iterable[Task]) -> int:
    """Samples that are computed by these tasks."""
    return sum(task.stop - task.start for task in tasks if task.product == IMAGES)


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
    ) -> None:
        self.pool = pool
        self.queue = deque(tasks)
        self.tallies = tallies
        self.left = [samples_in(task for task in self.queue if task.run == run) for run in range(len(tallies))]
        """Samples of each run that are not there yet."""
        self.rates = tallies[0].rates if len(tallies) == 1 else Rates()
        """Of all runs together."""
        self.reporter = reporter
        self.finished = finished
        self.background = background
        self.min_actors = min_actors
        self.metrics = metrics
        self.copies: Counter[Task] = Counter()
        self.attempts: Counter[Task] = Counter()
        self.deaths: Counter[Task] = Counter()
        self.start_failures = 0
        self.failures_in_a_row = 0
        self.refused_since: float | None = None
        """When the output began to refuse writes, on the monotonic clock."""
        self.given_up: dict[Task, str] = {}
        self.told_unplaced = False
        """Whether the user knows that no actor has a place."""

    def run(self) -> dict[Task, str]:
        """Compute everything; returns the shards that were given up, with the reason.

        Raises:
            RunError: actors cannot start, or no batch fits on their device.
        """
        last_tick, more_to_come = 0.0, True
        while self.queue or self.copies or more_to_come:
            self._scale()
            for shard in self.pool.assign(self.queue, self.deaths.keys()):
                self._begin(shard)
            if not self.queue and self.pool.idle() and (straggler := self.pool.straggler(self.copies)):
                self.pool.submit(self.pool.idle()[0], straggler)
                self._begin(straggler)
            for event in self.pool.wait(TICK_S if self.queue or self.copies else 0.05):
                self._handle(event)
            if time.monotonic() - last_tick >= TICK_S or not (self.queue or self.copies):
                last_tick = time.monotonic()
                self.pool.look_around()
                self._check_placement()
                found = self.background()
                more_to_come = found is not None
                self.queue.extend(found or ())
                for task in found or ():
                    self.left[task.run] += samples_in([task])
                self._report()
        self._report()
        return self.given_up

    def _check_placement(self) -> None:
        """Say what no actor gets; no other machine will come to a Ray of our own, so the run stops there.

        Raises:
            RunError: it does.
        """
        unplaced_s, fleet = self.pool.unplaced_s(), self.pool.fleet
        if unplaced_s < PLACE_S:
            self.told_unplaced = False
        elif not fleet.local:
            if not self.told_unplaced:
                self.told_unplaced = True
                self.reporter.message(f"no actor has a place in {unplaced_s:.0f} s: {why_unplaced(fleet)}", "warning")
        elif not shared() and (unplaced_s > WORKER_START_S or not worker_starting()):
            raise RunError(f"no actor has started on this machine in {unplaced_s:.0f} s: {why_unplaced(fleet)}")

    def _begin(self, shard: Task) -> None:
        now = time.monotonic()
        tally = self.tallies[shard.run]
        tally.first_shard = tally.first_shard or now
        tally.rates.start(now)
        self.rates.start(now)
        self.copies[shard] += 1

    def _scale(self) -> None:
        left = len(self.queue) + len(self.copies)
        useful = -(-len(self.queue) // SHARDS_PER_ACTOR) + len(self.copies) if self.queue else len(self.pool.ready)
        wanted = min(self.pool.fleet.max_actors, max(useful, min(self.min_actors, left)))
        self.pool.scale(wanted)
        if not self.queue and self.copies:
            self.pool.release_idle(keep=max(self.min_actors, len(self.copies) + 1))

    def _handle(self, event: object) -> None:
        match event:
            case Ready():
                self.start_failures = 0
                for tally in self.tallies:
                    tally.max_actors = max(tally.max_actors, len(self.pool.ready))
            case Finished(shard, result):
                self.start_failures = self.failures_in_a_row = 0
                self.refused_since = None
                if self.copies.pop(shard, 0):
                    self._count(shard)
                    self.finished(shard, result)
            case Failed(shard, error):
                self._failed(shard, error)
            case Lost(shards, reason, guilty):
                self._count_failure(shards)
                self.reporter.message(f"lost an actor; its {len(shards)} shards go to others: {reason}", "warning")
                if guilty:
                    self.deaths.update(shards)
                for shard in reversed(shards):
                    self._return(shard, front=True, give_up=self.deaths[shard] >= DEATHS and reason)
            case Waiting(reason):
                self.reporter.message(reason, "warning")
            case StartFailed(reason, guilty, hopeless):
                if hopeless:
                    raise RunError(reason)
                self._count_failure(())
                self.start_failures += guilty or self.pool.fleet.local  # where no other node will take it
                reason = start_failure(reason, self.pool.fleet)
                self.reporter.message(f"an actor could not start: {reason}", "warning")
                if self.start_failures >= START_FAILURES:
                    raise RunError(f"{START_FAILURES} actors in a row could not start; the last one said: {reason}")

    def _count(self, task: Task) -> None:
        """A task was finished for the first time."""
        samples, now, tally = samples_in([task]), time.monotonic(), self.tallies[task.run]
        self.left[task.run] -= samples
        tally.last_sample = now
        for rates in {id(tally.rates): tally.rates, id(self.rates): self.rates}.values():
            rates.add(now, samples)

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
        self.attempts[shard] += 1
        hopeless = isinstance(error, NonFiniteError)
        self.reporter.message(f"samples {shard.start} to {shard.stop - 1} failed: {reason}", "warning")
        self._return(shard, front=False, give_up=(hopeless or self.attempts[shard] >= ATTEMPTS) and reason)
        self.failures_in_a_row += not isinstance(error, NonFiniteError)
        if self.failures_in_a_row >= FAILURES_IN_A_ROW:
            raise RunError(
                f"sampling failed {FAILURES_IN_A_ROW} times with no shard finished between, so the run stopped; "
                f"the last time at samples {shard.start} to {shard.stop - 1}: {reason}"
            )
        if len(self.given_up) >= NOTHING_BUT_NON_FINITE and self._nothing_finished():
            raise RunError(f"{len(self.given_up)} shards failed and none was finished, so the run stopped: {reason}")

    def _refused(self, shard: Task, reason: str) -> None:
        """The output refused a fragment, as it would refuse any other: no shard is given up for that.

        Raises:
            RunError: it has been so for long.
        """
        now = time.monotonic()
        if self.refused_since is None:
            self.refused_since = now
            shown = f"samples {shard.start} to {shard.stop - 1} failed, and others would as well"
            self.reporter.message(f"{shown}; tried again for {REFUSED_S:.0f} s: {reason}", "warning")
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
            return
        self.tallies[shard.run].retries += 1
        self.metrics.retries.inc()
        if front:
            self.queue.appendleft(shard)
        else:
            self.queue.append(shard)

    def _report(self) -> None:
        now = time.monotonic()
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
            stage="sampling" if ready else "waiting for capacity" if waiting else "starting",
            elapsed_s=rates.elapsed_s(now),
            rate_now=rates.rate_now(now),
            rate=rates.rate(now),
        )
        self.metrics.fleet(snapshot.actors_ready, snapshot.actors_starting, snapshot.actors_pending)
        for tally in tallies:
            tally.timeline.add(snapshot.elapsed_s, snapshot.rate_now, ready)
            tally.latest = snapshot
        self.reporter.update(snapshot)
