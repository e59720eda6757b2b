"""The driver: plan what is missing, dispatch it to actors, reduce the fragments to the archive."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import ray

from ray_sampler.cluster.actor import CONCURRENCY, ActorSpec, PackedWeights, SamplerActor, pack
from ray_sampler.cluster.dispatch import Dispatch, Tally, shards_of
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.outcome import already_done, write_outcome
from ray_sampler.cluster.pool import Pool, Shard, reason_of
from ray_sampler.cluster.prepare import Job, claim, prepare, still_ours
from ray_sampler.cluster.reduce import Damage, Merged, merge_task, pack_pieces
from ray_sampler.cluster.session import Fleet, beside_driver, connect, joins_cluster, plan_fleet
from ray_sampler.config import RunConfig, RunError
from ray_sampler.pictures import PreviewKeeper
from ray_sampler.reporting.progress import Reporter, Snapshot, reporter
from ray_sampler.sampling.engine import compiles

REPAIR_ROUNDS = 5
"""Times that the merge may find a damaged fragment and have it sampled again."""


class RunResult(NamedTuple):
    """A finished run."""

    archive: str
    """Path or URL of the archive."""
    summary: dict[str, Any]
    """The content of summary.json."""


def run(config: RunConfig) -> RunResult:
    """Fill the archive that `config` asks for; go on where an earlier run of it stopped.

    Uses the Ray that this process is connected to, or the one at config.address or RAY_ADDRESS, else starts its own.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: the run failed or is incomplete; what was finished is kept.
    """
    began = time.monotonic()
    joined = connect(config) if joins_cluster(config) else nullcontext()
    with reporter(config.progress, config.json_log) as report, joined:
        job = prepare(config)
        claim(job)
        report.message(f"run {job.fingerprint[:8]} in {job.run_dir.url}")
        if not (job.local or job.gpus or config.gpus_per_actor == 0):
            report.message(
                "the cluster has no GPU now, so actors take CPUs; if GPU nodes come on demand, give --gpus_per_actor 1",
                "warning",
            )
        if (summary := already_done(job)) is not None:
            report.message("the archive is complete already")
            return result_of(job, summary)
        if ray.is_initialized():
            return fill(job, report, began)
        report.message("starting Ray on this machine, which takes some seconds")
        with connect(config):
            return fill(job, report, began)


def result_of(job: Job, summary: dict[str, Any]) -> RunResult:
    return RunResult(job.run_dir.path_of(summary["archive"]["name"]), summary)


def fill(job: Job, report: Reporter, began: float) -> RunResult:
    """Sample what is missing and merge, until the archive stands."""
    config = job.run.request
    inventory = Inventory(job, report)
    tally = Tally(config.num_samples, reused=config.num_samples - inventory.missing_samples())
    preview = PreviewKeeper(job.run_dir, job.fingerprint, config.num_samples, describe(job), inventory.names)
    merge_s = 0.0
    if inventory.missing() and compiles(config.compile, job.gpus > 0):
        report.message("each actor compiles the network before its first shard, which takes a minute or more")
    try:
        for _ in range(REPAIR_ROUNDS + 1):
            shards = list(shards_of(inventory.missing(), job.run.shard_size))
            if shards or inventory.unchecked():
                with open_pool(job, len(shards) or 1) as pool:
                    sample(pool, shards, inventory, preview, tally, report)
            still_ours(job)
            merging = time.monotonic()
            merged = merge(job, inventory, tally, report)
            merge_s += time.monotonic() - merging
            if isinstance(merged, Merged):
                summary = write_outcome(job, tally, inventory, merged, preview, began, merge_s)
                report.update(replace(tally.latest, stage="done"))
                return result_of(job, summary)
            inventory.repair(merged)
        raise RunError(
            f"fragments in {job.run_dir.url} kept failing their checks through {REPAIR_ROUNDS} repairs; "
            "check the storage, then run the same command again"
        )
    finally:
        preview.close()
        inventory.close()


def describe(job: Job) -> str:
    sampling, name = job.run.sampling, job.run.weights.rpartition("/")[2]
    steps = f" {sampling.steps} steps" if sampling.sampler not in ("onestep", "multistep") else ""
    return f"{name} · {sampling.sampler}{steps} · seed {sampling.seed} · {job.fingerprint[:8]}"


@contextmanager
def open_pool(job: Job, shards: int) -> Iterator[Pool]:
    """A pool whose actors share one copy of the weights per node; they are gone at the end, so that nodes can go."""
    config = job.run.request
    fleet = plan_fleet(config, job.gpus, shards, local=job.local)
    weights = ray.put(pack(job.weights))
    probe = f"driver-{secrets.token_hex(8)}"
    job.run_dir.prove_rights()
    job.run_dir.probe_write(probe)
    pool = Pool(starter(job, fleet, weights, probe), fleet, config.shard_timeout)
    try:
        yield pool
    finally:
        pool.close()
        job.run_dir.probes_clear(probe)


def starter(job: Job, fleet: Fleet, weights: ray.ObjectRef[PackedWeights], probe: str) -> Callable[[], Any]:
    run, config = job.run, job.run.request
    assert run.precision != "auto"
    spec = ActorSpec(
        output=job.output,
        fingerprint=job.fingerprint,
        architecture=run.architecture,
        sampling=run.sampling,
        labels=job.labels,
        precision=run.precision,
        num_samples=config.num_samples,
        batch_size=config.batch_size,
        fragment_format=config.fragment_format,
        compile=config.compile,
        cores=fleet.cpus,
        probe=probe,
    )
    actor = ray.remote(SamplerActor).options(
        num_gpus=fleet.gpus, num_cpus=fleet.cpus, max_restarts=0, max_concurrency=CONCURRENCY
    )
    shared = ray.put(spec)
    return lambda: actor.remote(shared, weights)


def sample(
    pool: Pool, shards: list[Shard], inventory: Inventory, preview: PreviewKeeper, tally: Tally, report: Reporter
) -> None:
    """Compute `shards`, and whatever turns out to be damaged meanwhile.

    Raises:
        RunError: some could not be computed; names them.
    """

    def background() -> list[Shard] | None:
        preview.redraw_when_due()
        return inventory.check_some()

    job = inventory.job
    metrics = DriverMetrics(job.fingerprint[:8])
    try:
        given_up = Dispatch(
            pool, shards, tally, report, inventory.add, background, job.run.request.min_actors, metrics
        ).run()
    finally:
        metrics.fleet(0, 0, 0)  # the pool closes
    if given_up:
        ranges = "; ".join(f"{s.start} to {s.stop - 1}: {reason}" for s, reason in list(given_up.items())[:3])
        raise RunError(
            f"{len(given_up)} shards could not be sampled (samples {ranges}); the others are kept, "
            "and the same command tries these again"
        )


def merge(job: Job, inventory: Inventory, tally: Tally, report: Reporter) -> Merged | Damage:
    """Have a task write the archive, or say which fragment is in the way.

    Raises:
        RunError: the archive cannot be written.
    """
    num_samples = job.run.request.num_samples
    tally.latest = Snapshot(
        num_samples=num_samples,
        reused=tally.reused,
        done=num_samples - tally.reused,
        failures=tally.failures,
        stage="merging",
        elapsed_s=tally.latest.elapsed_s,
        rate=tally.latest.rate,
    )
    report.update(tally.latest)
    packed = pack_pieces(inventory.cover(), inventory.contents)
    task: ray.ObjectRef[Merged | Damage] = merge_task.options(scheduling_strategy=beside_driver()).remote(
        job.output, job.fingerprint, packed, num_samples, job.image_shape, job.labels is not None
    )
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RunError):
            raise error.cause from None
        raise RunError(f"the archive could not be written: {reason_of(error)}") from error
