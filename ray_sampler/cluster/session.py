"""A connection to Ray: the cluster that was asked for, one that is already connected, or a local one of our own."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_sampler.cluster.lost_ray import watched
from ray_sampler.cluster.reaching import (
    address_given,
    cannot_join,
    cannot_start,
    check_machine,
    entrypoint_in_text,
    knock,
    refuse_client_address,
)
from ray_sampler.config import FleetOptions
from ray_sampler.errors import RequestError

LOCAL_ACTORS = 8
"""CPU actors of one machine at most; each takes an equal part of its cores."""

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is off, Ray 2.60 takes 127.0.0.1 for the node's address and listens there only."""


@dataclass(frozen=True)
class Fleet:
    """What an actor takes, and how many there may be."""

    gpus: float
    cpus: int
    max_actors: int


def joins_cluster(address: str | None) -> bool:
    """Whether the run uses a Ray that somebody else started."""
    return bool(address or os.environ.get("RAY_ADDRESS") or ray.is_initialized())


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a submitted Ray job, whose working directory is temporary."""
    return RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Where tasks run that the driver waits for: on its own node, so that no other one can freeze or take them away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Be connected to Ray; what this started is stopped at the end.

    Raises:
        RequestError: the cluster at the address does not answer.
        RunError: a Ray of our own cannot be started.
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if found := address_given(address):
        where, given = found
        refuse_client_address(where, given)
        try:
            knock(where)
            with handlers_kept(), entrypoint_in_text():
                ray.init(address=where, **quiet)
        except RequestError as error:
            raise RequestError(f"{given}: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise cannot_join(error, given) from error
    else:
        check_machine()
        try:
            with on_loopback(), handlers_kept(), entrypoint_in_text():
                ray.init(address="local", include_dashboard=False, **quiet)
        except Exception as error:  # Ray 2.60 raises bare ones too
            raise cannot_start(error) from error
    try:
        with nullcontext() if found else watched():
            yield
    finally:
        ray.shutdown()


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep this process's own answers to signals: ray.init puts others in their place, one of which aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:
        # Ray's answer to a SIGTERM that came meanwhile; ours is due.
        if callable(ours := earlier[signal.SIGTERM]):
            ours(signal.SIGTERM, None)
        raise
    finally:
        for each, handler in earlier.items():
            signal.signal(each, handler)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that starts here be reachable from this machine only."""
    earlier = os.environ.get(LOOPBACK_VARIABLE), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK_VARIABLE], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = earlier[1]
        if earlier[0] is None:
            del os.environ[LOOPBACK_VARIABLE]
        else:
            os.environ[LOOPBACK_VARIABLE] = earlier[0]


def gpus_per_actor(options: FleetOptions) -> float:
    """GPUs of an actor: as asked for, else 1 where there are GPUs (in a cluster: now), else 0."""
    if options.gpus_per_actor is not None:
        return options.gpus_per_actor
    if ray.is_initialized():
        return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return 1.0 if torch.cuda.is_available() else 0.0


def plan_fleet(options: FleetOptions, gpus: float, shards: int, local: bool) -> Fleet:
    """What each actor takes of a connected Ray. CPU actors split a machine's cores fairly."""
    if gpus:
        room = math.floor(ray.cluster_resources().get("GPU", 0) / gpus) if local else shards
        return Fleet(gpus, 1, max(1, min(options.max_actors or shards, room, shards)))
    cores = max(1, min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]))
    per_node = min(options.max_actors or cores, cores, LOCAL_ACTORS)
    return Fleet(0, cores // per_node, min(per_node if local else options.max_actors or shards, shards))
