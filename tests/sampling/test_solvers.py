"""Solvers equal the original's, converge as their papers say, and ask for no noise that they do not use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_sampler.networks.adm_options import TrainingMode
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.conditions import listed_labels
from ray_sampler.sampling.multistep_solvers import multistep
from ray_sampler.sampling.noise import Noise, make_draws, philox_normals
from ray_sampler.sampling.options import Generator, NoiseOptions
from ray_sampler.sampling.plan import MAIN, SamplePlan, sample_block
from ray_sampler.sampling.schedules import karras_sigmas
from ray_sampler.sampling.solvers import (
    Churn,
    NoOptions,
    add_churn,
    ancestral,
    dpm,
    euler,
    heun,
    onestep,
)
from tests.networks.golden import golden_flags, golden_state, options_of
from tests.sampling.plans import plan, solve

# The original's results.

CHURN: dict[str, Any] = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
CASES: dict[str, dict[str, Any]] = {
    "heun": {"sampler": "heun", "steps": 6},
    "heun_noclip": {"sampler": "heun", "steps": 6, "clip_denoised": False},
    "heun_churn": {"sampler": "heun", "steps": 6} | CHURN,
    "euler": {"sampler": "euler", "steps": 6},
    "dpm": {"sampler": "dpm", "steps": 6},
    "dpm_churn": {"sampler": "dpm", "steps": 6} | CHURN,
    "ancestral": {"sampler": "ancestral", "steps": 6},
    "onestep": {"sampler": "onestep", "steps": 6},
    "progdist": {"sampler": "progdist", "steps": 6},
    "multistep": {"sampler": "multistep", "steps": 40, "ts": "0,17,39"},
}
MODES: dict[str, TrainingMode] = {"edm": "edm", "consistency": "consistency_distillation"}
LABELS = listed_labels(np.array([0, 3, 999, 500]), 1000, "a list")
ATOL = 1e-4


@pytest.fixture(scope="session")
def network() -> UNet:
    network = UNet(options_of(golden_flags()))
    network.load_state_dict(golden_state())
    return network.eval()


def originals(**flags: Any) -> SamplePlan:
    """The plan of the original's 4 samples."""
    return plan(LABELS, image_size=32, num_samples=4, **flags)


@torch.no_grad()
def sample(network: UNet, plan: SamplePlan, indices: Tensor) -> Tensor:
    return sample_block({MAIN: network}, plan, indices)[0].clamp(-1, 1)


def test_every_case_of_the_original_is_tested(golden: Path) -> None:
    expected = {"/".join(key) for key in itertools.product(MODES, ("determ", "determ-indiv"), CASES)}
    assert set(np.load(golden / "samples.npz")) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("generator", ["determ", "determ-indiv"])
@pytest.mark.parametrize("mode", MODES)
def test_samples_equal_the_original(golden: Path, network: UNet, mode: str, generator: Generator, case: str) -> None:
    expected = np.load(golden / "samples.npz")[f"{mode}/{generator}/{case}"]
    x = sample(network, originals(training_mode=MODES[mode], generator=generator, **CASES[case]), torch.arange(4))
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("generator", ["determ", "determ-indiv"])
@pytest.mark.parametrize("case", ["heun_churn", "ancestral"])
def test_batches_of_another_size_still_equal_the_original(
    golden: Path, network: UNet, case: str, generator: Generator
) -> None:
    expected = np.load(golden / "samples.npz")[f"edm/{generator}/{case}"]
    cut = originals(generator=generator, **CASES[case])
    x = torch.cat([sample(network, cut, indices) for indices in (torch.tensor([0]), torch.arange(1, 4))])
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=ATOL)


# Data distributed as N(0, STD^2): the ideal denoiser and the solution of the ODE are known.

STD = 0.3
TIGHT, PLAIN = Churn(), NoOptions()


def ideal(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
    return STD**2 / (STD**2 + sigma**2) * x


def exact(x: Tensor, high: float, low: float) -> Tensor:
    """The solution at level `low` of dx/dsigma = (x - D(x, sigma)) / sigma from x at level `high`."""
    return x * math.sqrt((STD**2 + low**2) / (STD**2 + high**2))


def levels(n: int, low: float = 0.05, high: float = 10.0) -> Tensor:
    """n + 1 float64 levels of a rho = 7 schedule, without the zero."""
    ramp = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def philox() -> Noise:
    return make_draws(NoiseOptions(), 4, torch.arange(4), (3, 4, 4)).noise


def no_noise(draw: int) -> Tensor:
    raise AssertionError(f"draw {draw} was asked for, but nothing uses it")


Solve = Callable[[Tensor, Tensor], Tensor]
ORDERS: list[tuple[str, Solve, int]] = [
    ("euler", lambda x, sigmas: euler(ideal, x, sigmas, no_noise, PLAIN), 1),
    ("heun", lambda x, sigmas: heun(ideal, x, sigmas, no_noise, TIGHT), 2),
    ("dpm", lambda x, sigmas: dpm(ideal, x, sigmas, no_noise, TIGHT), 2),
    ("progdist", lambda x, sigmas: euler(ideal, x, sigmas, no_noise, PLAIN), 1),
]


@pytest.mark.parametrize(("name", "run", "order"), ORDERS, ids=[name for name, _, _ in ORDERS])
def test_solvers_converge_to_the_exact_solution_with_their_order(name: str, run: Solve, order: int) -> None:
    x = torch.full((1, 3, 1, 1), 8.0, dtype=torch.float64)
    expected = exact(x, 10.0, 0.05)
    errors = [float((run(x, levels(n)) - expected).abs().max()) for n in (50, 100, 200, 400)]
    slopes = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert slopes == pytest.approx([order] * 3, abs=0.2)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


@pytest.mark.parametrize(("sampler", "tolerance"), [("heun", 1e-3), ("dpm", 1e-3), ("euler", 0.02), ("progdist", 0.02)])
def test_solve_ends_at_the_exact_solution(sampler: str, tolerance: float) -> None:
    """The whole way from x_T to x_0, in float32 and on the default schedule."""
    x_0 = solve(plan(sampler=sampler, steps=200), ideal, lambda draw: torch.full((1, 3, 1, 1), 1.5))
    expected = exact(torch.full((1, 3, 1, 1), 1.5 * 80.0), 80.0, 0.0)
    torch.testing.assert_close(x_0, expected, rtol=tolerance, atol=0)


def test_onestep_is_the_denoiser_at_sigma_max() -> None:
    x, sigmas = torch.full((1, 3, 1, 1), 8.0), karras_sigmas(40, 0.002, 80.0)
    x_0 = onestep(ideal, x, sigmas, no_noise, PLAIN)
    assert torch.equal(x_0, ideal(x, sigmas[0]))
    torch.testing.assert_close(x_0, ideal(x, torch.tensor(80.0)))


def test_multistep_follows_its_algorithm_and_evaluates_nothing_at_the_last_level() -> None:
    asked: list[float] = []

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        asked.append(float(sigma))
        return x / 100

    x = multistep(
        denoise,
        torch.full((1, 1, 1, 1), 50.0),
        torch.tensor([80.0, 5.0, 1.0, 0.6, 80.0]),  # the last two are sigma_min and sigma_max
        lambda draw: torch.ones(1, 1, 1, 1),
        PLAIN,
    )
    assert asked == [80.0, 5.0]
    assert float(x) == pytest.approx((0.5 + math.sqrt(25 - 0.36)) / 100 + math.sqrt(1 - 0.36))


@pytest.mark.parametrize("sampler", ["heun", "dpm", "ancestral"])
def test_added_noise_keeps_the_distribution_of_the_data(sampler: str) -> None:
    """Samples of a Gaussian keep its deviation although every step takes noise away and adds fresh noise."""
    indices, shape = torch.arange(20), (1, 20, 50)

    def noise(draw: int) -> Tensor:
        return philox_normals(42, indices, draw, shape).double()

    steps, low = 200, 0.05
    churn = Churn(s_churn=40.0)
    sigmas, x = levels(steps), noise(0) * math.sqrt(100 + STD**2)
    if sampler == "ancestral":
        x_0 = ancestral(ideal, x, sigmas, noise, PLAIN)
    else:
        x_0 = (heun if sampler == "heun" else dpm)(ideal, x, sigmas, noise, churn)
    assert float(x_0.mean()) == pytest.approx(0, abs=0.01)
    assert float(x_0.std()) == pytest.approx(math.hypot(STD, low), rel=0.03)
    assert abs(float((x_0 * x).mean() / (x_0.std() * x.std()))) < 0.9, "x_T alone does not decide the result"


# Noise that is asked for, and evaluations.

RECORDED: list[tuple[dict[str, Any], list[int], int]] = [
    ({"sampler": "heun", "steps": 6}, [0], 11),
    ({"sampler": "heun", "steps": 6, "s_churn": 3.0}, [0, 1, 2, 3, 4, 5, 6], 11),
    ({"sampler": "heun", "steps": 6} | CHURN, [0, 2, 3, 4, 5], 11),
    ({"sampler": "dpm", "steps": 6}, [0], 12),
    ({"sampler": "dpm", "steps": 6} | CHURN, [0, 2, 3, 4, 5], 12),
    ({"sampler": "heun", "steps": 6, "s_churn": 3.0, "s_tmin": 90.0}, [0], 11),
    ({"sampler": "euler", "steps": 6}, [0], 6),
    ({"sampler": "ancestral", "steps": 6}, [0, 1, 2, 3, 4, 5], 6),
    ({"sampler": "onestep", "steps": 6}, [0], 1),
    ({"sampler": "progdist", "steps": 6}, [0], 6),
    ({"sampler": "multistep", "steps": 40, "ts": "0,22,30"}, [0, 1, 2], 2),
    ({"sampler": "heun", "steps": 1}, [0], 1),
    ({"sampler": "euler", "steps": 1}, [0], 1),
]


@pytest.mark.parametrize(("settings", "draws", "evaluations"), RECORDED)
def test_noise_is_asked_for_only_where_it_is_used_and_in_rising_order(
    settings: dict[str, Any], draws: list[int], evaluations: int
) -> None:
    asked, evaluated = [], []

    def noise(draw: int) -> Tensor:
        asked.append(draw)
        return torch.full((2, 3, 2, 2), 0.5)

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        evaluated.append(sigma)
        return ideal(x, sigma)

    planned = plan(**settings)
    solve(planned, denoise, noise)
    assert asked == draws
    assert len(evaluated) == evaluations == planned.evaluations()


@pytest.mark.parametrize("ts", ["0,17,39", "0,39", "0,22,39"])
def test_multistep_adds_no_noise_at_sigma_min(ts: str) -> None:
    asked = []

    def noise(draw: int) -> Tensor:
        asked.append(draw)
        return torch.full((1, 3, 2, 2), 0.5)

    solve(plan(sampler="multistep", steps=40, ts=ts), ideal, noise)
    assert asked == list(range(ts.count(",")))


@pytest.mark.parametrize(
    ("settings", "draws"),
    [
        ({"sampler": "heun", "steps": 6}, 6),
        ({"sampler": "dpm", "steps": 6}, 6),
        ({"sampler": "ancestral", "steps": 6}, 6),
        ({"sampler": "euler", "steps": 6}, 0),
        ({"sampler": "onestep", "steps": 6}, 0),
        ({"sampler": "progdist", "steps": 6}, 0),
        ({"sampler": "multistep", "ts": "0,17,39"}, 2),
    ],
)
def test_the_originals_draws_are_counted(settings: dict[str, Any], draws: int) -> None:
    planned = plan(**settings)
    assert planned.solver.draws(planned.schedule.steps, planned.solver_options) == draws


@pytest.mark.parametrize("sampler", ["heun", "dpm"])
def test_churn_changes_samples_only_within_its_levels(sampler: str) -> None:
    def run(**churn: Any) -> Tensor:
        return solve(plan(sampler=sampler, steps=6, **churn), ideal, philox())

    plain = run()
    assert not torch.equal(run(s_churn=3.0), plain)
    assert not torch.equal(run(s_churn=3.0, s_noise=1.1), run(s_churn=3.0))
    assert torch.equal(run(s_churn=3.0, s_tmin=100.0), plain)
    assert torch.equal(run(s_noise=1.1), plain)


def test_churn_is_bounded() -> None:
    """gamma = min(s_churn / n, sqrt(2) - 1) from s_tmin to s_tmax, both included."""
    churn = Churn(s_churn=3.0, s_tmin=0.5, s_tmax=2.0)

    def gamma(sigma: float, steps: int) -> float:
        levels = torch.full((steps + 1,), sigma, dtype=torch.float64)
        _, raised = add_churn(torch.zeros(1), levels, 0, lambda draw: torch.zeros(1), churn)
        return float(raised) / sigma - 1

    assert [gamma(s, 10) for s in (0.49, 0.5, 1.0, 2.0, 2.01)] == pytest.approx([0.0, 0.3, 0.3, 0.3, 0.0])
    assert gamma(1.0, 2) == pytest.approx(math.sqrt(2) - 1)


@pytest.mark.parametrize("case", CASES)
def test_results_are_float32_and_become_pixels_whatever_they_are(case: str) -> None:
    planned = plan(**CASES[case])
    sigmas = planned.solver.levels(planned.schedule, planned.solver_options, torch.float32)
    x = planned.solver.run(lambda x, sigma, step=None: x, philox()(0) * 80, sigmas, philox(), planned.solver_options)
    assert x.dtype == torch.float32
    assert x.shape == (4, 3, 4, 4)
    assert x.abs().max() > 1
    expected = ((x.numpy().clip(-1, 1) + 1) * np.float32(127.5)).astype(np.uint8).transpose(0, 2, 3, 1)
    assert (planned.finisher.finish(x, {})["image"].numpy() == expected).all()
