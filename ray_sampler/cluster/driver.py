"""The driver: plan what is missing, dispatch it to actors, reduce the fragments to archives; for one run or several."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import ray

from ray_sampler.cluster.actors import actors, own_ray
from ray_sampler.cluster.calls import reason_of
from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.inventory import Inventory, complete, only_to_merge
from ray_sampler.cluster.job import Job, claim, prepare, record_code, still_ours, tried
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.outcome import already_done, merge, write_outcome
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.scoring import scored_run, standing_scores
from ray_sampler.cluster.session import Fleet, beside_driver, joined, plan_fleet
from ray_sampler.cluster.shards import padding
from ray_sampler.cluster.shipping import Shipped, send_by_value, ship
from ray_sampler.cluster.tasks import show_task
from ray_sampler.cluster.worker import Loaded, RunSpec, Task, TaskResult
from ray_sampler.config import RunConfig
from ray_sampler.errors import RunError, counted, require
from ray_sampler.options import of
from ray_sampler.planning import advice
from ray_sampler.reporting.options import ReportingOptions
from ray_sampler.reporting.progress import Reporter, reporter
from ray_sampler.reporting.scores import described
from ray_sampler.reporting.sheet import PREVIEW, PreviewKeeper, Tile
from ray_sampler.resolve import dry_run, given_values, settings_json
from ray_sampler.sampling.decoding import DECODER
from ray_sampler.sampling.numerics import compiles
from ray_sampler.sampling.plan import GUIDE, MAIN
from ray_sampler.sampling.stepping import unused_options
from ray_sampler.scoring.features import FEATURES
from ray_sampler.scoring.scores import network_of
from ray_sampler.storage.archive import DamagedPiece
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import REPORT

REPAIR_ROUNDS = 5
"""Times that the merge may find a damaged fragment and have it sampled again."""

LOOK_S = 0.2


Summary = dict[str, Any]
"""The content of summary.json."""


class RunResult(NamedTuple):
    """A finished run."""

    archive: str
    """Path or URL of the archive."""
    summary: dict[str, Any]
    """The content of summary.json; of a dry run, every setting under its flag's name."""

    def __repr__(self) -> str:
        return f"RunResult(archive={self.archive!r}, num_samples={self.summary['num_samples']})"

    @property
    def report(self) -> str:
        """Path or URL of report.html."""
        return f"{self.archive.rpartition('/')[0]}/{REPORT}"

    @property
    def preview(self) -> str:
        """Path or URL of preview.png."""
        return f"{self.archive.rpartition('/')[0]}/{PREVIEW}"


def run(config: RunConfig) -> RunResult:
    """Carry out a request, as `ray_sampler.run` describes."""
    require(isinstance(config, RunConfig), f"run takes a RunConfig, not {config!r}; give run(RunConfig(...))")
    if config.dry_run:
        return RunResult("", dry_run(config))
    began = time.monotonic()
    shown = of(ReportingOptions, config)
    with reporter(shown.progress, shown.json_log) as report, joined(config.address):
        result = drive([prepare(config)], report, began)[0]
        for path in (result.archive, result.report, result.preview):
            report.message(f"  {path}")
        return result


def drive(jobs: Sequence[Job], report: Reporter, began: float | None = None) -> list[RunResult]:
    """Fill the archives of several jobs; those whose actors hold the same networks share one pool.

    Jobs that come first are served first. Where no Ray is connected, one is started on this machine.

    Args:
        began: when the driver started, on the monotonic clock; now unless given.

    Raises:
        RequestError: a directory was taken by another run meanwhile.
        RunError: a job failed or is incomplete; finished samples, of it and of the others, are kept.
    """
    began = time.monotonic() if began is None else began
    results: dict[int, RunResult] = {}
    done: dict[int, Summary] = {}
    untried: set[int] = set()
    for number, job in enumerate(jobs):
        summary = already_done(job)
        whole = summary is not None and complete(job)
        warnings = [] if summary is not None else tried(job)
        if not job.overwrite:
            claim(job)
        announce(job, report)
        if summary is not None:
            done[number] = summary
            if whole and (job.scoring is None or (scores := standing_scores(job))):
                report.message("the archive is complete already")
                if job.scoring and scores:
                    report.message(described(scores))
                results[number] = result_of(job, summary)
        for warning in (*(warnings or ()), *(record_code(job) if summary is None else ())):
            report.message(warning, "warning")
        untried |= {number} if warnings is None else set()
    groups: dict[Any, list[int]] = {}
    for number, job in enumerate(jobs):
        if number in results:
            continue
        merged = Filling([job], [None], report, began).merge_here() if only_to_merge(job) else None
        if merged:
            results[number] = merged
        else:
            groups.setdefault(job.loads(), []).append(number)
    if groups:
        with own_ray(report, jobs[0].local):
            for numbers in groups.values():
                group = [jobs[number] for number in numbers]
                tries = untried.isdisjoint(numbers)
                filled = Filling(group, [done.get(number) for number in numbers], report, began, tries).run()
                results |= dict(zip(numbers, filled, strict=True))
    return [results[number] for number in range(len(jobs))]


def announce(job: Job, report: Reporter) -> None:
    report.message(f"run {job.fingerprint[:8]} in {job.run_dir.url}")
    for role, network in job.networks.items():
        if network.note:
            flag = "guide" if role == GUIDE else "decoder"
            report.message(network.note if role == MAIN else f"of --{flag}: {network.note}")
    plan = job.plan
    if plan.schedule.nfe is not None:
        report.message(f"--nfe: {plan.sampler} takes {plan.schedule.steps} steps, {plan.evaluations()} evaluations")
    for note in job.notes:
        report.message(note)
    unused = unused_options(plan.sampler, given_values(job.config))
    for warning in (*advice(plan), *filter(None, [unused])):
        report.message(warning, "warning")
    if not (job.local or job.gpus or job.config.gpus_per_actor == 0):
        report.message(
            "the cluster has no GPU now, so actors take CPUs; if GPU nodes come on demand, give --gpus_per_actor 1",
            "warning",
        )


def result_of(job: Job, summary: dict[str, Any]) -> RunResult:
    return RunResult(job.run_dir.path_of(summary["archive"]["name"]), summary)


class Filling:
    """Jobs that share a pool, on their way from what is missing to their archives."""

    def __init__(
        self,
        jobs: Sequence[Job],
        done: Sequence[Summary | None],
        report: Reporter,
        began: float,
        tried: bool = True,
    ) -> None:
        self.jobs = jobs
        self.done = done
        """The summaries of those with complete archives."""
        self.tried = tried
        """Whether the user's networks among theirs have been called once."""
        self.report = report
        self.began = began
        self.inventories = [Inventory(job, report, run) for run, job in enumerate(jobs)]
        self.tallies = [
            Tally(job.num_samples, reused=job.num_samples - sum(stop - start for start, stop in inventory.missing()))
            for job, inventory in zip(jobs, self.inventories, strict=True)
        ]
        self.closing = Event()
        self.previews = [
            PreviewKeeper(
                job.run_dir,
                job.fingerprint,
                job.num_samples,
                settings_json(job.config),
                inventory.fragments.names,
                partial(tiles_of_task, job, self.closing),
            )
            for job, inventory in zip(jobs, self.inventories, strict=True)
        ]
        self.unclaimed = [job for job in jobs if job.overwrite]
        """Those whose directories may still hold an older run."""
        self.merge_s = [0.0] * len(jobs)
        self.shipped: dict[str, Shipped] = {}
        """The networks, once they are in the object store."""

    def run(self) -> list[RunResult]:
        """Sample what is missing and merge, until every archive is complete.

        Raises:
            RunError: one does not; those that can be finished are.
        """
        if any(i.missing() for i in self.inventories) and compiles(self.jobs[0].compile, self.jobs[0].gpus > 0):
            self.report.message("each actor compiles the network before its first shard, which takes a minute or more")
        for job, inventory in zip(self.jobs, self.inventories, strict=True):
            gaps, num_samples = inventory.missing(), job.num_samples
            if gaps and gaps[-1][1] == num_samples and (note := padding(num_samples, job.config.batch_size)):
                self.report.message(note, "warning")
        results: dict[int, RunResult] = {}
        try:
            for _ in range(REPAIR_ROUNDS + 1):
                todo = [run for run in range(len(self.jobs)) if run not in results]
                failure = self._sample([task for run in todo for task in self.inventories[run].tasks()], todo)
                failure = self._sample_products(todo) or failure
                for run in todo:
                    if not self.inventories[run].missing() and (result := self._finish(run)):
                        results[run] = result
                if failure:
                    raise failure
                if len(results) == len(self.jobs):
                    return [results[run] for run in range(len(self.jobs))]
            urls = ", ".join(job.run_dir.url for run, job in enumerate(self.jobs) if run not in results)
            raise RunError(
                f"fragments in {urls} kept failing their checks through {REPAIR_ROUNDS} repairs; "
                "check the storage, then run the same command again"
            )
        finally:
            self.closing.set()
            for preview in self.previews:
                preview.close()

    def merge_here(self) -> RunResult | None:
        """Merge the only run in this process, without Ray; None where a fragment is damaged."""
        return self._finish(0, here=True) if self.inventories[0].check_here() else None

    def _sample(self, tasks: list[Task], runs: Iterable[int], generate: bool = True) -> RunError | None:
        """Carry out tasks, and check the fragments of `runs` meanwhile; returns what could not be done."""
        if not tasks and not any(self.inventories[run].unchecked() for run in runs):
            return None
        with self._pool(len(tasks) or 1, generate) as pool:
            return self._dispatch(pool, tasks)

    def _sample_products(self, runs: Iterable[int]) -> RunError | None:
        """Make what the runs' other products lack, of pictures that earlier starts left."""
        tasks = [
            task
            for run in runs
            if not self.inventories[run].missing()
            for task in self.inventories[run].products_to_make()
        ]
        return self._sample(tasks, (), generate=False)

    def _dispatch(self, pool: Pool, tasks: list[Task]) -> RunError | None:
        def finished(task: Task, result: TaskResult) -> None:
            self.inventories[task.run].add(result.name, result.record, task.product)
            tally = self.tallies[task.run]
            tally.compute_s, tally.idle_s = tally.compute_s + result.compute_s, tally.idle_s + result.wait_s

        def background() -> list[Task] | None:
            for preview in self.previews:
                preview.redraw_when_due()
            found = [inventory.check_some() for inventory in self.inventories]
            return None if all(f is None for f in found) else [task for f in found for task in f or ()]

        def claim_rest() -> None:
            """--overwrite deletes only after an actor has started: the request may fail before."""
            for job in self.unclaimed:
                claim(job)
            self.unclaimed = []

        def checks() -> list[Any]:
            return [check for inventory in self.inventories for check in inventory.checking]

        metrics = DriverMetrics(self.jobs[0].fingerprint[:8])
        min_actors = max(job.config.min_actors for job in self.jobs)
        try:
            given_up = Dispatch(
                pool,
                tasks,
                self.tallies,
                self.report,
                finished,
                background,
                min_actors,
                metrics,
                checks,
                on_ready=claim_rest,
            ).run()
        finally:
            metrics.fleet(0, 0, 0)  # the pool closes
        if not given_up:
            return None
        ranges = "; ".join(f"{t.start} to {t.stop - 1}: {reason}" for t, reason in list(given_up.items())[:3])
        return RunError(
            f"{counted(len(given_up), 'shard')} could not be sampled (samples {ranges}); the rest is kept: "
            "run the same command again to retry"
        )

    def _pool(self, tasks: int, generate: bool) -> AbstractContextManager[Pool]:
        """A pool of actors for the runs; without `generate` they load what products need and no more."""
        job = self.jobs[0]
        fleet = plan_fleet(job.config, job.gpus, tasks, local=job.local)
        runs = [
            RunSpec(
                *(each.output, each.fingerprint, each.plan, each.config.fragment_format),
                products=each.products,
                source=each.source,
                latents=each.latents,
            )
            for each in self.jobs
        ]
        return actors(fleet, lambda: self._loaded(fleet, generate), runs, job.config.shard_timeout)

    def _loaded(self, fleet: Fleet, generate: bool) -> Loaded:
        """Have the networks in the object store, those that actors need."""
        job = self.jobs[0]
        for network in job.networks.values():
            send_by_value(network)  # a user's parameterisation travels with the plan, also where its network does not
        if generate:
            # Channels last costs a GPU two copies at every normalisation unless the compiler fuses them away.
            contiguous = job.gpus > 0 and not compiles(job.compile, gpu=True)
            for role, network in job.networks.items():
                if role not in self.shipped and not (job.latents and role in (MAIN, GUIDE)):
                    precision = job.config.decoder_precision if role == DECODER else job.precision
                    self.shipped[role] = ship(network, precision, contiguous)
        if job.scoring and FEATURES not in self.shipped:
            self.shipped[FEATURES] = ship(network_of(job.scoring.extractor), "fp32")
        networks = self.shipped if generate else {role: net for role, net in self.shipped.items() if role == FEATURES}
        compile = job.compile if generate else "off"
        return Loaded(networks, job.precision, job.config.batch_size, compile, fleet.cpus, fleet.gpus, self.tried)

    def _finish(self, run: int, here: bool = False) -> RunResult | None:
        """Merge and score a run; None where a fragment was damaged, and its range is to be sampled again."""
        job, tally, summary = self.jobs[run], self.tallies[run], self.done[run]
        if summary is None and (summary := self._merge(run, here)) is None:
            return None
        if job.scoring:
            summary = summary | {"scores": scored_run(job, self.report)}
        self.report.update(replace(tally.latest, stage="done"))
        return result_of(job, summary)

    def _merge(self, run: int, here: bool) -> Summary | None:
        job, inventory, tally = self.jobs[run], self.inventories[run], self.tallies[run]
        still_ours(job)
        merging = time.monotonic()
        merged = merge(job, inventory, tally, self.report, here)
        self.merge_s[run] += time.monotonic() - merging
        if isinstance(merged, DamagedPiece):
            inventory.repair(merged)
            return None
        summary = write_outcome(job, tally, inventory, merged, self.previews[run], self.began, self.merge_s[run])
        for warning in (summary["pixels"] or {}).get("warnings", ()):
            self.report.message(warning, "warning")
        return summary


def tiles_of_task(job: Job, closing: Event, wanted: Mapping[FragmentName, Sequence[int]]) -> dict[int, Tile]:
    """Have a task read tiles, so that no picture passes through the driver; waits on a separate thread.

    Raises:
        RunError: the task failed, or the run ends.
    """
    task = show_task.options(scheduling_strategy=beside_driver()).remote(job.output, job.fingerprint, wanted)
    try:
        # Ray ends with the run: by then nothing may wait for it.
        while not ray.wait([task], timeout=LOOK_S)[0]:
            if closing.is_set():
                ray.cancel(task)
                raise RunError("the run ends")
        return ray.get(task)
    except ray.exceptions.RayError as error:
        raise RunError(f"the preview cannot be drawn: {reason_of(error)}") from error
