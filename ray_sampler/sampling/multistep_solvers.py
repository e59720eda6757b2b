"""Multistep solvers: one evaluation a step, and the results of earlier steps raise the order. Last, consistency models.

In all but these sigma_i falls, lambda = -ln sigma, h = lambda_{i+1} - lambda_i, and D_i = D(x_i, sigma_i). Coefficients
are computed in float64 on the host from the levels, which are there, so that no step waits for the device. Signature
and conventions are those of `ray_sampler.sampling.solvers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import exp, expm1, factorial, inf, log, sqrt
from typing import TYPE_CHECKING, Any

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option
from ray_sampler.sampling.schedules import ScheduleOptions, multistep_sigmas

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ray_sampler.sampling.noise import Noise
    from ray_sampler.sampling.parameterisation import Denoiser

UNIPC_ORDERS, IPNDM_ORDERS, DEIS_ORDERS = (2, 3), (1, 4), (1, 3)
"""The lowest order of each, and the highest, which is the default."""


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """The order of a multistep solver."""

    order: int | None = option(
        None, "Order of the solver: unipc 2 or 3 (default 3), ipndm 1 to 4 (4), deis 1 to 3 (3).", recorded=False
    )


@dataclass(frozen=True, kw_only=True)
class AddedNoise:
    """How strong the noise is that a solver adds."""

    s_noise: float = option(1.0, "Scale of the noise that churn, dpmpp_2m_sde, dpmpp_3m_sde and restart add.")

    def check(self) -> None:
        """Raises RequestError: the value is wrong."""
        require(0 <= self.s_noise < inf, f"--s_noise is {self.s_noise:g}; it must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class SdeOptions(AddedNoise):
    """Noise of a solver of the reverse SDE."""

    eta: float = option(
        1.0,
        "Noise of dpmpp_2m_sde and dpmpp_3m_sde: 1 is the reverse SDE, 0 the ODE.",
        recorded=False,
    )

    def check(self) -> None:
        """Raises RequestError: the value is wrong."""
        require(0 <= self.eta < inf, f"--eta is {self.eta:g}; it must be a finite number of at least 0")


def sde_identity(options: SdeOptions) -> dict[str, Any]:
    """What decides a sample: the strength of noise only where some is added."""
    return {"eta": float(options.eta)} | ({"s_noise": float(options.s_noise)} if options.eta > 0 else {})


def dpmpp(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object, *, order: int) -> Tensor:
    """DPM-Solver++ of order 2 (2M) or 3 (3M) on the ODE, or on the SDE with eta (Lu et al. 2022, "DPM-Solver++").

    With q = e^-y, y = (1 + eta) h and r = (lambda_i - lambda_{i-1}) / h:
    2M (algorithm 2, section 5): x' = q x + (1 - q) (D_i + (D_i - D_{i-1}) / (2 r)).
    3M, as its authors published it in code: x' = q x + (1 - q) D_i + phi_2 D1 - phi_3 D2, where D1 and D2 are the first
    two differences of D in lambda / h, phi_2 = 1 - (1 - q) / y and phi_3 = phi_2 / y - 1 / 2. Taylor's term would be 2
    phi_3 D2; with half of it the solver converges with order 2 in the end, from smaller errors than 2M.

    The first step has order 1 and the second is 2M's; the step to 0 gives D_i. The SDE adds
    s_noise sigma_{i+1} sqrt(1 - e^{-2 eta h}) z; eta 0 is the ODE, eta 1 the reverse SDE.
    """
    levels, sde = sigmas.tolist(), options if isinstance(options, SdeOptions) else SdeOptions(eta=0.0)
    lambdas = logarithms(levels)
    results: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        results = [denoise(x, sigmas[i]), *results[: order - 1]]
        denoised = results[0]
        if sigma_next == 0:
            return denoised
        h = log(sigma / sigma_next)
        y = (1 + sde.eta) * h
        x = exp(-y) * x - expm1(-y) * denoised
        ratios = [(lambdas[i - k] - lambdas[i - k - 1]) / h for k in range(len(results) - 1)]
        if len(results) == 2:
            x = x - expm1(-y) / (2 * ratios[0]) * (denoised - results[1])
        elif len(results) == 3:
            r, r1 = ratios
            phi_2, phi_3 = -remainder(1, -y), remainder(2, -y)
            a, b = (denoised - results[1]) / r, (results[1] - results[2]) / r1
            difference = (a - b) / (r + r1)
            x = x + phi_2 * (a + r * difference) - phi_3 * difference
        if sde.eta > 0:
            deviation = sde.s_noise * sigma_next * sqrt(-expm1(-2 * sde.eta * h))
            x = x + noise(1 + i).to(x.dtype) * deviation
    return x


def unipc(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: OrderOptions) -> Tensor:
    """UniPC of order p with B = e^-h - 1, its variant B_2, on the data prediction (Zhao et al. 2023, "UniPC").

    Predictor: x' = q x + (1 - q) D_i - B sum_k rho_k (D_{i-k} - D_i) / r_k, with q = e^-h and nodes
    r_k = (lambda_{i-k} - lambda_i) / h. Corrector: the same with one term more, of node 1 and D' = D(x', sigma_{i+1}),
    and weights for all its nodes.

    Each step predicts x_{i+1}; the evaluation there, which the next step needs anyway, then corrects it. The result
    of the evaluation stays that of the predicted state. Step i of n has order min(p, i + 1, n - i), and the
    corrector that of its predictor; the last step is not corrected.
    """
    levels, highest = sigmas.tolist(), options.order or UNIPC_ORDERS[-1]
    lambdas = logarithms(levels)
    steps = len(levels) - 1
    denoised = denoise(x, sigmas[0])
    results = [denoised]
    for i in range(steps):
        if levels[i + 1] == 0:
            return denoised
        order = min(highest, i + 1, steps - i)
        h = lambdas[i + 1] - lambdas[i]
        nodes = [(lambdas[i - k] - lambdas[i]) / h for k in range(1, order)]
        slopes = [(results[k] - denoised) / node for k, node in enumerate(nodes, 1)]
        first = exp(-h) * x - expm1(-h) * denoised
        x = first - expm1(-h) * weighted(unipc_weights(h, nodes), slopes)
        if i == steps - 1:
            return x
        denoised_next = denoise(x, sigmas[i + 1])
        weights = unipc_weights(h, [*nodes, 1.0])
        x = first - expm1(-h) * weighted(weights, [*slopes, denoised_next - denoised])
        denoised = denoised_next
        results = [denoised, *results[: highest - 1]]
    return x


def unipc_weights(h: float, nodes: Sequence[float]) -> list[float]:
    """rho of sum_k rho_k r_k^{j-1} = b_j for nodes r, j = 1..len(nodes), of UniPC; 1/2 for one node."""
    if len(nodes) <= 1:
        return [0.5] * len(nodes)
    import numpy as np

    powers = range(len(nodes))
    right = [factorial(j + 1) * remainder(j + 1, -h) / expm1(-h) for j in powers]
    left = [[node**power for node in nodes] for power in powers]
    return list(map(float, np.linalg.solve(np.array(left), np.array(right))))


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Coefficients for even steps, by order, newest first."""


def ipndm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: OrderOptions) -> Tensor:
    """iPNDM (Zhang & Chen 2023, "DEIS"): Adams-Bashforth on dx/dsigma = (x - D) / sigma, warmed up by lower orders.

    Order 4: x' = x + (sigma' - sigma) (55 d_i - 59 d_{i-1} + 37 d_{i-2} - 9 d_{i-3}) / 24, d = (x - D) / sigma. These
    are the coefficients of even steps although the steps are not even. The step to 0 is like the others.
    """
    slopes: list[Tensor] = []
    order = options.order or IPNDM_ORDERS[-1]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        slopes = [(x - denoise(x, sigmas[i])) / sigma, *slopes[: order - 1]]
        x = x + (sigma_next - sigma) * weighted(ADAMS_BASHFORTH[len(slopes) - 1], slopes)
    return x


def deis(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: OrderOptions) -> Tensor:
    """DEIS, its variant rhoAB with ln sigma as rho (Zhang & Chen 2023, "DEIS"): x' = x + sum_j C_ij eps_{i-j}.

    eps = (x - D) / sigma, and C_ij is the integral over d sigma, from sigma_i to sigma_{i+1}, of the Lagrange
    polynomial in ln sigma that is 1 at level i - j and 0 at the other levels in use. The step to 0 gives D_i.
    """
    levels, order = sigmas.tolist(), options.order or DEIS_ORDERS[-1]
    slopes: list[Tensor] = []
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        denoised = denoise(x, sigmas[i])
        if sigma_next == 0:
            return denoised
        slopes = [(x - denoised) / sigma, *slopes[: order - 1]]
        nodes = [log(levels[i - j] / sigma) for j in range(len(slopes))]
        x = x + sigma * weighted(deis_weights(log(sigma_next / sigma), nodes), slopes)
    return x


@cache
def quadrature() -> Any:
    """Points and weights of Gauss-Legendre quadrature on [-1, 1], exact to rounding for what deis integrates."""
    import numpy as np

    return np.polynomial.legendre.leggauss(32)


def deis_weights(end: float, nodes: Sequence[float]) -> list[float]:
    """Integrals of e^v L_j(v) from 0 to `end`, L_j the Lagrange polynomials of the nodes."""
    import numpy as np

    points, quadrature_weights = quadrature()
    v = end / 2 * (points + 1)
    weights = []
    for node in nodes:
        basis = np.prod([(v - other) / (node - other) for other in nodes if other != node], axis=0)
        weights.append(float(end / 2 * (quadrature_weights * np.exp(v) * basis).sum()))
    return weights


def remainder(j: int, z: float) -> float:
    """phi_j(z) - 1 / j!, phi_j the functions of exponential integrators: the sum over m >= 1 of z^m / (m + j)!.

    Its closed form begins (e^z - 1) / z - 1 and divides by z again for each j, which cancels where z is small.
    """
    if abs(z) < 1:
        return sum(z**m / factorial(m + j) for m in range(1, 20))
    value = expm1(z) / z - 1
    for k in range(2, j + 1):
        value = value / z - 1 / factorial(k)
    return value


def logarithms(levels: Sequence[float]) -> list[float]:
    """lambda of each level, without that of 0."""
    return [-log(level) for level in levels if level > 0]


def weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor | int:
    """The sum of terms times weights; 0 where there is none."""
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


# Consistency models, evaluated several times.


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Where a consistency model is evaluated."""

    ts: str = option("", "Indices into the schedule for multistep, such as 0,22,39.", numbers=True)

    def check(self) -> None:
        """Raises RequestError: the text is not a list of numbers."""
        indices_of(self)


def indices_of(options: IndexOptions) -> tuple[int, ...]:
    """The indices that --ts gives. Raises RequestError: the text is not a list of numbers."""
    try:
        return tuple(int(part) for part in options.ts.split(",")) if options.ts else ()
    except ValueError:
        raise RequestError(f"--ts is {options.ts!r}; it must be whole numbers with commas, like 0,22,39") from None


def check_indices(schedule: ScheduleOptions, options: IndexOptions, rising: bool = True) -> None:
    """Check indices beside a schedule.

    Args:
        rising: whether they must rise; the original code takes them in any order.

    Raises:
        RequestError: there are too few, one is not in the schedule, or they do not rise.
    """
    indices = indices_of(options)
    require(schedule.steps >= 2, f"--steps is {schedule.steps}; --sampler multistep needs at least 2")
    require(len(indices) >= 2, f"--ts is {options.ts!r}; --sampler multistep needs two or more, for example 0,22,39")
    for t in indices:
        require(
            0 <= t < schedule.steps,
            f"--ts has {t}; with --steps {schedule.steps} its indices must be from 0 to {schedule.steps - 1}",
        )
    for before, after in pairwise(indices):
        require(
            before < after or not rising,
            f"--ts is {options.ts!r}, where {after} follows {before}; its indices must rise, for example 0,22,39",
        )


def left_noise(schedule: ScheduleOptions, options: IndexOptions) -> str | None:
    """A warning where the last index leaves noise on the pictures."""
    end, last = indices_of(options)[-1], schedule.steps - 1
    if end == last:
        return None
    (level,) = multistep_sigmas((end,), schedule.steps, schedule.sigma_min, schedule.sigma_max, schedule.rho)
    return (
        f"--ts ends at {end}, before the last index of --steps {schedule.steps}, which is {last}: noise of level "
        f"{level:.3g} stays on the pictures, as with the original script"
    )


def multistep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """Denoise, add noise up to the next level, repeat, without the last evaluation (Song et al. 2023, algorithm 1).

    `sigmas` holds the levels of the evaluations, the level of the result, and then the schedule's smallest and largest.
    """
    *levels, sigma_min, sigma_max = sigmas
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0 = denoise(x, sigma.float())
        level = (sigma_next.clip(sigma_min, sigma_max) ** 2 - sigma_min**2).sqrt()
        x = x_0 + noise(1 + i) * level if level > 0 else x_0
    return x


def multistep_levels(schedule: ScheduleOptions, options: IndexOptions, dtype: torch.dtype) -> Tensor:
    """The levels at the indices, then sigma_min and sigma_max: float64."""
    import torch

    low, high = schedule.sigma_min, schedule.sigma_max
    levels = multistep_sigmas(indices_of(options), schedule.steps, low, high, schedule.rho)
    return torch.tensor([*levels, low, high], dtype=torch.float64)
