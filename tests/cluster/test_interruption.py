"""A run that is killed anywhere continues where it stopped, with the bytes of one that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster.processes import PROMPT_S, Moment, claimed, kill_session, session_is_gone, started, wait_for, written
from tests.cluster.runs import LONGER, recorded_seconds, savez, whole
from tests.conftest import Configure

pytestmark = pytest.mark.accidents

LONG_ARCHIVE = "samples_48x8x8x3.npz"


def fragment_times(output: Path) -> dict[str, int]:
    return {name: (output / "fragments" / name).stat().st_mtime_ns for name in whole(output)}


def test_a_run_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(
    configure: Configure, tmp_path: Path, longer_samples, local_ray
):
    """Killed with all its actors: while Ray starts, and in the middle of its fragments."""
    from ray_sampler.cluster.driver import run

    output, log = tmp_path / "run", tmp_path / "log"
    config = configure(**LONGER)
    kept: dict[str, int] = {}
    for moment in (claimed, written(5)):
        with started(config, log) as process:
            wait_for(moment, output, process, log)
            kill_session(process)
        assert fragment_times(output).items() >= kept.items()
        kept = fragment_times(output)
        assert not (output / LONG_ARCHIVE).exists()
    summary = run(config).summary
    assert (output / LONG_ARCHIVE).read_bytes() == savez(longer_samples)
    assert fragment_times(output).items() >= kept.items()
    assert summary["reused"] == 4 * len(kept) >= 20
    assert summary["rejected"] == []
    assert summary["seconds"]["computing"] == pytest.approx(recorded_seconds(output), abs=1e-3)


@pytest.mark.parametrize(
    ("sent", "code", "moment"),
    [
        pytest.param(signal.SIGTERM, 143, written(2), id="SIGTERM while samples are written"),
        pytest.param(signal.SIGINT, 130, claimed, id="SIGINT while Ray starts"),
    ],
)
def test_an_interrupted_run_says_in_one_sentence_how_to_resume_and_leaves_no_process(
    configure: Configure, tmp_path: Path, sent: signal.Signals, code: int, moment: Moment
):
    output, log = tmp_path / "run", tmp_path / "log"
    with started(configure(**LONGER | {"num_samples": 4000}), log) as process:
        wait_for(moment, output, process, log)
        process.send_signal(sent)
        assert process.wait(PROMPT_S) == code
        assert session_is_gone(process.pid)
    lines = log.read_text().splitlines()
    assert [line for line in lines if line.startswith("ray-sampler: ")] == [
        "ray-sampler: interrupted; finished samples are kept: run the same command again to resume"
    ]
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert not list(output.glob(".*.tmp"))  # an actor that is killed may leave what it just wrote, the driver not
    assert not (output / ".probe").exists()
