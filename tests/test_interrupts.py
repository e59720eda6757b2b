"""Signals to the command line are never lost, whatever becomes of the exception that they raise."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ray_sampler.process import interruptible
from tests.cluster.processes import PROMPT_S

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import hashlib, time
from ray_sampler import process
process.wind_up_s = lambda: {wind_up_s}
received = []
try:
    with process.interruptible(received, "interrupted"):
        {body}
finally:
    print(received, flush=True)
"""

READY = 'print("ready", flush=True)'

BODIES = {
    "in Python": f"{READY}; time.sleep(600)",
    # As Python does in hooks of fork and in destructors.
    "where exceptions are dropped": f"""
        class Broken:
            def __del__(self):
                {READY}; time.sleep(600)
        it = Broken()
        del it
        time.sleep(600)
""",
    "in C": f'{READY}; hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)',
}


@contextmanager
def where_it_stays(body: str, wind_up_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does what is named and nothing else any more, and has so long to end after a signal."""
    script = SCRIPT.format(body=BODIES[body], wind_up_s=wind_up_s)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        began = time_in_user_mode(process)
        while body == "in C" and time_in_user_mode(process) < began + 0.3:
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def time_in_user_mode(process: subprocess.Popen[bytes]) -> float:
    seconds: float = psutil.Process(process.pid).cpu_times().user
    return seconds


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("body", BODIES)
def test_the_process_ends_in_time(sent: signal.Signals, body: str):
    with where_it_stays(body, wind_up_s=3.0) as process:
        process.send_signal(sent)
        out, err = process.communicate(timeout=PROMPT_S)
    if body == "in Python":
        assert out == f"[{int(sent)}]\n".encode()
    else:
        assert process.returncode == 128 + sent
        assert err == b"ray-sampler: interrupted\n"


def test_another_signal_ends_the_process_at_once():
    """Whatever time it has left. Those that come right after the first are taken for the same request."""
    with where_it_stays("in C", wind_up_s=600.0) as process:
        deadline = time.monotonic() + PROMPT_S
        while process.poll() is None:
            assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        assert process.returncode == 128 + signal.SIGINT


def test_nothing_of_it_stays():
    earlier = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    hook = sys.unraisablehook
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with interruptible([], "interrupted"):
        assert signal.getsignal(signal.SIGTERM) != earlier[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == earlier
    assert sys.unraisablehook is hook
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
