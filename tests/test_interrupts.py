"""Signals to the command line are never lost, whatever becomes of the exception that they raise."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ray_sampler.interrupts import interruptible

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import hashlib, time
from ray_sampler.interrupts import interruptible
received = []
try:
    with interruptible(received, "interrupted"):
        print("ready", flush=True)
        {body}
finally:
    print(received, flush=True)
"""


def swallowed(statement: str) -> str:
    """As Python does in hooks of fork and in destructors."""
    return f"""
        class Broken:
            def __del__(self):
                {statement}
        it = Broken()
        del it
        time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("body", "within"),
    [
        ("time.sleep(60)", 2),
        (swallowed("time.sleep(60)"), 6),
        ('hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)', 6),
    ],
    ids=["in Python", "where exceptions are dropped", "in C"],
)
def test_the_process_ends_in_time(sent: signal.Signals, body: str, within: float):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.5)  # so that it is where it will stay
    began = time.monotonic()
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < within + 4  # on a busy machine
    if within == 2:
        assert out == f"[{int(sent)}]\n".encode()
    else:
        assert process.returncode == 128 + sent
        assert err == b"ray-sampler: interrupted\n"


def test_a_ctrl_c_that_was_ignored_at_the_start_stays_so():
    body = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    run = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", SCRIPT.format(body=body)]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"ready\n[]\n", b"")


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
