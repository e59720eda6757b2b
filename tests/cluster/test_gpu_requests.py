"""What a request for GPUs means: which are refused, when a network is compiled, and what the user is told of auto."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ray_sampler.cluster.job import REPAID_CALLS, Job, prepare
from ray_sampler.cluster.session import Fleet, plan_fleet
from ray_sampler.config import FleetOptions, RunConfig
from ray_sampler.errors import RequestError


@pytest.mark.parametrize("gpus", [2.0, 1.5, -1.0])
def test_an_actor_has_one_gpu_at_most(gpus: float) -> None:
    with pytest.raises(RequestError, match=rf"--gpus_per_actor is {gpus}; it must be 0, a fraction of 1, or 1"):
        RunConfig(gpus_per_actor=gpus).check()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let Ray report this number of GPUs."""
    return lambda count: monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": count})


@pytest.mark.parametrize(
    ("there", "of_actor", "most"), [(1.0, 1.0, 1), (2.0, 0.5, 4), (2.0, 0.6, 2), (1.0, 0.3, 3), (4.0, 1.0, 4)]
)
def test_as_many_actors_start_here_as_have_room_on_single_cards(
    there: float, of_actor: float, most: int, gpus: Callable[[float], None]
) -> None:
    gpus(there)
    assert plan_fleet(FleetOptions(), of_actor, 100, local=True) == Fleet(of_actor, 1, most)


def test_a_machine_without_a_gpu_is_not_waited_for(gpus: Callable[[float], None]) -> None:
    gpus(0.0)
    with pytest.raises(RequestError, match=r"--gpus_per_actor is 0.5, but Ray finds 0 GPUs on this machine"):
        plan_fleet(FleetOptions(), 0.5, 100, local=True)
    assert plan_fleet(FleetOptions(), 0.5, 100, local=False).max_actors == 100  # a cluster may grow


def test_a_request_that_a_machine_without_a_gpu_cannot_serve_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("ray_sampler.cluster.session.joins_cluster", lambda address: False)
    with pytest.raises(RequestError, match="--gpus_per_actor is 1, but this machine has 0 usable GPUs"):
        prepare(RunConfig(model="digits", gpus_per_actor=1.0, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def job(gpus: float, precision: Any = None, **flags: Any) -> Job:
    """A job of the bundled model, of 10 calls of the network a batch."""
    settings: dict[str, Any] = {"model": "digits", "sampler": "euler", "steps": 10, "batch_size": 4}
    prepared = prepare(RunConfig(**settings | flags))
    config = prepared.config.filled({"precision": precision} if precision else {})
    return replace(prepared, config=config, gpus=gpus)


LONG = REPAID_CALLS // 10 * 4
"""Samples that repay compiling, just."""


@pytest.mark.parametrize(
    ("gpus", "samples", "asked", "done"),
    [
        (1.0, LONG, "auto", "auto"),
        (1.0, LONG - 4, "auto", "off"),
        (1.0, 4, "on", "on"),
        (1.0, LONG, "off", "off"),
        (0.0, 4, "auto", "auto"),  # which compiles nothing on a CPU anyway
    ],
)
def test_auto_compiles_what_repays_it(gpus: float, samples: int, asked: str, done: str) -> None:
    found = job(gpus, compile=asked, num_samples=samples)
    assert found.compile == done
    assert any("--compile auto does not compile" in note for note in found.notes) == (asked != done)


def test_auto_says_when_an_earlier_start_bound_it_to_fp32() -> None:
    bound = job(1.0, "fp32", num_samples=LONG)
    assert [note for note in bound.notes if note.startswith("--precision auto stays fp32")]
    for other in (
        job(1.0, "fp16", num_samples=LONG),
        job(0.0, "fp32", num_samples=LONG),
        job(1.0, num_samples=LONG, use_fp16=False),  # asked for, so no surprise
    ):
        assert other.notes == []
