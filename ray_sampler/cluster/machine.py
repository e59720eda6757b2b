"""What this machine lets our processes have: CPUs, memory and processes, containers and job schedulers counted in."""

from __future__ import annotations

import math
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from ray_sampler.errors import RequestError, RunError, printable

CGROUPS = Path("/sys/fs/cgroup")

LEAST_MEMORY = 650 * 2**20
"""Bytes that the driver, Ray's own processes and one actor of a tiny network take together, about."""

LEAST_PROCESSES = 220
"""Threads, which the system counts as processes, that they start between them, about."""

SOCKET_PATH = 64
"""Characters that Ray needs for a socket's path below its folder, of the 107 that the system allows."""

LONGEST_SOCKET = 107

STORE_SHARE = 0.3
"""Of the memory: what Ray's object store takes as one file, unless /dev/shm is smaller."""

KNOCK_S = 15.0
"""Seconds in which this machine must accept a connection from itself."""


def cgroup_files(controller: str, name: str) -> Iterator[str]:
    """The content of a limit's file, of our control group and of those around it, in version 1 and 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        inner = Path(path.lstrip("/"))
        for folder in (root / inner, *(root / parent for parent in inner.parents)):
            try:
                yield (folder / name).read_text().strip()
            except OSError:  # another version, or a container that shows its own group as the root
                continue


def limits(controller: str, *names: str) -> Iterator[int]:
    """The limits of a controller that are numbers."""
    for name in names:
        for text in cgroup_files(controller, name):
            if text.isdigit():
                yield int(text)


def cpu_quota() -> float:
    """CPUs that the control groups allow; infinite without a limit."""
    found = [text.split() for text in cgroup_files("cpu", "cpu.max")]
    version_1 = cgroup_files("cpu", "cpu.cfs_quota_us"), cgroup_files("cpu", "cpu.cfs_period_us")
    found += map(list, zip(*version_1, strict=False))
    return min((int(quota) / int(period) for quota, period in found if quota.isdigit()), default=math.inf)


def cpus() -> int:
    """CPUs that our processes may use, at least one."""
    return max(1, int(min(len(os.sched_getaffinity(0)), cpu_quota())))


def memory_limit() -> float:
    """Bytes that our processes may have together, as the control groups say; infinite without a limit."""
    return min(limits("memory", "memory.max", "memory.limit_in_bytes"), default=math.inf)


def killed_for_memory() -> int:
    """Processes of our control group that the system has ended for lack of memory."""
    counts = [0]
    for name in ("memory.events", "memory.oom_control"):
        for text in cgroup_files("memory", name):
            counts += [int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")]
    return max(counts)


def address_space() -> int | None:
    """Bytes of addresses that a process may have; None for any number."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def processes_left() -> float:
    """Processes and threads that may still be started, as far as limits say."""
    left = [math.inf]
    most, current = list(limits("pids", "pids.max")), list(limits("pids", "pids.current"))
    if most:
        left.append(min(most) - (min(current) if current else 0))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.getuid() != 0:  # root is exempt
        left.append(soft - threads_of(os.getuid()))
    return min(left)


def threads_of(user: int) -> int:
    """Threads that a user runs on this machine, as far as it is seen."""
    processes = (process.info for process in psutil.process_iter(["uids", "num_threads"]))
    return sum(each["num_threads"] or 0 for each in processes if each["uids"] and each["uids"].real == user)


def ray_folder() -> str:
    """Where the local Ray keeps its sockets and logs, by Ray's rule. Absolute: its processes have other folders."""
    return os.path.abspath(os.path.join(os.environ.get("RAY_TMPDIR", os.environ.get("TMPDIR", "/tmp")), "ray"))


def check_machine() -> None:
    """Check what the local Ray needs of this machine, where Ray would fail late or silently.

    Raises:
        RequestError: its folder cannot be written.
        RunError: something else is missing.
    """
    check_folder(ray_folder())
    check_loopback()
    limit, store = resource.getrlimit(resource.RLIMIT_FSIZE)[0], STORE_SHARE * psutil.virtual_memory().available
    with suppress(OSError):
        store = min(store, shutil.disk_usage("/dev/shm").total)
    if resource.RLIM_INFINITY != limit < store:
        raise RunError(
            f"this process may write files of {limit:,} bytes at most (`ulimit -f`), and Ray's object store is a file "
            f"of up to {store:,.0f}; raise the limit with `ulimit -f unlimited`"
        )
    memory, processes = memory_limit(), processes_left()
    if memory < LEAST_MEMORY:
        raise RunError(
            f"Ray cannot start: this process may have only {memory / 2**20:.0f} MiB of memory, and a run needs about "
            f"{LEAST_MEMORY // 2**20} MiB; raise the limit of the container or job"
        )
    if processes < LEAST_PROCESSES:
        raise RunError(
            f"Ray cannot start: only {processes:.0f} more processes and threads may be started here, and a run needs "
            f"about {LEAST_PROCESSES}; raise the limit (docker run --pids-limit, TasksMax, ulimit -u)"
        )


def check_folder(folder: str) -> None:
    """Check where Ray keeps sockets and logs, and the working directory, which it names to its workers.

    Raises:
        RequestError: the folder cannot be written.
        RunError: a name is too long for sockets, or is not UTF-8.
    """
    for what, path in (("the working directory", os.getcwd()), ("Ray's folder", folder)):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{what} is {printable(path)}, whose name is not UTF-8, and Ray cannot pass it to its workers; "
                "start from another folder with another RAY_TMPDIR, or rename it"
            ) from None
    if len(folder.encode()) + SOCKET_PATH > LONGEST_SOCKET:
        raise RunError(
            f"Ray's folder is {printable(folder)}, whose path is too long for sockets in it; set RAY_TMPDIR to a short "
            "one, for example RAY_TMPDIR=/tmp"
        )
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RequestError(
            f"Ray cannot start: {folder} cannot be written ({error.strerror or error}); "
            "set RAY_TMPDIR to a folder of your own, with a short path"
        ) from error


def check_loopback() -> None:
    """Raises RunError: this machine cannot reach itself."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), KNOCK_S).close()
    except OSError as error:
        raise RunError(
            f"Ray cannot start: 127.0.0.1 cannot be reached ({error.strerror or error}), where its processes talk to "
            "each other; bring the loopback interface up (ip link set lo up)"
        ) from error
