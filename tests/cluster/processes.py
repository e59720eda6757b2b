"""Runs in separate processes, to be watched, interrupted and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from ray_sampler.config import RunConfig
from tests.cluster.runs import flags_of, whole

ROOT = Path(__file__).resolve().parents[2]

PATIENCE_S = 300.0
"""How long a test waits for what must come: many times what it takes on a machine that does nothing else."""

PROMPT_S = 60.0
"""In which a run has ended that was told to: five seconds on a machine that does nothing else."""

Moment = Callable[[Path], bool]


@contextmanager
def started(
    config: RunConfig, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The command of `config` in a separate session, as is the Ray that it starts; none outlives the block."""
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
        kill_session(process)


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process and its session, and wait until all have ended: one in a system call finishes it, as a rename.

    Ray puts each worker into a separate process group.
    """
    deadline = time.monotonic() + PROMPT_S
    while alive := session_of(process.pid):
        assert time.monotonic() < deadline, alive
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        time.sleep(0.01)
    process.wait(PROMPT_S)


def wait_for(moment: Moment, output: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not moment(output):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def session_is_gone(leader: int) -> bool:
    """Whether all processes of a session end soon."""
    deadline = time.monotonic() + PROMPT_S
    while session_of(leader):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def session_of(leader: int) -> list[psutil.Process]:
    """The processes of a session that live; zombies do not count."""
    return [process for process in psutil.process_iter() if runs_in(process, leader)]


def runs_in(process: psutil.Process, session: int) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False


def claimed(output: Path) -> bool:
    return (output / "run.json").exists()


def written(count: int) -> Moment:
    return lambda output: len(whole(output)) >= count
