"""A thread that connects this process to Ray, keeps it connected while runs need it, and ends what it started.

It is a thread of its own for four reasons. Ray puts its own answers to signals in place on the main thread only. What
it starts inherits from it that SIGTERM is blocked, so that a signal to all processes of a job reaches the driver and
leaves Ray for the driver to end. The processes of a local Ray die with the thread that started them, which must not be
the thread of one of several runs. And whoever waits for it can stop waiting.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, worker
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # compiled, without types

from ray_sampler.cluster.machine import address_space, check_room, cpus
from ray_sampler.cluster.reaching import cannot_start, check_machine, entrypoint_in_text, ray_folder
from ray_sampler.errors import RunError, printable
from ray_sampler.interrupts import kill_trees

START_S = 120.0
"""Seconds that a local Ray may take to start: about 3 on an idle machine, 40 and more on a slow one that is busy."""

END_S = 45.0
"""Seconds in which Ray's processes end: at most one where the machine is not busy."""

SIGACTION_BYTES = 512
"""Room for the system's struct sigaction, whatever its size."""

LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Where this is off, Ray 2.60 takes 127.0.0.1 for the node's address and listens there only."""

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}

LOG_FILES = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out", "agent*.log", "runtime_env_agent.log")
"""Where Ray says why it did not start, the likeliest first."""

COMPLAINT = re.compile(
    r"^(?!.*@ +0x).*(\b[EFC] \d+ \d+\]|\bERROR\b|\bFATAL\b|Error\b|error:|Check failed|terminate called|what\(\))"
)
"""What a line says that complains; one of a stack does not."""


latest: Keeper | None = None
"""The connection to Ray that this process made last."""


class Keeper:
    """One connection of this process to Ray.

    Args:
        address: of a cluster; None starts a Ray of our own.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self.users = 1
        self.failure: BaseException | None = None
        self.ready = threading.Event()
        """Connected, or failed."""
        self.done = threading.Event()
        """Nobody needs it any more."""
        self.gone = threading.Event()
        """Nothing of it is left. The thread does not tell: in Python 3.11 it counts as ended as soon as somebody is
        interrupted who waits for its end."""
        self.thread = threading.Thread(target=self._keep, name="ray", daemon=True)

    def start(self) -> None:
        """Connect, and return once that is done.

        Raises:
            RunError: no Ray starts on this machine.
            OSError, ValueError, RuntimeError: by Ray, of a cluster.
        """
        global latest
        if self.address is None:
            check_room(ray_folder())
            check_machine()
        if latest is not None:  # a run that was interrupted again and again leaves one that still starts
            latest.gone.wait(START_S + END_S)
        self.thread.start()
        latest = self
        ours = self.address is None
        if not self.ready.wait(START_S if ours else None):
            self.failure = TimeoutError(f"it timed out after {START_S:.0f} s")
        if self.failure is None:
            return
        if not ours:
            raise self.failure
        if isinstance(self.failure, OSError) and self.failure.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cannot_start(self.failure) from self.failure
        raise RunError(f"Ray did not start on this machine: {reason_for(self.failure)}") from self.failure

    def stop(self) -> None:
        """Disconnect, and end a Ray of our own; one that still starts is ended when it is up."""
        self.done.set()
        if self.thread.ident is not None and self.failure is None:
            self.gone.wait(END_S if self.ready.is_set() else START_S + END_S)

    def _keep(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        with ExitStack() as stack:
            stack.callback(self.gone.set)
            try:
                with handlers_kept(), entrypoint_in_text():
                    if self.address is None:
                        stack.enter_context(own_token())
                        with settings_of_our_own():
                            ray.init(
                                address="local",
                                include_dashboard=False,
                                num_cpus=cpus(),
                                _temp_dir=ray_folder(),
                                **QUIET,
                            )
                    else:
                        ray.init(address=self.address, **QUIET)
            except BaseException as error:  # Ray raises SystemExit too; whoever waits hears of it
                self.failure = error
                shut_down(ours=self.address is None)
                return
            finally:
                self.ready.set()
            self.done.wait()
            shut_down(ours=self.address is None)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Keep this process's own answers to signals, which Python lets the main thread alone set.

    Ray's C++ part answers SIGTERM by a stack trace, the earlier handler, and an alarm that aborts after three seconds.
    """
    library = ctypes.CDLL(None, use_errno=True)
    earlier = {each: ctypes.create_string_buffer(SIGACTION_BYTES) for each in (signal.SIGINT, signal.SIGTERM)}
    for each, action in earlier.items():
        library.sigaction(each, None, action)
    try:
        yield
    finally:
        for each, action in earlier.items():
            library.sigaction(each, action, None)


@contextmanager
def settings_of_our_own() -> Iterator[None]:
    """Let a Ray that starts here be reachable from this machine only, and run its workers by this interpreter.

    Ray would copy the working folder and start them by `uv run` where this process was started so.
    """
    uv = getattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False)
    with on_loopback(), environment(RAY_gcs_server_port_wait_time_s=f"{START_S:.0f}"):
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
        try:
            yield
        finally:
            ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = uv


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that starts here be reachable from this machine only."""
    earlier = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with environment(**{LOOPBACK_VARIABLE: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = earlier


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables; afterwards they are what they were."""
    earlier = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def own_token() -> Iterator[None]:
    """Give our own Ray a token of its own, which is written nowhere.

    Ray would make one and keep it under HOME, which a container may not have. It remembers the token and the mode in
    the process, so both are forgotten at the end: a later run may join another cluster.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is not None and mode.lower() != "token":
        yield
        return
    with environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)):
        forget_token()
        yield
    forget_token()


def forget_token() -> None:
    # First the mode: a thread of Ray that still ends would look for a token and abort without one.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def shut_down(ours: bool) -> None:
    """Disconnect from Ray. Processes of our own are killed: they do not hear SIGTERM."""
    node = worker._global_node
    if ours and node is not None:
        reap = node.kill_all_processes

        def kill_all(**_: Any) -> None:
            end_processes()
            reap(check_alive=False, allow_graceful=False)

        node.kill_all_processes = kill_all
    with suppress(Exception):  # a Ray that broke has nothing left to disconnect from
        ray.shutdown()
    if ours:
        end_processes()


def our_roots() -> list[psutil.Process]:
    """The children of this process that run our own Ray."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "/ray/" in " ".join(child.cmdline()):
                found.append(child)
    return found


def end_processes() -> None:
    """Kill all processes of our own Ray, and wait until they have ended."""
    killed = kill_trees(our_roots())
    deadline = time.monotonic() + END_S
    while any(map(lives, killed)) and time.monotonic() < deadline:
        time.sleep(0.01)
    psutil.wait_procs(killed, timeout=0)  # reaps our own children


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs. An orphan that has ended stays a zombie until init reaps it, perhaps late."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def session_logs() -> Path | None:
    """Where the Ray that this process started last keeps its logs."""
    found = glob.glob(f"{glob.escape(ray_folder())}/session_*_{os.getpid()}/logs")
    return Path(max(found, key=os.path.getmtime)) if found else None


def log_says(folder: Path, names: tuple[str, ...] = LOG_FILES) -> str | None:
    """The last complaint in Ray's logs."""
    for name in names:
        for path in sorted(folder.glob(name)):
            with suppress(OSError):
                lines = path.read_text(errors="replace")[-100_000:].splitlines()
                if complaints := [line for line in lines if COMPLAINT.search(line)]:
                    return printable(complaints[-1].strip())
    return None


def reason_for(failure: BaseException) -> str:
    """Why our own Ray did not start, in one sentence, and where its log lies."""
    said = [line.strip() for line in str(failure).splitlines() if line.strip()]
    cause = printable(said[0] if said else type(failure).__name__)
    if "timed out" in cause:
        cause += "; the machine may be busy, so run the command again"
    if (space := address_space()) is not None:
        allowed = f"ulimit -v allows {space / 2**20:.0f} MiB of addresses"
        cause += f" ({allowed}, and Ray reserves many times the memory that it uses: raise it)"
    folder = session_logs()
    if "AF_UNIX" in cause:
        return f"{cause}; set RAY_TMPDIR to a folder with a shorter path"
    if folder is None:
        return f"{cause}; RAY_TMPDIR chooses the folder in which it keeps its sockets and logs"
    log = log_says(folder)
    return f"{cause}{f'; it says: {log}' if log else ''}; its logs lie in {folder}"
