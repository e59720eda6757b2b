"""Levels far apart, very large, or near each other: coefficients are exact, and no solver makes NaN."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_sampler.options import of
from ray_sampler.sampling.parameterisation import parameterise
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SOLVERS, Solver

DATA = 0.3
ANY_NETWORK = [name for name, solver in SOLVERS.items() if solver.path == "any"]
RANGES = [(1e-5, 1e5), (1e-3, 1e6), (1e-6, 1e7), (0.99999, 1.0)]


def near_data(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
    """D of data that is one picture."""
    return torch.full_like(x, DATA)


def solved(solver: Solver, low: float, high: float, dtype: torch.dtype) -> Tensor:
    given = {"restarts": f"3,2,{low},{high / 2}", "ts": "0,2,3", "s_churn": 1.0, "eta": 1.0}
    options: Any = of(solver.options, given if high > 2 * low else given | {"restarts": f"3,2,{low},{high}"})
    schedule = ScheduleOptions(steps=4, sigma_min=low, sigma_max=high)
    noise = torch.linspace(-2, 2, 16, dtype=torch.float32).reshape(4, 1, 2, 2)
    levels = solver.levels(schedule, options, dtype)
    return solver.run(near_data, noise.to(dtype) * high, levels, lambda draw: noise.flip(0), options)


@pytest.mark.parametrize("name", ANY_NETWORK)
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_every_solver_finds_the_data_from_any_level(name: str, low: float, high: float) -> None:
    assert solved(SOLVERS[name], low, high, torch.float32).isfinite().all()
    x = solved(SOLVERS[name], low, high, torch.float64)
    ends_at = low if name == "progdist" else 0.0
    assert (x - DATA).abs().max() <= 3 * ends_at + 1e-9 * high


@pytest.mark.parametrize("ratio", [1 + 1e-6, 1.5, 10.0, 5e3, 1e6, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ancestral_steps_have_exact_coefficients(ratio: float, dtype: torch.dtype) -> None:
    sigmas = torch.tensor([ratio * 0.01, 0.01], dtype=dtype)
    from_, to = sigmas.tolist()
    one = torch.ones(1, 1, 1, 1, dtype=dtype)

    def coefficient(x: float, denoised: float, drawn: float) -> float:
        D = lambda *_: one * denoised  # noqa: E731
        return SOLVERS["ancestral"].run(D, one * x, sigmas, lambda draw: one * drawn, None).item()

    up, down = math.sqrt((from_ - to) / from_ * (from_ + to) / from_) * to, to * to / from_
    rounding = 4 * torch.finfo(dtype).eps
    assert coefficient(0.0, 0.0, 1.0) == pytest.approx(up, rel=rounding)
    assert coefficient(from_, 0.0, 0.0) == pytest.approx(down, rel=rounding, abs=rounding * from_)


# Flows, whose network gets x_t and t at every level.


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
@pytest.mark.parametrize("sigma", [1e-6, 0.002, 0.5, 1.0, 80.0, 1e4, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("each", [False, True])
def test_a_flows_network_gets_its_input_and_time_exact_to_rounding(
    data_at: int, kind: str, sigma: float, each: bool
) -> None:
    seen: dict[str, Tensor] = {}

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.update(x=x, t=t)
        clean, noise = torch.full_like(x, DATA), (x.double() - DATA / (1 + sigma)) * (1 + sigma) / sigma
        if kind == "x0":
            return clean
        return (clean - noise if data_at else noise - clean).float()

    x = (DATA + sigma * torch.linspace(-3, 3, 8, dtype=torch.float64)).reshape(2, 1, 2, 2).float()
    level = torch.tensor([sigma] * 2 if each else sigma, dtype=torch.float64)
    denoised = parameterise(kind, data_at=data_at).denoiser(network, None)(x, level)
    t = 1 / (1 + sigma) if data_at else sigma / (1 + sigma)
    assert (seen["x"].dtype, seen["t"].dtype, seen["t"].shape) == (torch.float32, torch.float32, (2,))
    torch.testing.assert_close(seen["x"].double(), x.double() / (1 + sigma), rtol=1.3e-7, atol=0)
    torch.testing.assert_close(seen["t"].double(), torch.full((2,), t, dtype=torch.float64), rtol=1e-7, atol=0)
    torch.testing.assert_close(denoised, torch.full_like(x, DATA), rtol=0, atol=2e-6)


def test_a_flow_starts_so_near_to_noise_that_eulers_result_is_that_of_noise() -> None:
    """Of data N(1, 1), whose flow is linear in x: steps even in t, the first level at the default or at infinity."""
    low, high = getattr(parameterise("velocity", data_at=0), "levels")  # noqa: B009
    noise = torch.linspace(-4, 4, 33, dtype=torch.float64).reshape(-1, 1, 1, 1)

    def linear(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        return (x + sigma**2) / (1 + sigma**2)

    def result(first: float) -> Tensor:
        t = torch.linspace(high / (1 + high), low / (1 + low), 25, dtype=torch.float64)
        levels = torch.cat([t / (1 - t), torch.zeros(1, dtype=torch.float64)])
        levels[0] = first
        return SOLVERS["euler"].run(linear, noise * first, levels, lambda draw: noise, None)

    assert (result(high) - result(1e12)).abs().max() < 1e-3
