"""Solvers: from x_T to x_0, each a plain function of (denoise, x, sigmas, noise, options).

`denoise(x, sigma, step)` is D of a batch x, (B, C, H, W); `sigmas` are levels on the host, in the dtype of x, so that
no step waits for the device; `step` is the level at which the step began. `noise(1 + i)` is the noise of step i, which
a solver asks for only where it uses it. Solvers of one step and the registry SOLVERS stand here, multistep solvers in
`multistep_solvers`, and what solvers take as options in `solver_options`. Symbols are those of Karras et al. 2022
("Elucidating the design space of diffusion-based generative models").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option
from ray_sampler.sampling.multistep_solvers import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, ipndm, unipc
from ray_sampler.sampling.noise import Noise
from ray_sampler.sampling.parameterisation import Denoiser
from ray_sampler.sampling.schedules import Schedule, karras_sigmas, multistep_sigmas
from ray_sampler.sampling.solver_options import DeisOrder, IpndmOrder, Plain, Restarts, Sde, UnipcOrder, snapped


@dataclass(frozen=True)
class Churn(Plain):
    """Added noise of the stochastic sampler (Karras et al. 2022, algorithm 2)."""

    s_churn: float = option(0.0, "Stochasticity of heun and dpm.")
    s_tmin: float = option(0.0, "Smallest noise level with churn.")
    s_tmax: float = option(inf, "Largest noise level with churn.")
    s_noise: float = option(1.0, "Deviation of the noise that churn, dpmpp_2m_sde, dpmpp_3m_sde and restart add.")

    adds: bool = False
    """Whether the raised level is sigma + gamma sigma, as EDM's scripts round it, and not sigma (gamma + 1)."""

    def validate(self, schedule: Schedule) -> None:
        for name in ("s_churn", "s_tmin", "s_noise"):
            value = getattr(self, name)
            require(0 <= value < inf, f"--{name} is {value:g}; it must be a finite number of at least 0")
        require(self.s_tmax >= self.s_tmin, f"--s_tmax is {self.s_tmax:g}; it must be at least s_tmin, {self.s_tmin:g}")

    def identity(self) -> dict[str, Any]:
        result: dict[str, Any] = {"s_churn": float(self.s_churn)}
        if self.s_churn > 0:
            result |= {
                "s_tmin": float(self.s_tmin),
                "s_tmax": str(float(self.s_tmax)),
                "s_noise": float(self.s_noise),
            }
        return result

    def gamma(self, sigma: Tensor, steps: int) -> float:
        """How much the level sigma rises, as a factor above 1."""
        return min(self.s_churn / steps, 2**0.5 - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0


@dataclass(frozen=True)
class Indices(Plain):
    """Where a consistency model is evaluated."""

    ts: str = option("", "Indices into the schedule for --sampler multistep, as 0,22,39.")

    @property
    def indices(self) -> tuple[int, ...]:
        try:
            return tuple(int(part) for part in self.ts.split(",")) if self.ts else ()
        except ValueError:
            raise RequestError(f"--ts is {self.ts!r}; it must be whole numbers with commas, as in 0,22,39") from None

    def validate(self, schedule: Schedule) -> None:
        self.validate_range(schedule)
        for before, after in pairwise(self.indices):
            require(
                before < after,
                f"--ts is {self.ts!r}, where {after} follows {before}; its indices must rise, as in 0,22,39",
            )

    def validate_range(self, schedule: Schedule) -> None:
        """Check only what the original code needs, which takes indices in any order.

        Raises:
            RequestError: there are too few, or one is not in the schedule.
        """
        require(schedule.steps >= 2, f"--steps is {schedule.steps}; --sampler multistep needs at least 2")
        require(len(self.indices) >= 2, f"--ts is {self.ts!r}; --sampler multistep needs two or more, as in 0,22,39")
        for t in self.indices:
            require(
                0 <= t < schedule.steps,
                f"--ts has {t}; with --steps {schedule.steps} its indices must be from 0 to {schedule.steps - 1}",
            )

    def warning(self, schedule: Schedule) -> str | None:
        end, last = self.indices[-1], schedule.steps - 1
        if end == last:
            return None
        level = multistep_sigmas((end,), schedule.steps, schedule.sigma_min, schedule.sigma_max, schedule.rho).item()
        return (
            f"--ts ends at {end}, before the last index of --steps {schedule.steps}, which is {last}: noise of level "
            f"{level:.3g} stays on the pictures, as with the original script"
        )

    def identity(self) -> dict[str, Any]:
        return {"ts": ",".join(map(str, self.indices))}


def add_churn(x: Tensor, sigmas: Tensor, i: int, noise: Noise, churn: Churn) -> tuple[Tensor, Tensor]:
    """x and its level, raised from sigma_i to sigma_i (1 + gamma) (Karras et al. 2022, algorithm 2, lines 5 and 6)."""
    sigma, gamma = sigmas[i], churn.gamma(sigmas[i], len(sigmas) - 1)
    sigma_hat = sigma + gamma * sigma if churn.adds else sigma * (gamma + 1)
    if gamma > 0:
        x = x + noise(1 + i) * churn.s_noise * (sigma_hat**2 - sigma**2) ** 0.5
    return x, sigma_hat


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """Heun's second order method with churn (Karras et al. 2022, algorithm 2); Euler's in the step to 0."""
    for i in range(len(sigmas) - 1):
        x, sigma = add_churn(x, sigmas, i, noise, churn)
        x = heun_step(denoise, x, sigma, sigmas[i + 1], sigmas[i])
    return x


def heun_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, step: Tensor) -> Tensor:
    """From x at sigma to sigma_next, in a step that began at level `step` (ibid., lines 7 to 11)."""
    d = (x - denoise(x, sigma, step)) / sigma
    x_next = x + d * (sigma_next - sigma)
    if sigma_next > 0:
        d_next = (x_next - denoise(x_next, sigma_next, step)) / sigma_next
        x_next = x + (d + d_next) / 2 * (sigma_next - sigma)
    return x_next


def restart(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Restarts) -> Tensor:
    """Heun's method that goes back up and down again within intervals (Xu et al. 2023, "Restart", algorithm 1).

    On reaching the level nearest to an interval's tmin, K times: noise is added up to tmax, then Heun's method goes
    down again on N Karras levels. Draws are numbered in the order in which they are used.
    """
    draw = 0
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = heun_step(denoise, x, sigma, sigma_next, sigma)
        for interval in options.intervals:
            if snapped(interval, levels) != i + 1:
                continue
            low, high = levels[i + 1], interval.sigma_max
            again = karras_sigmas(interval.points, low, high, dtype=sigmas.dtype)[:-1]
            again[0], again[-1] = high, sigma_next
            for _ in range(interval.times):
                draw += 1
                x = x + noise(draw).to(x.dtype) * (options.s_noise * (high**2 - low**2) ** 0.5)
                for from_, to in pairwise(again):
                    x = heun_step(denoise, x, from_, to, from_)
    return x


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Plain) -> Tensor:
    """Euler's method on dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 3)."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_next - sigma)
    return x


def dpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """The midpoint method, after DPM-Solver-2 (Lu et al. 2022), with churn; midpoints lie on a rho = 3 schedule."""
    for i in range(len(sigmas) - 1):
        x, sigma = add_churn(x, sigmas, i, noise, churn)
        d = (x - denoise(x, sigma, sigmas[i])) / sigma
        sigma_mid = ((sigma ** (1 / 3) + sigmas[i + 1] ** (1 / 3)) / 2) ** 3
        x_mid = x + d * (sigma_mid - sigma)
        d_mid = (x_mid - denoise(x_mid, sigma_mid, sigmas[i])) / sigma_mid
        x = x + d_mid * (sigmas[i + 1] - sigma)
    return x


def ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Plain) -> Tensor:
    """Euler steps down past the next level, then fresh noise up to it (Song et al. 2021, as ancestral sampling)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_down - sigma)
        if sigma_up > 0:
            x = x + noise(1 + i) * sigma_up
    return x


def onestep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Plain) -> Tensor:
    """One evaluation at the largest level (Song et al. 2023, "Consistency models")."""
    return denoise(x, sigmas[0])


def progdist(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Plain) -> Tensor:
    """Euler's method without the step to 0 (the sampler of progressively distilled models)."""
    return euler(denoise, x, sigmas[:-1], noise, options)


def multistep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: Plain) -> Tensor:
    """Denoise, add noise up to the next level, repeat, without the last evaluation (Song et al. 2023, algorithm 1).

    `sigmas` holds the levels of the evaluations, the level of the result, and then the schedule's smallest and largest.
    """
    *levels, sigma_min, sigma_max = sigmas
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_0 = denoise(x, sigma.float())
        level = (sigma_next.clip(sigma_min, sigma_max) ** 2 - sigma_min**2).sqrt()
        x = x_0 + noise(1 + i) * level if level > 0 else x_0
    return x


def schedule_levels(schedule: Schedule, options: Any, dtype: torch.dtype) -> Tensor:
    """As many levels as there are steps, then 0."""
    return schedule.levels(dtype)


def progdist_levels(schedule: Schedule, options: Any, dtype: torch.dtype) -> Tensor:
    """One level more, as the step to 0 is not taken."""
    return schedule.levels(dtype, schedule.steps + 1)


def multistep_levels(schedule: Schedule, options: Indices, dtype: torch.dtype) -> Tensor:
    """The levels at the indices, then sigma_min and sigma_max: float64."""
    low, high = schedule.sigma_min, schedule.sigma_max
    levels = multistep_sigmas(options.indices, schedule.steps, low, high, schedule.rho)
    return torch.cat([levels, torch.tensor([low, high], dtype=torch.float64)])


class Solver(NamedTuple):
    """A solver with all that belongs to it."""

    run: Callable[[Denoiser, Tensor, Tensor, Noise, Any], Tensor]
    """(denoise, x, sigmas, noise, options) -> x."""
    evaluations: Callable[[int, Any], int]
    """(steps, options) -> calls of the denoiser for one sample."""
    options: type[Plain] = Plain
    levels: Callable[[Schedule, Any, torch.dtype], Tensor] = schedule_levels
    """(schedule, options, dtype of the state) -> sigmas, on the host."""
    draws: Callable[[int, Any], int] = lambda steps, options: 0
    """(steps, options) -> draws that the original makes after x_T, used or not: where its generators stand then."""
    uses: tuple[str, ...] = ("steps", "sigma_min")
    """What of the schedule decides a sample, beside sigma_max."""
    default_schedule: Callable[[int], str] = lambda steps: "karras"
    """steps -> the schedule where none is asked for."""
    visited: slice = slice(None)
    """Which of `levels` a user sees; the rest are parameters."""
    own_levels: bool = False
    """Whether its levels are its own, so that no other schedule and no --sigmas can replace them."""


def log_snr_at_few(steps: int) -> str:
    """Third order on few Karras levels extrapolates too far; log-SNR levels do better there (docs/solvers.md)."""
    return "logsnr" if steps <= 15 else "karras"


def each_step(steps: int, options: Any) -> int:
    return steps


def before_last(steps: int, options: Indices) -> int:
    return len(options.indices) - 1


NEW = ("steps", "sigma_min", "schedule")

SOLVERS: dict[str, Solver] = {
    "heun": Solver(heun, lambda steps, options: 2 * steps - 1, Churn, draws=each_step),
    "euler": Solver(euler, each_step),
    "dpm": Solver(dpm, lambda steps, options: 2 * steps, Churn, draws=each_step),
    "ancestral": Solver(ancestral, each_step, draws=each_step),
    "onestep": Solver(onestep, lambda steps, options: 1, uses=(), visited=slice(1), own_levels=True),
    "progdist": Solver(progdist, each_step, levels=progdist_levels, visited=slice(-1), own_levels=True),
    "multistep": Solver(
        multistep, before_last, Indices, multistep_levels, before_last, visited=slice(-2), own_levels=True
    ),
    "dpmpp_2m": Solver(dpmpp_2m, each_step, uses=NEW),
    "dpmpp_3m": Solver(dpmpp_3m, each_step, uses=NEW, default_schedule=log_snr_at_few),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, each_step, Sde, uses=NEW),
    "dpmpp_3m_sde": Solver(dpmpp_3m_sde, each_step, Sde, uses=NEW, default_schedule=log_snr_at_few),
    "unipc": Solver(unipc, each_step, UnipcOrder, uses=NEW, default_schedule=log_snr_at_few),
    "ipndm": Solver(ipndm, each_step, IpndmOrder, uses=NEW),
    "deis": Solver(deis, each_step, DeisOrder, uses=NEW),
    "restart": Solver(restart, lambda steps, options: 2 * steps - 1 + options.evaluations(), Restarts, uses=NEW),
}
"""By name; another solver is one function and one line here."""


@dataclass(frozen=True, kw_only=True)
class SolverChoice:
    """Which solver."""

    sampler: str = option("heun", f"The solver: {', '.join(SOLVERS)}.")

    def validate(self) -> None:
        """Raises RequestError: no such solver."""
        require(self.sampler in SOLVERS, f"--sampler is {self.sampler!r}; it must be one of {', '.join(SOLVERS)}")
