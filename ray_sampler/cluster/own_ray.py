"""The local Ray is a child process (`head.py`), which a thread starts, joins and ends; it joins clusters too.

A thread does it, as Ray puts its own answers to signals in place on the main thread, as half a connection cannot be
undone, and as whoever waits for a thread can stop waiting. What it starts inherits from it that signals are blocked:
one to all processes of a job reaches the driver and leaves Ray for the driver to end.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil
import ray

from ray_sampler.cluster.joining import own_token
from ray_sampler.cluster.machine import address_space, check_machine, cpus, ray_folder
from ray_sampler.cluster.private import read_settings_again, without_uv
from ray_sampler.errors import RunError, printable
from ray_sampler.process import of_command

logger = logging.getLogger(__name__)

START_S = 120.0
"""Seconds that a local Ray may take to start: about 3 on an idle machine, 40 and more on a slow one that is busy."""

END_S = 45.0
"""Seconds in which Ray's processes end: at most one where the machine is not busy."""

LOOK_S = 0.5
"""How often the thread looks, while its Ray starts, whether that is still wanted and Ray's control process lives."""

PROGRAM = Path(__file__).with_name("head.py")

ADDRESS = re.compile(rb"ray is at 127\.0\.0\.1:(\d+)\n")
FAILURE = re.compile(rb"ray failed: (.*)")
"""What the program says."""

QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}

LOG_FILES = ("raylet.err", "raylet.out", "gcs_server.err", "gcs_server.out", "agent*.log", "runtime_env_agent.log")
"""Where Ray says why it did not start, the likeliest first."""

COMPLAINT = re.compile(
    r"^(?!.*@ +0x).*(\b[EFC] \d+ \d+\]|\bERROR\b|\bFATAL\b|Error\b|error:|Check failed|terminate called|what\(\))"
)
"""What a line says that complains; one of a stack does not."""

NOISE = re.compile(r"^\[[^]]*\] *(\(\w+\) *)?(\S+:\d+: *)?|An unexpected system state has occurred\. .*? fix it\. *")
"""Of such a line: when and where it was written, and the request to report every failed check to Ray's authors."""

VITAL = ("raylet", "gcs_server")
AGENT = re.compile(r"/(dashboard|runtime_env)/agent\b|ray::(DashboardAgent|RuntimeEnvAgent)")
"""Processes of Ray without which a run cannot continue: a raylet ends when an agent of it does."""

HINTS = {
    "imed out": "the machine may be busy, so run the command again",
    "No space left": "the disk is full: make room, or set RAY_TMPDIR to another folder",
    "quota exceeded": "the disk is full: make room, or set RAY_TMPDIR to another folder",
    "AF_UNIX": "set RAY_TMPDIR to a folder with a shorter path",
}
"""What helps, by what Ray says."""

LOST = (
    "the local Ray ended unexpectedly ({name} is gone: killed, or out of memory); finished samples are kept: "
    "run the same command again to resume"
)

latest: Keeper | None = None
"""The connection to Ray that this process made last."""


class Keeper:
    """One connection of this process to Ray.

    Args:
        address: of a cluster; None starts a local Ray.
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self.users = 1
        self.head: subprocess.Popen[bytes] | None = None
        """The process of the local Ray."""
        self.failure: BaseException | None = None
        self.ready = threading.Event()
        """Connected, or failed."""
        self.done = threading.Event()
        """It is not needed any more."""
        self.gone = threading.Event()
        """Nothing of it is left. The thread's state is not enough: in Python 3.11 it counts as ended as soon as
        a waiting thread is interrupted."""
        self.thread = threading.Thread(target=self._keep, name="ray", daemon=True)

    def start(self) -> None:
        """Connect, and return once that is done.

        Raises:
            RequestError, RunError: no Ray starts on this machine.
            OSError, ValueError, RuntimeError: by Ray, of a cluster.
        """
        global latest
        if self.address is None:
            check_machine()
        if latest is not None:  # a run that was interrupted again and again leaves one that still ends
            latest.gone.wait(END_S)
        self.thread.start()
        latest = self
        self.ready.wait()
        if self.failure is not None:
            raise self.failure

    def stop(self) -> None:
        """Disconnect, and end a local Ray."""
        self.done.set()
        if self.thread.ident is not None:
            self.gone.wait(END_S)

    def _keep(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            if self.address is None:
                self.head, address = up(cpus(), self.done)
                join_head(self.head, address)
            else:
                ray.init(address=self.address, **QUIET)
            self.ready.set()
            self.done.wait()
        except BaseException as error:  # Ray raises SystemExit too; whoever waits hears of it
            self.failure = error
        finally:
            leave()
            if self.head:
                end(self.head)
            self.gone.set()
            self.ready.set()


def start_head(num_cpus: int) -> subprocess.Popen[bytes]:
    """Start a local Ray, in a separate process group."""
    variables = os.environ | own_token()
    variables |= {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray takes 127.0.0.1 for the node's address and listens there only
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": os.path.dirname(ray_folder()),
        "RAY_gcs_server_port_wait_time_s": f"{START_S:.0f}",
    }
    variables.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        [sys.executable, "-P", PROGRAM, str(num_cpus)],
        env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, process_group=0,
    )  # fmt: skip


def up(num_cpus: int, unwanted: threading.Event) -> tuple[subprocess.Popen[bytes], str]:
    """Start a local Ray, and wait until it is up; returns its process and address.

    Parts of Ray 2.60 wait 15 or 30 s for each other, which may not do on a busy machine: then it is started again.

    Raises:
        RunError: it does not start, or is not wanted any more.
    """
    deadline = time.monotonic() + START_S
    while True:
        head = start_head(num_cpus)
        try:
            return head, address_of(head, unwanted, deadline)
        except BaseException as error:
            end(head)
            if "imed out" not in str(error) or time.monotonic() > deadline:
                raise


def address_of(head: subprocess.Popen[bytes], unwanted: threading.Event, deadline: float) -> str:
    said = b""
    answers = pipe(head.stdout)
    while not (found := ADDRESS.search(said)):
        if unwanted.is_set():
            raise RunError("the run was ended while Ray started")
        if time.monotonic() > deadline:
            raise RunError(why_not_started(f"it timed out after {START_S:.0f} s", head))
        if any(lost(process) for process in below(head)):  # which Ray would wait for all the same
            raise RunError(why_not_started("its control process ended", head))
        if select.select([answers], [], [], LOOK_S)[0]:
            more = os.read(answers.fileno(), 2**16)
            if not more:
                failure = FAILURE.search(said)
                raise RunError(why_not_started(failure[1].decode() if failure else "its process ended", head))
            said += more
    # Ray would take 127.0.0.1 for this machine's address on its network, where the local Ray does not listen.
    return f"0.0.0.0:{found[1].decode()}"


def pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def join_head(head: subprocess.Popen[bytes], address: str) -> None:
    """Connect this process to the local Ray.

    Raises:
        RunError: Ray cannot.
    """
    try:
        with environment(**own_token()), without_uv():
            read_settings_again()
            ray.init(address=address, **QUIET)
    except (Exception, SystemExit) as error:
        raise RunError(why_not_started(str(error).strip().partition("\n")[0], head)) from error


def leave() -> None:
    """Disconnect this process from Ray; the next one may ask for another token, or for none."""
    with suppress(Exception):  # a Ray that broke has nothing left to disconnect from
        ray.shutdown()
    read_settings_again()


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


def end(head: subprocess.Popen[bytes]) -> None:
    """Kill all processes of the local Ray, and wait until they have ended.

    They are stopped first: one that dies leaves its children to somebody else, those that it just starts among them.
    """
    found: dict[int, psutil.Process] = {}
    news = [psutil.Process(head.pid), *below(head)]
    while news:
        for process in news:
            found[process.pid] = process
            with suppress(psutil.Error):
                process.suspend()
        news = [each for each in below(head) if each.pid not in found]
    for process in found.values():
        with suppress(psutil.Error):
            process.kill()
    with suppress(ProcessLookupError):  # what is left of a head that died before
        os.killpg(head.pid, signal.SIGKILL)
    head.wait()
    deadline = time.monotonic() + END_S
    while any(map(lives, found.values())) and time.monotonic() < deadline:
        time.sleep(0.01)
    pipe(head.stdin).close()
    pipe(head.stdout).close()


def below(head: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of the local Ray except the first."""
    with suppress(psutil.Error):
        return list(psutil.Process(head.pid).children(recursive=True))
    return []


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs. An orphan that has ended stays a zombie until init reaps it, perhaps late."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


def lost(process: psutil.Process) -> bool:
    """Whether a process is Ray's control process and has ended."""
    with suppress(psutil.Error):
        return bool(process.name() == "gcs_server" and process.status() == psutil.STATUS_ZOMBIE)
    return False


def described(head: subprocess.Popen[bytes]) -> Iterator[tuple[int, str, str]]:
    """Process id, name and command line of those processes."""
    for process in below(head):
        with suppress(psutil.Error):
            yield process.pid, process.name(), " ".join(process.cmdline())


def worker_starting(head: subprocess.Popen[bytes]) -> bool:
    """Whether a worker process of the local Ray is on its way to the point at which Ray counts it."""
    return any("default_worker.py" in line for _, _, line in described(head))  # it is renamed once it is there


def session_logs(head: subprocess.Popen[bytes]) -> Path | None:
    """Where the local Ray keeps its logs."""
    found = glob.glob(f"{glob.escape(ray_folder())}/session_*_{head.pid}/logs")
    return Path(found[0]) if found else None


def log_says(folder: Path, names: tuple[str, ...] = LOG_FILES) -> str | None:
    """The last complaint in Ray's logs."""
    for name in names:
        for path in sorted(folder.glob(name)):
            with suppress(OSError):
                lines = path.read_text(errors="replace")[-100_000:].splitlines()
                if complaints := [line for line in lines if COMPLAINT.search(line)]:
                    return printable(NOISE.sub("", complaints[-1].strip()))
    return None


def why_not_started(said: str, head: subprocess.Popen[bytes]) -> str:
    """Why our own Ray did not start, in one sentence, and where its log lies.

    Args:
        said: by it.
    """
    folder = session_logs(head)
    log = log_says(folder) if folder else None
    hints = (hint for words, hint in HINTS.items() if words in f"{said} {log}")
    cause = "; ".join((printable(said), *hints))
    if (space := address_space()) is not None:
        allowed = f"ulimit -v allows {space / 2**20:.0f} MiB of addresses"
        cause += f" ({allowed}, and Ray reserves many times the memory that it uses: raise it)"
    where = folder or f"{ray_folder()}, which RAY_TMPDIR chooses"
    return (
        f"Ray did not start on this machine: {cause}{f'; its log says: {log}' if log else ''}; its logs are in {where}"
    )


@contextmanager
def watched(head: subprocess.Popen[bytes]) -> Iterator[None]:
    """While a local Ray is used: if it dies, a command ends with one sentence and exit code 1.

    Ray 2.60 ends this process then, without a word of what to do. From Python the sentence is logged; what Ray raises,
    or its end of the process, follows.
    """
    over, stop = os.pipe()
    watcher = threading.Thread(target=watch, args=(vital(head), over), name="watch-ray", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.close(stop)
        watcher.join()
        os.close(over)


def vital(head: subprocess.Popen[bytes]) -> dict[int, str]:
    """The names of the processes with which our own Ray ends, by process id."""
    found = {head.pid: "its first process"}
    for pid, name, line in described(head):
        if name in VITAL or AGENT.search(line):
            found[pid] = name if name in VITAL else "an agent"
    return found


def watch(pids: dict[int, str], over: int) -> None:
    """Wait for one of the processes to end, or for the other end of the pipe `over` to be closed."""
    poll = select.poll()
    poll.register(over, select.POLLIN | select.POLLHUP)
    names: dict[int, str] = {}
    for pid, name in pids.items():
        with suppress(OSError, AttributeError):  # it is gone already, or this system cannot watch processes
            descriptor = os.pidfd_open(pid)
            names[descriptor] = name
            poll.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    for descriptor in names:
        os.close(descriptor)
    if over not in ready:
        give_up(LOST.format(name=names[ready[0]]))


def give_up(sentence: str) -> None:
    """Say a sentence, and end the process of a command: what is left of Ray ends with it."""
    if not of_command():
        logger.error(sentence)
        return
    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
    with suppress(OSError):
        os.write(2, f"{cursor}ray-sampler: {sentence}\n".encode())
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # Ray is about to say pages
            os.dup2(null, descriptor)
    os._exit(1)
