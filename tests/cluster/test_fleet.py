"""Nodes that come late, die, freeze, drain or never come: the run waits, continues, and ends with the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_sampler.cluster.members import START_FAILURES
from ray_sampler.cluster.pool import MOST_IN_FLIGHT
from ray_sampler.config import RunConfig
from tests.cluster.fleets import HEALTH, OPEN, UNWATCHED, Fleet, autoscaling, send
from tests.cluster.processes import PATIENCE_S, PROMPT_S, claimed, started, wait_for, written
from tests.cluster.runs import sampled, savez, whole

pytestmark = pytest.mark.accidents

SEVERAL = {"num_samples": 240, "shard_size": 4, "steps": 40, "max_actors": 2, "progress": "log"}
"""Sixty shards, which take two actors on this machine long enough to have nodes come and go."""
ARCHIVE = "samples_240x8x8x3.npz"


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Without a worker node; a parameter says how Ray looks after them."""
    fleet = Fleet(health=getattr(request, "param", HEALTH))
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> bytes:
    from tests.cluster.runs import small

    return savez(sampled(small(checkpoint, Path("unused"), **SEVERAL)))


def says(text: str, log: Path, since: int = 0) -> Callable[[Path], bool]:
    """Whether a log contains it beyond its first characters."""
    return lambda output: text in log.read_text()[since:]


def ended(process: subprocess.Popen[bytes], output: Path, log: Path) -> dict[str, object]:
    """Wait for the end of a run; its summary."""
    assert process.wait(PATIENCE_S) == 0, log.read_text()
    summary: dict[str, object] = json.loads((output / "summary.json").read_text())
    return summary


def run_into(configure: Callable[..., RunConfig], fleet: Fleet, **flags: object) -> RunConfig:
    return configure(**SEVERAL | {"address": fleet.address} | flags)


def test_nodes_that_come_late_work_at_once_and_nodes_that_die_cost_only_what_was_in_flight(
    configure, tmp_path, fleet, expected
):
    output, log = tmp_path / "run", tmp_path / "log"
    with started(run_into(configure, fleet), log) as process:
        wait_for(says("waiting for capacity", log), output, process, log)
        first = fleet.add()
        wait_for(written(3), output, process, log)
        fleet.add()
        wait_for(says("actors 2 ready", log), output, process, log)
        before = len(whole(output))
        fleet.kill(first)
        wait_for(written(before + 4), output, process, log)
        said = len(log.read_text())
        fleet.kill(fleet.workers[0])  # now there is none: a state to wait in
        wait_for(says("waiting for capacity", log, said), output, process, log)
        fleet.add()
        summary = ended(process, output, log)
    assert (output / ARCHIVE).read_bytes() == expected
    assert 1 <= int(str(summary["retries"])) <= 2 * MOST_IN_FLIGHT  # two deaths
    assert summary["computed"] == 240


def test_a_run_without_capacity_waits_reports_it_and_ends_in_a_sentence_on_ctrl_c(configure, tmp_path, fleet):
    output, log = tmp_path / "run", tmp_path / "log"
    with started(run_into(configure, fleet), log) as process:
        wait_for(says("waiting for capacity", log), output, process, log)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PROMPT_S) == 130
    assert log.read_text().splitlines()[-1].startswith("ray-sampler: interrupted; finished samples are kept")
    assert claimed(output)


@pytest.mark.parametrize("fleet", [UNWATCHED], indirect=True)
def test_a_frozen_node_raises_nothing_and_is_done_without(configure, tmp_path, fleet, expected):
    output, log = tmp_path / "run", tmp_path / "log"
    silent, _ = fleet.add(), fleet.add()
    with started(run_into(configure, fleet, shard_timeout=4.0), log) as process:
        wait_for(says("actors 2 ready", log), output, process, log)
        frozen = fleet.freeze(silent)
        try:
            ended(process, output, log)
        finally:
            send(signal.SIGCONT, frozen)
    assert "no sign of progress for" in log.read_text()
    assert (output / ARCHIVE).read_bytes() == expected


def test_actors_that_waited_at_a_node_that_died_are_not_to_blame(configure, tmp_path, fleet, expected):
    """Ray gives them to a node that it does not know to be dead, and cancels all of them when it does."""
    output, log = tmp_path / "run", tmp_path / "log"
    node = fleet.add()
    with started(run_into(configure, fleet, max_actors=START_FAILURES + 1), log) as process:
        wait_for(says("actors 0 ready", log), output, process, log)  # a node that is frozen before is dead by now
        frozen = fleet.freeze(node)
        try:
            wait_for(says("could not start", log), output, process, log)
            fleet.add()
            ended(process, output, log)
        finally:
            send(signal.SIGCONT, frozen)
    assert log.read_text().count("could not start") >= START_FAILURES
    assert (output / ARCHIVE).read_bytes() == expected


def test_a_draining_node_gets_no_new_shard_and_goes_before_the_run_ends(configure, tmp_path, fleet, expected):
    output, log = tmp_path / "run", tmp_path / "log"
    leaving, _ = fleet.add(), fleet.add()
    with started(run_into(configure, fleet), log) as process:
        wait_for(says("actors 2 ready", log), output, process, log)
        assert leaving.node_id in fleet.alive()
        fleet.drain(leaving)
        wait_for(lambda _: leaving.node_id not in fleet.alive(), output, process, log)
        summary = ended(process, output, log)
    assert summary["failures"] == summary["retries"] == 0  # what it was at was finished
    assert (output / ARCHIVE).read_bytes() == expected


def test_an_autoscaler_brings_nodes_for_the_run_and_takes_them_away_again(configure, tmp_path, expected):
    output, log = tmp_path / "run", tmp_path / "log"
    with autoscaling(most=3) as cluster:
        assert cluster.nodes() == 1
        config = configure(**SEVERAL | {"address": cluster.address, "max_actors": 3})
        with started(config, log, OPEN) as process:
            wait_for(lambda _: cluster.nodes() == 4, output, process, log)
            ended(process, output, log)
        deadline = time.monotonic() + PATIENCE_S
        while cluster.nodes() > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert cluster.nodes() == 1
    assert (output / ARCHIVE).read_bytes() == expected
