"""No change of a fragment's bytes goes unnoticed, crashes the reader, or makes it take memory or time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("format", "seed"), [("parquet", 0), ("npz", 1)])
def test_every_flipped_byte_every_length_and_much_by_chance(format, seed):
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.faults.fuzz", format, str(seed), "150"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.replace("'", '"'))
    assert set(outcomes) == {"found", "harmless"}
    assert outcomes["found"] > 3000
