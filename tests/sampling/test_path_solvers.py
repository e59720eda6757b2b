"""Solvers of flows against closed forms for Gaussian data, and ddpm against its formulas on the path of a table."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ray_sampler.errors import RequestError
from ray_sampler.sampling.parameterisation import LINEAR_ALPHAS, Preconditioned, parameterise
from ray_sampler.sampling.path_solvers import TableOptions
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SOLVERS, NoOptions
from tests.sampling.mixture import STD, no_noise

X_T = torch.tensor([-2.0, -0.3, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)


def slope(t: float) -> float:
    """v(x, t) / x for data of N(0, STD^2): E[noise - data | x_t]."""
    return (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2)


def velocity(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
    """Of a flow, whose solvers give it t in place of sigma."""
    return slope(float(sigma)) * x


def times_of(name: str, steps: int, shift: float = 1.0) -> Tensor:
    schedule = ScheduleOptions(steps=steps, schedule="shifted", shift=shift)
    SOLVERS[name].check(schedule, NoOptions())
    return SOLVERS[name].levels(schedule, NoOptions(), torch.float64)


def error_of(name: str, steps: int, shift: float = 1.0) -> float:
    """Of the state at t = 0, which is STD x_T for these data."""
    found = SOLVERS[name].run(velocity, X_T, times_of(name, steps, shift), no_noise, NoOptions())
    return float((found / X_T - STD).abs().max())


def test_flow_times_are_even_or_shifted() -> None:
    assert times_of("flow_euler", 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert times_of("flow_euler", 1).tolist() == [1.0, 0.0]
    assert times_of("flow_heun", 4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert times_of("flow_sde", 4).tolist() == pytest.approx([1.0, 0.68, 0.36, 0.04, 0.0])
    assert times_of("flow_sde", 1).tolist() == [1.0, 0.0]
    assert times_of("flow_sde", 3, 0.5).tolist() == pytest.approx([1.0, 0.26 / 0.74, 0.02 / 0.98, 0.0])


def test_euler_is_the_product_of_its_steps() -> None:
    times = times_of("flow_euler", 7, 2.0).tolist()
    expected = math.prod(1 + (after - t) * slope(t) for t, after in pairwise(times))
    found = SOLVERS["flow_euler"].run(velocity, X_T, times_of("flow_euler", 7, 2.0), no_noise, NoOptions())
    torch.testing.assert_close(found, expected * X_T, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "order"), [("flow_euler", 1), ("flow_heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_flows_converge_with_the_order_of_the_solver(name: str, order: int, shift: float) -> None:
    errors = [error_of(name, steps, shift) for steps in (160, 320, 640)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.12)


def spread(steps: int) -> float:
    """The variance of flow_sde's result: the sum of the squares of what x_T and each draw contribute to it."""
    sources = torch.eye(steps + 1, dtype=torch.float64).reshape(steps + 1, steps + 1, 1, 1)
    run = SOLVERS["flow_sde"].run
    times = times_of("flow_sde", steps)
    x = run(velocity, sources[:, :1], times, lambda draw: sources[:, draw : draw + 1], NoOptions())
    return float(x.square().sum())


def test_the_sde_has_the_variance_of_euler_maruyama_and_in_the_limit_that_of_the_path() -> None:
    variance = 1.0
    for t, after in pairwise(times_of("flow_sde", 9).tolist()):
        score = -((1 - t) * slope(t) + 1) / t
        drift = slope(t) - t * score
        variance = variance * (1 + (after - t) * drift) ** 2 + (2 * t * (t - after) if after > 0 else 0)
    assert spread(9) == pytest.approx(variance, rel=1e-12)
    last = 0.04
    of_path = (1 - last) ** 2 * STD**2 + last**2
    limit = of_path * (1 - last * ((2 - last) * slope(last) + 1)) ** 2
    assert limit == pytest.approx(STD**2, rel=0.1)
    coarse, fine = (abs(spread(steps) - limit) for steps in (100, 800))
    assert fine < coarse / 4


def test_the_last_step_of_the_sde_adds_no_noise() -> None:
    drawn: list[int] = []

    def noise(draw: int) -> Tensor:
        drawn.append(draw)
        return torch.zeros_like(X_T)

    SOLVERS["flow_sde"].run(velocity, X_T, times_of("flow_sde", 5), noise, NoOptions())
    assert drawn == [1, 2, 3, 4]


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("kind", ["velocity", "x0"])
def test_a_flow_has_one_velocity_whatever_its_network_says(kind: str, data_at: int) -> None:
    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        ours = float(1 - t[0]) if data_at else float(t[0])
        v = slope(ours) * x
        if kind == "x0":
            return x - ours * v
        return -v if data_at else v

    parameterisation = parameterise(kind, data_at=data_at)
    assert isinstance(parameterisation, Preconditioned)
    for t in (1.0, 0.9, 0.3, 0.01):
        found = parameterisation.velocity(network, None)(X_T, torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(found, slope(t) * X_T, rtol=1e-4, atol=1e-5)


# A table of alphas.


def learned(t: float) -> float:
    """Where between its bounds the logarithm of the variance lies, from -1 to 1."""
    return math.sin(t)


def respaced(x: Tensor, indices: list[int], draws: list[Tensor], with_variance: bool) -> Tensor:
    """Ho et al. 2020, algorithm 2, with the betas of a part of the table, and Nichol & Dhariwal 2021, eq. 15."""
    alphas = [1.0, *(LINEAR_ALPHAS[i] for i in indices)]
    for k in range(len(indices), 0, -1):
        beta, remains = 1 - alphas[k] / alphas[k - 1], alphas[k] / alphas[k - 1]
        eps = torch.tanh(x) * 0.7
        mean = (x - beta / math.sqrt(1 - alphas[k]) * eps) / math.sqrt(remains)
        smallest = beta * (1 - alphas[k - 1]) / (1 - alphas[k])
        x = mean
        if k > 1:
            share = (learned(indices[k - 1]) + 1) / 2 if with_variance else 0.0
            log_variance = share * math.log(beta) + (1 - share) * math.log(smallest)
            x = x + math.exp(log_variance / 2) * draws[len(indices) - k]
    return x


@pytest.mark.parametrize("with_variance", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddpm_is_ancestral_sampling_on_a_part_of_the_table(steps: int, with_variance: bool) -> None:
    stream = torch.Generator().manual_seed(steps)
    x, *draws = torch.randn((steps + 1, 2, 3, 4, 4), generator=stream, dtype=torch.float64)

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        variance = torch.full_like(x, learned(round(float(t[0]))))
        return torch.cat([torch.tanh(x) * 0.7, variance], dim=1) if with_variance else torch.tanh(x) * 0.7

    solver, kind = SOLVERS["ddpm"], parameterise("eps")
    assert isinstance(kind, Preconditioned)
    levels = solver.levels(ScheduleOptions(steps=steps), TableOptions(alphas=kind.alphas), torch.float64)
    ask = kind.denoiser(network, None, with_variance=True)
    assert solver.start is not None
    found = solver.run(
        lambda x, sigma, step=None: ask(x, sigma),
        x * solver.start(levels[0]),
        levels,
        lambda draw: draws[draw - 1],
        TableOptions(),
    )
    indices = [round(i * 999 / (steps - 1)) for i in range(steps)] if steps > 1 else [999]
    expected = respaced(x, indices, draws, with_variance)
    # The network computes in float32, and D of the first step is 157 times as large as x_t.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3 if steps == 1 else 2e-4)


def test_a_table_has_no_more_steps_than_levels() -> None:
    short = TableOptions(alphas=(0.9, 0.5, 0.1))
    SOLVERS["ddpm"].check(ScheduleOptions(steps=3), short)
    assert SOLVERS["ddpm"].levels(ScheduleOptions(steps=3), short, torch.float64).tolist() == pytest.approx(
        [3.0, 1.0, 1 / 3, 0.0]
    )
    with pytest.raises(RequestError, match="--steps is 4; for --sampler ddpm it must be at most 3"):
        SOLVERS["ddpm"].check(ScheduleOptions(steps=4), short)
