"""Fleets of several kinds of nodes: one that never comes, one that comes and goes, and two that compute differently."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_sampler import cli
from ray_sampler.cluster import dispatch
from ray_sampler.cluster.worker import Task
from tests.cluster.fleets import NODE, Fleet
from tests.cluster.processes import PATIENCE_S, started, wait_for
from tests.cluster.simulated import Play
from tests.conftest import Configure
from tests.simulation.cluster import START_S, Simulated


def shards(count: int) -> list[Task]:
    return [Task(0, i, i + 8) for i in range(0, 8 * count, 8)]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_unplaced", lambda fleet: "nothing is free")


def comes_and_goes(cluster: Simulated, stays_s: float, minutes: int) -> None:
    """A node that is there for some seconds of each minute, and has another name each time, as Ray names it."""
    for minute in range(minutes):
        name = f"passing {minute}"
        cluster.later(60.0 * minute + 1.0, lambda name=name: cluster.add_node(name))  # type: ignore[misc]
        cluster.later(60.0 * minute + 1.0 + stays_s, lambda name=name: cluster.lose(name))  # type: ignore[misc]


def test_nodes_that_never_come_keep_no_work_from_those_that_are_there() -> None:
    cluster = Simulated(2)
    play = Play(cluster, shards(60), max_actors=8)
    assert play.run() == {}
    assert sorted(play.finished) == shards(60)
    assert len(cluster.asked) == 8
    assert cluster.clock < 60 / 2 * cluster.seconds + 60
    assert play.pool.pending() == 0, "at the end none is asked for any more"


def test_a_node_that_goes_before_its_actor_has_started_does_not_stop_a_run_in_which_others_work() -> None:
    """Shards here take ten minutes, and so nothing is finished between three starts that fail with their nodes."""
    cluster = Simulated(1, seconds=600.0)
    comes_and_goes(cluster, stays_s=START_S - 1, minutes=60)
    play = Play(cluster, shards(5), max_actors=2)
    assert play.run() == {}
    assert sorted(play.finished) == shards(5)
    assert len(cluster.asked) <= cluster.clock / 60 + 3, "one start for each time that the node comes"


def test_a_node_that_goes_amid_its_work_costs_what_was_in_flight() -> None:
    cluster = Simulated(1, seconds=20.0)
    comes_and_goes(cluster, stays_s=35.0, minutes=60)
    play = Play(cluster, shards(100), max_actors=2)
    assert play.run() == {}
    assert sorted(play.finished) == shards(100)
    assert len(cluster.given) - 100 <= 2 * len(cluster.lost_nodes)


@pytest.mark.accidents
def test_two_kinds_of_cpus_in_one_run_are_reported_as_two_numerics_keys(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second has none of the vector instructions, as far as torch knows."""
    output, log = tmp_path / "run", tmp_path / "log"
    fleet = Fleet(workers=1)
    try:
        plain = {"ATEN_CPU_CAPABILITY": "default"}
        fleet.workers.append(fleet.cluster.add_node(num_cpus=1, env_vars=plain, **NODE))
        flags = {"num_samples": 240, "shard_size": 4, "steps": 40, "max_actors": 2, "progress": "log"}
        with started(configure(**flags, address=fleet.address), log) as process:
            wait_for(lambda _: "actors 2 ready" in log.read_text(), output, process, log)
            assert process.wait(PATIENCE_S) == 0, log.read_text()
    finally:
        fleet.close()
    summary = json.loads((output / "summary.json").read_text())
    keys = [each["key"] for each in summary["computed_by"]]
    assert summary["mixed_numerics"] is True
    assert len(keys) == 2
    assert sum(each["samples"] for each in summary["computed_by"]) == 240
    assert any(", DEFAULT" in key for key in keys)
    assert cli.main(["status", str(output), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["mixed_numerics"], status["numerics_keys"]) == (True, sorted(keys))
    assert cli.main(["verify", str(output)]) == 0
    assert f"computed under 2 numerics keys: {'; '.join(sorted(keys))}" in capsys.readouterr().out
