"""A short, fixed selection of what `make chaos` does at length."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.harness import Chaos
from tests.faults.servers import rclone
from tests.faults.sweep import faulty_bucket

SEED = 5


@pytest.mark.accidents
@pytest.mark.skipif(rclone() is None, reason="rclone is not installed")
def test_runs_that_are_killed_and_spoiled_end_in_the_bytes_of_an_undisturbed_one(checkpoint: Path, tmp_path: Path):
    with faulty_bucket(tmp_path / "bucket", tmp_path / "aws") as proxy:
        chaos = Chaos(checkpoint, tmp_path, proxy, SEED)
        try:
            for place in ("folder", "bucket"):
                chaos.round(place, most=2)
        finally:
            chaos.close()
    score = chaos.score
    assert score.failures == []
    assert score.identical == 2
    assert score.lost == 0
    assert score.in_bucket == 1
    assert score.faults.total() > 0
    assert score.kills.total() > 0
    assert score.damages.total() > 0
