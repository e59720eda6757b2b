"""Actors for runs: the Ray that they are on, and a pool of those that hold the same networks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import ray

from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet, connect
from ray_sampler.cluster.worker import CONCURRENCY, Loaded, RunSpec, Worker
from ray_sampler.reporting.progress import Reporter
from ray_sampler.storage.run_dir import RunDir


@contextmanager
def own_ray(report: Reporter, local: bool) -> Iterator[None]:
    """A Ray on this machine, unless a cluster is connected; runs in several threads share it."""
    connected = ray.is_initialized()
    if connected and not local:
        yield
        return
    if not connected:
        report.message("starting Ray on this machine, which takes some seconds")
    with connect(None):
        yield


@contextmanager
def actors(fleet: Fleet, load: Callable[[], Loaded], runs: Sequence[RunSpec], timeout: float) -> Iterator[Pool]:
    """A pool whose actors share one copy of their networks per node; they end with it, so that nodes can go.

    Args:
        load: puts the networks into the object store; called when the first actor is asked for.
        timeout: as of the `Pool`.

    Raises:
        RequestError, RunError: an output cannot be written.
    """
    probe, run_dirs = f"driver-{secrets.token_hex(8)}", [RunDir(run.output) for run in runs]
    for run_dir in run_dirs:
        run_dir.prove_rights()
        run_dir.probe_write(probe)

    @cache
    def shared() -> tuple[Any, Any]:
        return ray.put(load()), ray.put([replace(run, probe=probe) for run in runs])

    actor = ray.remote(Worker).options(
        num_gpus=fleet.gpus,
        num_cpus=fleet.cpus,
        max_restarts=0,
        max_concurrency=CONCURRENCY,
        # One node may have room for all CPU actors, and they would share its cores.
        scheduling_strategy="DEFAULT" if fleet.gpus or fleet.local else "SPREAD",
    )
    pool = Pool(lambda: actor.remote(*shared()), fleet, timeout)
    try:
        yield pool
    finally:
        pool.close()
        for run_dir in run_dirs:
            run_dir.probes_clear(probe)
