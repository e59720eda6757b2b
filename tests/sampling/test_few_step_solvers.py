"""Few-step solvers follow their formulas, converge with their orders, and depend on (seed, index) alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_sampler.errors import RequestError
from ray_sampler.sampling.multistep_solvers import IndexOptions, OrderOptions, SdeOptions, deis_weights, unipc_weights
from ray_sampler.sampling.noise import make_draws, philox_normals
from ray_sampler.sampling.options import NoiseOptions
from ray_sampler.sampling.restarts import RestartOptions
from ray_sampler.sampling.schedules import ScheduleOptions, levels_of
from ray_sampler.sampling.solvers import SOLVERS, NoOptions
from tests.sampling import reference_solvers as reference
from tests.sampling.mixture import STD, gaussian, gaussian_flow, mixture, no_noise, of_levels, start

INTERVALS = [(3, 2, 0.06, 0.3), (4, 1, 1.1, 3.0)]
RESTARTS = RestartOptions(restarts="3,2,0.06,0.3;4,1,1.1,3", s_noise=1.003)

Formula = tuple[str, Any, Callable[..., Any]]


def with_arguments(formula: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    return lambda *given: formula(*given, *arguments)


FORMULAS: list[Formula] = [
    ("dpmpp_2m", NoOptions(), reference.dpmpp_2m),
    ("dpmpp_3m", NoOptions(), reference.dpmpp_3m),
    *[
        (name, SdeOptions(eta=eta, s_noise=s_noise), with_arguments(formula, eta, s_noise))
        for name, formula in (("dpmpp_2m_sde", reference.dpmpp_2m), ("dpmpp_3m_sde", reference.dpmpp_3m))
        for eta, s_noise in ((0.0, 1.0), (0.5, 1.003), (1.0, 1.0))
    ],
    *[("unipc", OrderOptions(order=p), with_arguments(reference.unipc, p)) for p in (2, 3)],
    *[("ipndm", OrderOptions(order=p), with_arguments(reference.ipndm, p)) for p in (1, 2, 3, 4)],
    *[("deis", OrderOptions(order=p), with_arguments(reference.deis, p)) for p in (1, 2, 3)],
    ("restart", RESTARTS, with_arguments(reference.restart, INTERVALS, 1.003)),
]
NEW = sorted({name for name, _, _ in FORMULAS})
OPTIONS: dict[str, Any] = {
    "multistep": IndexOptions(ts="0,3,5"),
    "restart": RESTARTS,
}
"""Where the defaults do not do."""


def options_of(name: str) -> Any:
    return OPTIONS.get(name) or SOLVERS[name].options()


def case_of(case: tuple[str, Any, Any]) -> str:
    return f"{case[0]}-{case[1]}"


def schedule(steps: int, name: Any = "karras", low: float = 0.02, high: float = 40.0) -> ScheduleOptions:
    return ScheduleOptions(steps=steps, sigma_min=low, sigma_max=high, schedule=name)


# Formulas.


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
@pytest.mark.parametrize("case", FORMULAS, ids=case_of)
def test_solvers_follow_their_formulas(case: tuple[str, Any, Any], spacing: str, steps: int) -> None:
    name, options, formula = case
    levels = levels_of(schedule(steps, spacing))
    x, draws = start(40.0), philox_normals(42, torch.arange(8), 1, (1, 1, 9)).double()

    def noise(draw: int) -> Tensor:
        return draws[..., draw - 1 : draw]

    expected = formula(mixture, x, levels.tolist(), noise)
    torch.testing.assert_close(SOLVERS[name].run(mixture, x, levels, noise, options), expected, rtol=1e-10, atol=1e-10)


def test_without_noise_the_sde_solvers_are_the_ode_solvers() -> None:
    levels = levels_of(schedule(9))
    for order in ("2m", "3m"):
        ode = SOLVERS[f"dpmpp_{order}"].run(mixture, start(40.0), levels, no_noise, NoOptions())
        sde = SOLVERS[f"dpmpp_{order}_sde"].run(mixture, start(40.0), levels, no_noise, SdeOptions(eta=0.0))
        assert torch.equal(ode, sde)


def test_a_multistep_solver_of_order_one_is_eulers_method() -> None:
    levels, x = levels_of(schedule(9)), start(40.0)
    expected = SOLVERS["euler"].run(mixture, x, levels, no_noise, NoOptions())
    for name, options in (("ipndm", OrderOptions(order=1)), ("deis", OrderOptions(order=1))):
        torch.testing.assert_close(
            SOLVERS[name].run(mixture, x, levels, no_noise, options), expected, rtol=1e-12, atol=1e-12
        )


def test_the_order_is_the_highest_unless_it_is_given() -> None:
    x, levels = start(40.0), levels_of(schedule(9))
    for name, highest in (("unipc", 3), ("ipndm", 4), ("deis", 3)):
        solver, given = SOLVERS[name], OrderOptions(order=highest)
        assert solver.identity(OrderOptions()) == solver.identity(given) == {"order": highest}
        assert solver.identity(OrderOptions(order=2)) == {"order": 2}
        left, right = (solver.run(mixture, x, levels, no_noise, options) for options in (OrderOptions(), given))
        assert torch.equal(left, right)


@pytest.mark.parametrize("h", [1e-7, 1e-3, 0.3, 2.0, 10.0])
def test_coefficients_do_not_cancel_where_levels_are_close(h: float) -> None:
    """As h goes to 0, they go to those of Adams-Bashforth and of UniPC's limit, b_j = 1 / (j + 1)."""
    assert sum(deis_weights(-h, [0.0, h, 2 * h])) == pytest.approx(math.expm1(-h), rel=1e-12)
    two, three = unipc_weights(h, [-1.0, 1.0]), unipc_weights(h, [-1.0, -2.0, 1.0])
    if h < 1e-2:
        assert two == pytest.approx(np.linalg.solve([[1, 1], [-1, 1]], [1 / 2, 1 / 3]), rel=h)
        expected = np.linalg.solve([[1, 1, 1], [-1, -2, 1], [1, 4, 1]], [1 / 2, 1 / 3, 1 / 4])
        assert three == pytest.approx(expected, rel=2 * h)
        assert np.array(deis_weights(-h, [0.0, h, 2 * h])) / -h == pytest.approx([23 / 12, -16 / 12, 5 / 12], rel=3 * h)


# Orders.

HIGH, LOW = 10.0, 0.1
STEPS = (5, 10, 20, 40, 80, 160)


def warmed_up(n: int) -> Tensor:
    """n even steps in ln sigma after a first one of length h^2, so that its order 1 costs nothing; then 0."""
    whole = math.log(HIGH / LOW)
    first = (whole / n) ** 2 / 20
    return of_levels([HIGH, *[HIGH * math.exp(-first - k / n * (whole - first)) for k in range(n + 1)], 0.0])


def even(n: int) -> Tensor:
    """n Karras steps that end at LOW."""
    return levels_of(schedule(n + 1, low=LOW, high=HIGH))[:-1]


@pytest.fixture(scope="module")
def solution() -> Tensor:
    """Where the ODE leads from start(HIGH) at the level LOW, to 1e-9: by steps of two lengths, extrapolated."""
    levels = levels_of(schedule(4001, "logsnr", LOW, HIGH))[:-1]
    coarse, fine = (
        SOLVERS["heun"].run(mixture, start(HIGH), sigmas, no_noise, options_of("heun"))
        for sigmas in (levels[::2], levels)
    )
    return fine + (fine - coarse) / 3


def slope(errors: list[float]) -> float:
    """By regression over STEPS."""
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


WARM: list[tuple[str, Any, float]] = [
    ("dpmpp_2m", NoOptions(), 2),
    ("dpmpp_3m", NoOptions(), 2),  # its published formula has half of the third-order term
    ("unipc", OrderOptions(order=2), 3),  # the corrector adds one
    ("unipc", OrderOptions(order=3), 3),
    ("deis", OrderOptions(order=1), 1),
    ("deis", OrderOptions(order=2), 2),
    ("deis", OrderOptions(order=3), 3),
]
COLD: list[tuple[str, Any, float]] = [
    ("ipndm", OrderOptions(order=1), 1),
    ("ipndm", OrderOptions(order=2), 2),
    ("ipndm", OrderOptions(order=3), 2),  # coefficients of even steps on uneven ones
    ("ipndm", OrderOptions(order=4), 2),
    ("dpmpp_2m", NoOptions(), 2),
    ("dpmpp_3m", NoOptions(), 2),
    ("unipc", OrderOptions(order=3), 2),  # the first step has order 1
    ("deis", OrderOptions(order=3), 2),
]


@pytest.mark.parametrize("case", WARM, ids=case_of)
def test_solvers_converge_with_their_order_once_they_are_warm(case: tuple[str, Any, float], solution: Tensor) -> None:
    name, options, order = case
    expected = mixture(solution, LOW)
    errors = [
        float((SOLVERS[name].run(mixture, start(HIGH), warmed_up(n), no_noise, options) - expected).abs().mean())
        for n in STEPS
    ]
    assert slope(errors) > order - 0.35, errors
    assert math.log2(errors[-2] / errors[-1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("case", COLD, ids=case_of)
def test_solvers_converge_on_karras_levels(case: tuple[str, Any, float], solution: Tensor) -> None:
    name, options, order = case
    errors = [
        float((SOLVERS[name].run(mixture, start(HIGH), even(n), no_noise, options) - solution).abs().mean())
        for n in STEPS
    ]
    assert slope(errors) > order - 0.35, errors
    assert errors[-1] < (5e-3 if order == 1 else 1e-4)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("dpmpp_2m", 1e-3), ("dpmpp_3m", 1e-3), ("unipc", 1e-4), ("ipndm", 1e-3), ("deis", 1e-4)]
)
def test_solvers_end_at_the_exact_solution_of_gaussian_data(name: str, tolerance: float) -> None:
    """The whole way from x_T to x_0 on the default range of levels."""
    x_0 = SOLVERS[name].run(
        gaussian, start(80.0), levels_of(schedule(200, low=0.002, high=80.0)), no_noise, options_of(name)
    )
    torch.testing.assert_close(x_0, gaussian_flow(start(80.0), 80.0, 0.0), rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "restart"])
def test_added_noise_keeps_the_distribution_of_the_data(name: str) -> None:
    indices, shape = torch.arange(20), (1, 20, 50)

    def noise(draw: int) -> Tensor:
        return philox_normals(42, indices, draw, shape).double()

    x_T = noise(0) * math.sqrt(40.0**2 + STD**2)
    options = RestartOptions(restarts="20,3,0.1,1") if name == "restart" else options_of(name)
    x_0 = SOLVERS[name].run(gaussian, x_T, levels_of(schedule(100)), noise, options)
    assert float(x_0.mean()) == pytest.approx(0, abs=0.01)
    assert float(x_0.std()) == pytest.approx(STD, rel=0.03)
    assert abs(float((x_0 * x_T).mean() / (x_0.std() * x_T.std()))) < 0.9, "x_T alone does not decide the result"


# What is asked for, and of whom it depends.


@pytest.mark.parametrize("steps", [6, 7, 12])
@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_counted(name: str, steps: int) -> None:
    solver, options, asked = SOLVERS[name], options_of(name), 0

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        nonlocal asked
        asked += 1
        assert x.dtype == torch.float64
        return mixture(x, sigma)

    levels = solver.levels(schedule(steps), options, torch.float64)
    solver.run(denoise, start(40.0), levels, lambda draw: torch.ones(8, 1, 1, 1), options)
    assert asked == solver.evaluations(steps, options)


def test_the_published_restarts_take_203_evaluations() -> None:
    """Xu et al. 2023, ImageNet 64x64: 36 steps and these intervals."""
    published = RestartOptions(restarts="4,1,19.35,40.79;4,1,1.09,1.92;4,5,0.59,1.09;4,5,0.30,0.59;6,6,0.06,0.30")
    SOLVERS["restart"].check(ScheduleOptions(steps=36), published)
    assert SOLVERS["restart"].evaluations(36, published) == 203


@pytest.mark.parametrize("name", NEW)
def test_no_step_waits_for_the_device(name: str) -> None:
    """The device meta has no values, so a solver that asks it for one fails."""
    x = torch.empty(2, 1, 2, 2, device="meta")
    levels = SOLVERS[name].levels(schedule(8), options_of(name), torch.float32)
    x_0 = SOLVERS[name].run(
        lambda x, sigma, step=None: torch.empty_like(x), x, levels, lambda draw: torch.empty_like(x), options_of(name)
    )
    assert (x_0.device.type, x_0.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NEW)
def test_a_sample_depends_on_its_seed_and_index_alone(name: str, state: torch.dtype) -> None:
    options = options_of(name)

    def run(indices: list[int], seed: int = 42) -> Tensor:
        draws = make_draws(NoiseOptions(seed=seed), 100, torch.tensor(indices), (1, 2, 2), dtype=state)
        levels = SOLVERS[name].levels(schedule(6), options, state)
        return SOLVERS[name].run(mixture, draws.noise(0).to(state) * 40, levels, draws.noise, options)

    together = run([0, 1, 2, 3, 70])
    assert together.dtype == state
    assert torch.equal(together, run([0, 1, 2, 3, 70]))
    assert torch.equal(together, torch.cat([run([0, 1]), run([2]), run([3, 70])]))
    assert not torch.equal(together, run([0, 1, 2, 3, 70], seed=43))


@pytest.mark.parametrize("name", NEW)
def test_a_state_in_float32_is_near_that_in_float64(name: str) -> None:
    """Coefficients do not lose what the state has."""
    options = options_of(name)

    def run(state: torch.dtype) -> Tensor:
        levels = SOLVERS[name].levels(schedule(10, "logsnr"), options, state)
        return SOLVERS[name].run(
            mixture, start(40.0).to(state), levels, lambda draw: torch.full((8, 1, 1, 1), 0.5), options
        )

    torch.testing.assert_close(run(torch.float32).double(), run(torch.float64), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options", "draws"),
    [
        ("dpmpp_2m_sde", SdeOptions(), [1, 2, 3, 4, 5]),
        ("dpmpp_3m_sde", SdeOptions(), [1, 2, 3, 4, 5]),
        ("dpmpp_2m_sde", SdeOptions(eta=0.0), []),
        ("restart", RESTARTS, [1, 2, 3]),
        ("unipc", OrderOptions(), []),
        ("deis", OrderOptions(), []),
        ("ipndm", OrderOptions(), []),
    ],
)
def test_noise_is_asked_for_only_where_it_is_used_and_in_rising_order(
    name: str, options: Any, draws: list[int]
) -> None:
    asked = []

    def noise(draw: int) -> Tensor:
        asked.append(draw)
        return torch.ones(8, 1, 1, 1)

    SOLVERS[name].run(mixture, start(40.0), levels_of(schedule(6)), noise, options)
    assert asked == draws


@pytest.mark.parametrize("name", [*NEW, "heun", "dpm"])
def test_later_evaluations_of_a_step_name_the_level_at_which_it_began(name: str) -> None:
    """So that guidance is decided once for a step: all evaluations between two levels agree on it."""
    options, told = options_of(name), []

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        told.append((float(sigma), float(sigma if step is None else step)))
        return mixture(x, sigma)

    levels = levels_of(schedule(6))
    SOLVERS[name].run(denoise, start(40.0), levels, lambda draw: torch.ones(8, 1, 1, 1), options)
    if name in ("heun", "dpm", "restart"):
        firsts = [i for i, (sigma, step) in enumerate(told) if sigma == step]
        for i, following in itertools.pairwise([*firsts, len(told)]):
            assert following - i <= 2
            assert {step for _, step in told[i:following]} == {told[i][0]}
        assert any(sigma != step for sigma, step in told)
    else:
        assert told == [(level, level) for level in levels.tolist()[:-1]]


# Wrong options.


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("unipc", OrderOptions(order=1), "--order is 1; for --sampler unipc it must be from 2 to 3"),
        ("unipc", OrderOptions(order=4), "--order is 4"),
        ("ipndm", OrderOptions(order=5), "--order is 5; for --sampler ipndm it must be from 1 to 4"),
        ("deis", OrderOptions(order=0), "--order is 0; for --sampler deis it must be from 1 to 3"),
        ("dpmpp_2m_sde", SdeOptions(eta=-0.1), "--eta is -0.1"),
        ("dpmpp_2m_sde", SdeOptions(eta=math.inf), "--eta is inf"),
        ("dpmpp_2m_sde", SdeOptions(eta=math.nan), "--eta is nan"),
        ("restart", RestartOptions(restarts=""), "--restarts is missing"),
        ("restart", RestartOptions(restarts="3,2,0.06"), "for example 3,2,0.06,0.30"),
        ("restart", RestartOptions(restarts="3,2,a,0.3"), "for example 3,2,0.06,0.30"),
        ("restart", RestartOptions(restarts="1,2,0.06,0.3"), "N at least 2"),
        ("restart", RestartOptions(restarts="3,0,0.06,0.3"), "K at least 1"),
        ("restart", RestartOptions(restarts="3,2,0.3,0.06"), "tmin < tmax"),
        ("restart", RestartOptions(restarts="3,2,nan,0.06"), "tmin < tmax"),
        ("restart", RestartOptions(restarts="3,2,80,90"), "not the first"),
        ("restart", RestartOptions(restarts="3,2,1.00,1.01"), "the level nearest to tmin"),
    ],
)
def test_wrong_options_are_refused(name: str, options: Any, expected: str) -> None:
    check = (
        options.check
        if isinstance(options, SdeOptions)
        else partial(SOLVERS[name].check, ScheduleOptions(steps=10), options)
    )
    with pytest.raises(RequestError) as error:
        check()
    assert expected in str(error.value)
