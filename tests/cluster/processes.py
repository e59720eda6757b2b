"""Runs in processes of their own, to be watched, interrupted and killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ray_sampler.config import RunConfig
from tests.cluster.runs import flags_of, whole

ROOT = Path(__file__).resolve().parents[2]

PATIENCE_S = 300.0
"""How long a test waits for what must come: many times what it takes on a machine that does nothing else."""

PROMPT_S = 30.0
"""In which a run has ended that was told to: five seconds on a machine that does nothing else."""

Moment = Callable[[Path], bool]


@contextmanager
def started(
    config: RunConfig, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command of `config` in a process group of its own, as is the Ray that it starts; none outlives the block."""
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    variables.pop("RAY_ADDRESS", None)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "jobs/sample.py", *flags_of(config)],
            cwd=ROOT, env=variables, stdout=sink, stderr=sink, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with its group, and wait until all have ended: one in a system call, as a rename, finishes it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(PROMPT_S)
    assert group_is_gone(process.pid)


def wait_for(moment: Moment, output: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not moment(output):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def group_is_gone(group: int) -> bool:
    """Whether all processes of a group end soon; those that ended and that nobody has asked about yet have."""
    deadline = time.monotonic() + PROMPT_S
    while time.monotonic() < deadline:
        if not any(runs_in(process, group) for process in psutil.process_iter()):
            return True
        time.sleep(0.1)
    return False


def runs_in(process: psutil.Process, group: int) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def claimed(output: Path) -> bool:
    return (output / "run.json").exists()


def written(count: int) -> Moment:
    return lambda output: len(whole(output)) >= count
