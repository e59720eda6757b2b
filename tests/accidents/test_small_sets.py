"""Small sample sets: every actor has work, the first fragment comes soon, and what padding costs is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.cluster.driver import run
from ray_sampler.cluster.shards import SHARDS_PER_ACTOR, expected_actors, padding, suitable_size, tapered, tasks_of
from ray_sampler.config import LARGEST_SHARD, FleetOptions
from ray_sampler.storage.record import FragmentName
from tests.cluster.runs import fragments, part, sampled, savez
from tests.conftest import Configure


@given(st.integers(1, 10**6), st.integers(1, 2000), st.integers(1, 64))
def test_shards_are_whole_batches_several_for_each_actor_and_not_too_large(num_samples: int, batch: int, actors: int):
    size = suitable_size(num_samples, batch, actors)
    batches = -(-num_samples // batch)
    assert size % batch == 0
    assert size <= max(LARGEST_SHARD, batch)
    shards = -(-num_samples // size)
    assert shards >= min(batches, SHARDS_PER_ACTOR * actors)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "actors", "size"),
    [(64, 16, 2, 16), (500, 16, 8, 16), (50_000, 64, 8, 512), (1000, 50, 2, 100), (1000, 50, 1, 250), (4, 128, 2, 128)],
)
def test_sizes_of_usual_runs(num_samples: int, batch_size: int, actors: int, size: int):
    assert suitable_size(num_samples, batch_size, actors) == size


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 6), st.integers(0, 8))
def test_the_first_shards_are_batches_and_later_ones_grow(num_samples: int, batch: int, batches: int, actors: int):
    tasks = list(tasks_of([(0, num_samples)], batch * batches, early=actors, early_size=batch))
    assert [i for task in tasks for i in range(task.start, task.stop)] == list(range(num_samples))
    if actors:
        assert all(task.stop - task.start <= batch * 2 ** (k // actors) for k, task in enumerate(tasks))
    assert all(task.start % batch == 0 for task in tasks)
    assert all(task.start // (batch * batches) == (task.stop - 1) // (batch * batches) for task in tasks)


@given(st.integers(1, 500), st.integers(1, 20), st.integers(1, 8), st.integers(1, 6))
def test_the_last_shards_are_small_and_leave_nothing_out(num_samples: int, batch: int, batches: int, actors: int):
    tasks = list(tasks_of([(0, num_samples)], batch * batches))
    small = batch * max(1, batches // 4)
    cut = tapered(tasks, actors, small)
    assert [i for task in cut for i in range(task.start, task.stop)] == list(range(num_samples))
    assert all(task.start % batch == 0 for task in cut)
    assert all(task.stop - task.start <= small for task in cut if task.start >= tasks[-min(actors, len(tasks))].start)


@pytest.mark.parametrize(("batch", "actors", "seconds"), [(16, 2, 1.0), (25, 3, 1.0), (64, 8, 5.0)])
def test_no_actor_is_idle_for_long_while_samples_are_missing(batch: int, actors: int, seconds: float):
    """In a simulation in which each actor takes the next shard when it has done one, and a batch takes `seconds`."""
    for num_samples in (64, 500, 1000, 5000, 50_000):
        size = suitable_size(num_samples, batch, actors)
        tasks = tasks_of([(0, num_samples)], size, early=actors, early_size=batch)
        shards = tapered(list(tasks), actors, batch * max(1, size // batch // 4))
        busy = [0.0] * actors
        for shard in shards:
            now = busy.index(min(busy))
            busy[now] += seconds * -(-(shard.stop - shard.start) // batch)
        ideal = seconds * -(-num_samples // batch) / actors
        assert max(busy) - ideal <= max(seconds, 0.06 * ideal), (num_samples, size)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("flags", "gpus", "local", "actors"),
    [({}, 0.0, True, 2), ({"max_actors": 1}, 0.0, True, 1), ({}, 1.0, False, 8), ({"max_actors": 3}, 1.0, False, 3)],
)
def test_the_fleet_is_what_there_is_and_in_a_cluster_what_may_come(flags: dict[str, Any], gpus, local, actors):
    assert expected_actors(FleetOptions(**flags), gpus, local) == actors


@pytest.mark.usefixtures("local_ray")
def test_without_a_shard_size_every_actor_has_several_shards(configure: Configure, samples, tmp_path: Path):
    """And the bytes are those of any other size, while run.json says what it said before."""
    config = configure(shard_size=None, max_actors=2)
    result = run(config)
    names = [name for name in map(FragmentName.parse, fragments(tmp_path / "run")) if name]
    assert len(names) == 10  # batches of four
    assert Path(result.archive).read_bytes() == savez(samples)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["shard_size"] == 512


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "better", "thrown_away"),
    [(4, 128, 4, 124), (130, 128, 65, 126), (10, 8, 5, 6)],
)
def test_padding_that_costs_much_is_said(num_samples: int, batch_size: int, better: int, thrown_away: int):
    note = padding(num_samples, batch_size)
    assert note is not None
    assert f"--batch_size {better} avoids" in note
    assert f"of which {thrown_away} only" in note
    assert padding(num_samples, better) is None


@given(st.integers(1, 10_000), st.integers(1, 600))
def test_the_batch_size_that_is_named_avoids_the_padding(num_samples: int, batch_size: int):
    note = padding(num_samples, batch_size)
    if note is None:
        least = -(-num_samples // -(-num_samples // batch_size)) == batch_size
        assert -num_samples % batch_size <= num_samples / 4 or least
    else:
        better = int(note.split("; --batch_size ")[1].split()[0])
        assert better < batch_size
        assert -num_samples % better < -(-num_samples // better)


@pytest.mark.usefixtures("local_ray")
def test_a_run_says_what_its_padding_costs(configure: Configure, capsys):
    config = configure(num_samples=4, batch_size=8, steps=1, progress="log")
    run(config)
    assert "--batch_size 4 avoids that" in capsys.readouterr().err
    run(config)
    said = capsys.readouterr().err
    assert "the archive is complete already" in said
    assert "avoids that" not in said


@pytest.mark.usefixtures("local_ray")
def test_indices_that_end_early_are_warned_of(configure: Configure, capsys):
    run(configure(num_samples=4, sampler="multistep", steps=40, ts="0,10,25", progress="log"))
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "--ts ends at 25" in warning
    assert "which is 39" in warning
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    assert f"noise of level {(high + 25 / 39 * (low - high)) ** 7:.3g}" in warning


def test_a_run_of_another_size_has_the_same_samples(configure: Configure, samples):
    few = sampled(replace(configure(), num_samples=8))
    assert savez(few) == savez(part(samples, 0, 8))
