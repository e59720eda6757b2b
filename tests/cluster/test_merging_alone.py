"""A local run that has all its fragments and lacks the archive starts no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_sampler import RunConfig, run
from ray_sampler.cluster import driver
from tests.cluster.runs import leave, part, sampled, savez, small


class RayStarted(Exception):
    """In place of a Ray."""


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RayStarted

    monkeypatch.setattr(driver, "own_ray", refuse)
    monkeypatch.setattr("ray_sampler.cluster.session.joins_cluster", lambda address: False)


def left(checkpoint: Path, output: Path, **flags: Any) -> tuple[RunConfig, bytes]:
    """The request of a run that was killed before its archive was there, and the archive's bytes."""
    config = small(checkpoint, output, num_samples=24, shard_size=8, **flags)
    samples = sampled(config)
    leave(config, samples, [(0, 8), (8, 16), (16, 24)])
    return config, savez(samples)


def archive_of(config: RunConfig) -> bytes:
    return Path(run(config).archive).read_bytes()


@pytest.mark.usefixtures("no_ray")
def test_an_archive_that_must_only_be_merged_is_merged_here(checkpoint: Path, tmp_path: Path):
    config, expected = left(checkpoint, tmp_path / "run")
    assert archive_of(config) == expected
    assert {path.name for path in (tmp_path / "run").iterdir()} > {"report.html", "preview.png", "summary.json"}


@pytest.mark.usefixtures("no_ray")
def test_a_run_shrinks_and_grows_back(checkpoint: Path, tmp_path: Path):
    config, expected = left(checkpoint, tmp_path / "run")
    smaller = small(checkpoint, tmp_path / "run", num_samples=20, shard_size=8)
    assert archive_of(smaller) == savez(part(sampled(config), 0, 20))
    assert archive_of(config) == expected


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_what_must_be_computed_needs_ray(checkpoint: Path, tmp_path: Path, damage: str):
    config, _ = left(checkpoint, tmp_path / "run")
    victim = tmp_path / "run" / "fragments" / "000000000008-000000000016.parquet"
    victim.unlink() if damage == "missing" else victim.write_bytes(victim.read_bytes()[:-10])
    with pytest.raises(RayStarted):
        run(config)
    assert not list((tmp_path / "run").glob("samples_*"))
