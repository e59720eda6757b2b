"""The range of levels of a user's network that gives none: that of its kind, or the one a directory was begun with."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ray_sampler.config import RequestError, RunConfig
from ray_sampler.inspection import inspect
from ray_sampler.resolve import dry_run
from ray_sampler.sampling.parameterisation import parameterise
from tests.networks.users_models import Write, job

SOURCE = """
import torch
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x


def make(weights):
    return Model(Network(), {}, (3, 4, 4){})
"""
TABLE = [0.999, 0.9, 0.5, 0.1, 0.005]


@pytest.mark.parametrize(
    ("kind", "options", "low", "high"),
    [
        ("'eps'", f", alphas={TABLE}", math.sqrt(0.001 / 0.999), math.sqrt(0.995 / 0.005)),
        ("'v'", f", alphas={TABLE}, sigma_max=5.0", math.sqrt(0.001 / 0.999), 5.0),
        ("'x0'", "", 0.01, 157.4),
        ("'velocity'", ", data_at=0", 0.002, 1e4),
        ("'x0'", ", data_at=1, sigma_min=0.01", 0.01, 1e4),
        ("'denoiser'", "", 0.002, 80.0),
        ("'edm'", "", 0.002, 80.0),
        ("'velocity'", ", data_at=0, sigma_min=0.002, sigma_max=80.0", 0.002, 80.0),
    ],
)
def test_what_the_model_leaves_open_is_the_kinds(
    kind: str, options: str, low: float, high: float, write: Write
) -> None:
    module = write(SOURCE.format(kind, options))
    schedule = job(module).plan.schedule
    assert [schedule.sigma_min, schedule.sigma_max] == pytest.approx([low, high], rel=1e-3)
    found = inspect(RunConfig(model=f"python:{module}:make"))
    assert (found["sigma_min"], found["sigma_max"]) == (schedule.sigma_min, schedule.sigma_max)
    assert job(module, sigma_max=3.0).plan.schedule.sigma_max == 3.0
    assert dry_run(RunConfig(model=f"python:{module}:make"))["sigma_max"] is None


@pytest.mark.parametrize("output", ["there", None])
@pytest.mark.parametrize(("kind", "options"), [("'velocity'", ", data_at=1"), ("'eps'", "")])
def test_a_directory_begun_with_the_range_that_all_had_resumes_with_it(
    output: str | None, kind: str, options: str, write: Write
) -> None:
    module = write(SOURCE.format(kind, options))
    given = {"output": output} if output else {}
    begun = job(module, **given, sigma_min=0.002, sigma_max=80.0)
    assert job(module, **given).fingerprint != begun.fingerprint
    begun.run_dir.create_run(begun.record())
    again = job(module, **given)
    assert (again.fingerprint, again.run_dir.url) == (begun.fingerprint, begun.run_dir.url)
    assert (again.plan.schedule.sigma_min, again.plan.schedule.sigma_max) == (0.002, 80.0)
    with pytest.raises(RequestError, match=r"sigma_max 80\.0, not 20\.0"):
        job(module, output=begun.run_dir.url, sigma_max=20.0)


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ([0.9, 0.5, 0.0], "alphas has 0.0 at index 2, which is all noise; give alphas[:-1]"),
        ([0.9, 0.5, 0.0, 0.0], "alphas has 0.0 at index 2, which is all noise; give alphas[:-2]"),
        ([1.0, 0.5, 0.1], "alphas has 1.0 at index 0, which has no noise; give alphas[1:]"),
        ([1.0, 1.0, 0.5, 0.1], "alphas has 1.0 at index 0, which has no noise; give alphas[2:]"),
        ([0.9, float("nan"), 0.1], "alphas has nan at index 1; it must be a falling table"),
        (
            [0.001, 0.002, 0.02],
            "alphas has 0.001 at index 0; it must be a falling table of cumulative alphas between 0 and 1; "
            "if these are betas, it is torch.cumprod(1 - betas, 0)",
        ),
        ([0.9, 0.95, 0.1], "alphas has 0.9 at index 0; it must be a falling table"),
        ([0.9, -0.5], "alphas has -0.5 at index 1; it must be a falling table"),
    ],
)
def test_a_table_that_cannot_be_sampled_is_refused_with_its_value(
    alphas: list[float], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as error:
        parameterise("v", alphas=alphas)
    assert str(error.value).startswith(said)


def test_an_index_is_rounded_where_the_model_asks_for_it() -> None:
    seen: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        seen.append(t[0].item())
        return x

    alphas = [0.999 - 0.998 * i / 999 for i in range(1000)]
    levels = [math.sqrt((1 - a) / a) for a in alphas]
    x = torch.zeros(1, 1, 1, 1)
    plain, rounded = (parameterise("eps", alphas=alphas, **each) for each in ({}, {"rounded_index": True}))
    for kind in (plain, rounded):
        for level in (levels[332], math.sqrt(levels[332] * levels[333]) * 1.00001):
            kind.denoiser(network, None)(x, torch.tensor(level))
    assert seen[0] == pytest.approx(332, abs=1e-3)
    assert seen[1] == pytest.approx(332.5, abs=0.1)
    assert seen[2:] == [332, 333]
    assert rounded.identity() == plain.identity() | {"rounded_index": True}
