"""A connection to Ray: the cluster that was asked for, one that is already connected, or a local one of our own."""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_sampler.config import FleetOptions
from ray_sampler.errors import RequestError, require

LOCAL_ACTORS = 8
"""CPU actors of one machine at most; each takes an equal part of its cores."""

KNOCK_S = 10.0
"""Seconds that a cluster may take to accept a connection."""

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
    """
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        require(
            not address.startswith("ray://"),
            f"--address is {address!r}, which a Ray client takes; submit the run with `ray job submit` instead, "
            "or give host:port of the cluster from one of its nodes",
        )
        try:
            knock(address)
            with handlers_kept():
                ray.init(address=address, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError(
                f"--address is {address!r}, where no Ray cluster answers ({reason}); "
                "give the address of a running one, or none to start a local Ray"
            ) from error
    else:
        with on_loopback(), handlers_kept():
            ray.init(address="local", include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def knock(address: str) -> None:
    """Raise OSError where nothing listens at a cluster's address: Ray itself would try for minutes, and log past us."""
    found = services.canonicalize_bootstrap_address(address)
    if found:
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()


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


def no_gpu(gpus: float, who: str) -> str:
    """What to do where GPUs are asked of a machine that has none: no other machine can come."""
    return (
        f"--gpus_per_actor is {gpus:g}, but {who} finds no GPU on this machine; give --gpus_per_actor 0 to compute on "
        "CPUs, or --address of a cluster that has GPUs"
    )


def plan_fleet(options: FleetOptions, gpus: float, shards: int, local: bool) -> Fleet:
    """What each actor takes of a connected Ray. CPU actors split a machine's cores fairly.

    Raises:
        RequestError: GPUs are asked of a machine that has none, and no other one can come.
    """
    if gpus:
        there = int(ray.cluster_resources().get("GPU", 0))
        room = there * math.floor(1 / gpus) if local else shards  # an actor's share is of one GPU
        require(room > 0, no_gpu(gpus, "Ray"))
        return Fleet(gpus, 1, max(1, min(options.max_actors or shards, room, shards)))
    cores = max(1, min(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]))
    per_node = min(options.max_actors or cores, cores, LOCAL_ACTORS)
    return Fleet(0, cores // per_node, min(per_node if local else options.max_actors or shards, shards))
