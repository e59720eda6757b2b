"""A connection to Ray: the cluster that was asked for, one that is already connected, or a local one."""

from __future__ import annotations

import math
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_sampler.cluster import own_ray
from ray_sampler.cluster.joining import address_given, cannot_join, check_command_line, knock, refuse_client_address
from ray_sampler.cluster.machine import cpus, killed_for_memory, memory_limit
from ray_sampler.cluster.own_ray import Keeper, log_says, session_logs, watched
from ray_sampler.config import FleetOptions
from ray_sampler.errors import RequestError, require
from ray_sampler.process import JOB_VARIABLE
from ray_sampler.reporting.progress import count

LOCAL_ACTORS = 8
"""CPU actors of one machine at most; each takes an equal part of its cores."""

LOCK = threading.RLock()
HELD: list[Keeper] = []
"""This process's connection to Ray, where a run made it: at most one."""

used = False
"""Whether this process has used Ray."""
copied = False
"""Whether it was forked from one that has."""


@dataclass(frozen=True)
class Fleet:
    """What an actor takes, and how many there may be."""

    gpus: float
    cpus: int
    max_actors: int
    local: bool = field(default=False, compare=False)
    """Whether they are on a local Ray."""


class Place(NamedTuple):
    """Where a run is computed."""

    local: bool
    """Whether by a local Ray, on this machine alone."""
    gpus: float
    """Of an actor."""


def place(options: FleetOptions, output: str | None) -> Place:
    """Where a request is computed, before its own Ray is started.

    Raises:
        RequestError: this machine has no room for an actor, the output would be lost with a submitted job, or the
            command line is not text.
    """
    check_command_line()
    check_submitted(output)
    local = not joins_cluster(options.address)
    if local:
        check_own(options)
    return Place(local, gpus_per_actor(options))


def joins_cluster(address: str | None) -> bool:
    """Whether the run uses a Ray that somebody else started."""
    with LOCK:
        return bool(address or os.environ.get("RAY_ADDRESS") or (ray.is_initialized() and not HELD))


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """Be connected to the cluster that the run uses, if it uses one. Raises as `connect` does."""
    refuse_copy()
    with connect(address) if joins_cluster(address) else nullcontext():
        yield


def check_submitted(output: str | None) -> None:
    """Raises RequestError: the output of a submitted job would lie in its working directory, which is temporary."""
    if JOB_VARIABLE not in os.environ:
        return
    require(
        output is not None,
        "--output is missing; a submitted job's working directory is temporary, so give a bucket or a shared path",
    )
    require(
        "://" in str(output) or Path(str(output)).is_absolute(),
        f"--output is {output!r}, relative to a submitted job's working directory, which is temporary; "
        "give an absolute path that every node shares, or a bucket",
    )


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Where tasks run that the driver waits for: on its own node, so that no other one can freeze or take them away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Be connected to Ray; what this started is stopped when the last of the runs that use it ends.

    Raises:
        RequestError: the cluster at the address does not answer, or this process is connected to another one.
        RunError: no Ray starts on this machine.
    """
    refuse_copy()
    keeper: Keeper | None = None
    try:
        with LOCK:
            if not ray.is_initialized() or HELD:
                keeper = hold(address_given(address))
        with watched(keeper.head) if keeper and keeper.head else nullcontext():
            yield
    finally:
        if keeper:
            let_go(keeper)


def hold(found: tuple[str, str] | None) -> Keeper:
    """One more user of this process's connection to Ray, which is made if there is none.

    Args:
        found: a cluster's address, and where it was given; None for a local Ray.
    """
    address, given = found or (None, "--address is not given")
    if HELD:
        (keeper,) = HELD
        require(
            keeper.address == address,
            f"{given}, but another run of this process uses "
            f"{keeper.address or 'a Ray on this machine'}; a process is connected to one Ray at a time",
        )
        keeper.users += 1
        return keeper
    global used
    used = True
    keeper = Keeper(address)
    HELD.append(keeper)
    try:
        if address is None:
            keeper.start()
        else:
            join(address, given, keeper)
    except BaseException:
        HELD.remove(keeper)
        keeper.stop()
        raise
    return keeper


def let_go(keeper: Keeper) -> None:
    """One user less; the last one ends the connection."""
    with LOCK:
        keeper.users -= 1
        if not keeper.users:
            HELD.remove(keeper)
            keeper.stop()


def join(address: str, given: str, keeper: Keeper) -> None:
    """Connect to a cluster.

    Raises:
        RequestError: it does not answer.
    """
    refuse_client_address(address, given)
    try:
        knock(address)
        keeper.start()
    except RequestError as error:
        raise RequestError(f"{given}: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_join(error, given) from error


def own_head() -> subprocess.Popen[bytes] | None:
    """The process of the local Ray, if there is one."""
    return next((keeper.head for keeper in HELD), None)


def worker_starting() -> bool:
    """Whether a worker process of the local Ray is on its way to the point at which Ray counts it."""
    head = own_head()
    return head is not None and own_ray.worker_starting(head)


def shared() -> bool:
    """Whether another run of this process uses its Ray too, and may have its CPUs."""
    return any(keeper.users > 1 for keeper in HELD)


def after_fork() -> None:
    global copied
    copied = copied or ray.is_initialized() or used
    if (head := own_head()) and head.stdin:  # else our own Ray would live as long as the copy
        head.stdin.close()


def refuse_copy() -> None:
    """Raises RequestError: this process was forked from one that has used Ray."""
    require(
        not copied,
        "this process was forked from one that has used Ray, which does not work in a copy; start it with "
        'multiprocessing.get_context("spawn")',
    )


os.register_at_fork(after_in_child=after_fork)


def gpus_per_actor(options: FleetOptions) -> float:
    """GPUs of an actor: as asked for, else 1 where there are GPUs (in a cluster: now), else 0."""
    if options.gpus_per_actor is not None:
        return options.gpus_per_actor
    if ray.is_initialized():
        return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    return 1.0 if torch.cuda.is_available() else 0.0


def check_own(options: FleetOptions) -> None:
    """Check that this machine has room for an actor, as no other one can join a local Ray.

    Raises:
        RequestError: it has not.
    """
    asked, here = options.gpus_per_actor or 0.0, torch.cuda.device_count() if options.gpus_per_actor else 0
    require(
        asked <= here,
        f"--gpus_per_actor is {asked:g}, but this machine has {count(here, 'usable GPU')}; give 0 for its CPUs, or "
        "--address of a cluster that has GPUs",
    )
    cores = cpus()
    require(
        (options.cpus_per_actor or 1) <= cores,
        f"--cpus_per_actor is {options.cpus_per_actor}, but this machine has {count(cores, 'usable CPU')}; "
        "give no more",
    )


def plan_fleet(options: FleetOptions, gpus: float, shards: int, local: bool) -> Fleet:
    """What each actor takes of a connected Ray.

    CPU actors split our own machine's cores fairly. In a cluster each takes one CPU unless the request says otherwise:
    what nodes there will be, and what else they compute, is not known.

    Raises:
        RequestError: no actor fits on this machine.
    """
    wanted = options.max_actors or shards
    if not local:
        return Fleet(gpus, options.cpus_per_actor or 1, min(wanted, shards))
    resources = ray.cluster_resources()
    if gpus:
        there = resources.get("GPU", 0)
        room = int(there) * int(1 / gpus) if gpus < 1 else int(there // gpus)  # a fraction must fit on one card
        require(
            room > 0,
            f"--gpus_per_actor is {gpus:g}, but Ray finds {count(there, 'GPU')} on this machine; give 0 for its CPUs, "
            "or --address of a cluster that has GPUs",
        )
        return Fleet(gpus, options.cpus_per_actor or 1, max(1, min(wanted, room, shards)), local=True)
    cores = max(1, int(resources.get("CPU", 1)))
    if options.cpus_per_actor:
        return Fleet(
            0, options.cpus_per_actor, max(1, min(wanted, cores // options.cpus_per_actor, shards)), local=True
        )
    most = min(options.max_actors or cores, cores, LOCAL_ACTORS)
    return Fleet(0, cores // most, min(most, shards), local=True)


def why_unplaced(fleet: Fleet) -> str:
    """Why no actor has a process yet: what is asked for, and what is free or, for the local Ray, what its log says."""

    def shown(cpus: float, gpus: float) -> str:
        return count(cpus, "CPU") + (f" and {count(gpus, 'GPU')}" if fleet.gpus else "")

    asked = f"an actor asks for {shown(fleet.cpus, fleet.gpus)}"
    if not fleet.local:
        free = ray.available_resources()
        return f"{asked}; the whole cluster has {shown(free.get('CPU', 0), free.get('GPU', 0))} free"
    head = own_head()
    folder = session_logs(head) if head else None
    said = log_says(folder, ("raylet.err", "raylet.out")) if folder else None
    return f"{asked}; {f'Ray says: {said}' if said else 'Ray says nothing of it'}; its logs are in {folder}"


def start_failure(reason: str, fleet: Fleet) -> str:
    """Why an actor did not start, with what this machine reports of it on a local Ray."""
    killed = killed_for_memory() if fleet.local else 0
    if not killed:
        return reason
    allowed = f", of which it may have {memory_limit() / 2**20:.0f} MiB" if math.isfinite(memory_limit()) else ""
    return f"{reason} (the system has killed {killed} processes of this container or job for lack of memory{allowed})"
