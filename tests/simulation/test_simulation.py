"""Runs on simulated clusters on which things go wrong: what must hold does, and a missing safeguard shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.simulation.__main__ import main
from tests.simulation.play import SAFEGUARDS, Outcome, Simulation
from tests.simulation.storm import WEIGHTS, Settings

BROKEN = {
    "requeue": "no index lost",
    "duplicate": "no index written twice",
    "forget": "no actor left",
}


def played(**settings: Any) -> Outcome:
    outcome = Simulation(Settings(**settings)).run()
    assert outcome.broken is None
    assert outcome.lost == outcome.duplicated == 0
    assert outcome.finished + outcome.given_up == settings["shards"]
    return outcome


def test_sixty_thousand_shards_survive_a_thousand_faults_of_every_kind() -> None:
    outcome = played(seed=3, actors=400, shards=60_000, kills=2_000)
    assert outcome.given_up <= 600
    assert outcome.kills.keys() >= WEIGHTS.keys() - {"all nodes die", "poison"}
    assert outcome.kills.total() > 1_000


@pytest.mark.parametrize(
    ("actors", "shards", "kills"),
    [(1, 300, 0), (1, 300, 40), (333, 99, 100), (7, 1000, 100), (3, 13, 500), (20, 1, 17), (100, 2001, 400), (2, 2, 3)],
)
def test_runs_of_every_size_end_with_each_shard_finished_or_given_up(actors: int, shards: int, kills: int) -> None:
    for seed in range(5):
        outcome = played(seed=seed, actors=actors, shards=shards, kills=kills)
        assert kills or not outcome.given_up


def test_a_run_that_gets_no_machine_reports_every_shard() -> None:
    outcome = played(actors=10, shards=100, kills=5, nodes=0)
    assert (outcome.finished, outcome.given_up) == (0, 100)
    assert "no machine" in next(iter(outcome.reasons))


def test_all_nodes_may_die_at_once_again_and_again() -> None:
    simulation = Simulation(Settings(seed=1, actors=50, shards=5_000, kills=0))
    for at in range(100, 1000, 150):
        simulation.storm.later(at, lambda: simulation.storm.strike("all nodes die"))
    outcome = simulation.run()
    assert (outcome.broken, outcome.finished) == (None, 5_000)
    assert outcome.kills["all nodes die"] >= 2


@pytest.mark.parametrize("safeguard", SAFEGUARDS)
def test_a_safeguard_that_is_disabled_breaks_an_invariant_which_is_named(
    safeguard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seed", "7", "--actors", "50", "--shards", "3000", "--kills", "200"]
    assert main([*arguments, "--break", safeguard]) == 1
    printed = capsys.readouterr()
    assert f"broken: {BROKEN[safeguard]}" in printed.err
    assert main(arguments) == 0


def test_the_same_seed_prints_the_same_line_but_for_time_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seed", "11", "--actors", "40", "--shards", "2000", "--kills", "300"]
    assert main(arguments) == 0
    here = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "tests.simulation", *arguments]
    elsewhere = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "5"}, capture_output=True, text=True, check=True
    )
    there = json.loads(elsewhere.stdout)
    assert list(here) == [
        *("kills", "lost", "duplicated", "given_up"),
        *("virtual_seconds", "driver_seconds", "peak_memory"),
    ]
    for changing in ("driver_seconds", "peak_memory"):
        assert here.pop(changing) > 0
        assert there.pop(changing) > 0
    assert here == there


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--actors", "0"], "'0' is not a number of actors; give a whole number, 1 or more"),
        (["--shards", "many"], "'many' is not a number of shards; give a whole number, 1 or more"),
        (["--kills", "-1"], "'-1' is not a number of faults; give a whole number, 0 or more"),
        (["--break", "all"], "invalid choice: 'all'"),
        (["--speed", "2"], "unrecognized arguments: --speed 2"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, check=lambda ended: ended.code == 2):
        main(arguments)
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
