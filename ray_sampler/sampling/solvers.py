"""Solvers: from x_T to x_0, each a plain function of (denoise, x, sigmas, noise, options).

`denoise(x, sigma, step)` is D of a batch x, (B, C, H, W); `sigmas` are levels on the host, in the dtype of x, so that
no step waits for the device; `step` is the level at which the step began. `noise(1 + i)` is the noise of step i, which
a solver asks for only where it uses it. Solvers of one step and the registry SOLVERS are here, multistep solvers in
`multistep_solvers`, each with its options; none of them imports torch before it computes.
Symbols are those of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models").
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ray_sampler.errors import require
from ray_sampler.options import option
from ray_sampler.sampling.multistep_solvers import (
    DEIS_ORDERS,
    IPNDM_ORDERS,
    UNIPC_ORDERS,
    AddedNoise,
    IndexOptions,
    OrderOptions,
    SdeOptions,
    check_indices,
    deis,
    dpmpp,
    indices_of,
    ipndm,
    left_noise,
    multistep,
    multistep_levels,
    sde_identity,
    unipc,
)
from ray_sampler.sampling.path_solvers import (
    TableOptions,
    check_table,
    check_times,
    ddpm,
    flow_euler,
    flow_heun,
    flow_sde,
    flow_times,
    scale_of,
    sde_times,
    table_levels,
)
from ray_sampler.sampling.restarts import (
    RestartOptions,
    check_intervals,
    intervals_of,
    restart_evaluations,
    restart_identity,
    snapped,
)
from ray_sampler.sampling.schedules import ScheduleOptions, karras_sigmas, levels_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ray_sampler.sampling.guidance import SteppedDenoiser
    from ray_sampler.sampling.noise import Noise
    from ray_sampler.sampling.parameterisation import Denoiser


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A solver without options."""


@dataclass(frozen=True, kw_only=True)
class ChurnOptions(AddedNoise):
    """Added noise of the stochastic sampler (Karras et al. 2022, algorithm 2)."""

    s_churn: float = option(0.0, "Stochasticity (churn) of heun and dpm.")
    s_tmin: float = option(0.0, "Smallest noise level with churn.")
    s_tmax: float = option(inf, "Largest noise level with churn.")

    def check(self) -> None:
        """Raises RequestError: a value is wrong, by itself or beside another."""
        for name, value in (("s_churn", self.s_churn), ("s_tmin", self.s_tmin)):
            require(0 <= value < inf, f"--{name} is {value:g}; it must be a finite number of at least 0")
        require(self.s_tmax >= self.s_tmin, f"--s_tmax is {self.s_tmax:g}; it must be at least s_tmin, {self.s_tmin:g}")


@dataclass(frozen=True, kw_only=True)
class Churn(ChurnOptions):
    """The same with the arithmetic of one script or another."""

    as_edm: bool = False
    """Whether the raised level is sigma + gamma sigma, as EDM's scripts round it, and not sigma (gamma + 1)."""


def churn_identity(churn: ChurnOptions) -> dict[str, Any]:
    """What decides a sample: the rest only where there is churn."""
    rest = {"s_tmin": float(churn.s_tmin), "s_tmax": str(float(churn.s_tmax)), "s_noise": float(churn.s_noise)}
    return {"s_churn": float(churn.s_churn)} | (rest if churn.s_churn > 0 else {})


def add_churn(x: Tensor, sigmas: Tensor, i: int, noise: Noise, churn: Churn) -> tuple[Tensor, Tensor]:
    """x and its level, raised from sigma_i to sigma_i (1 + gamma) (Karras et al. 2022, algorithm 2, lines 5 and 6)."""
    sigma, steps = sigmas[i], len(sigmas) - 1
    gamma = min(churn.s_churn / steps, 2**0.5 - 1) if churn.s_tmin <= sigma <= churn.s_tmax else 0.0
    sigma_hat = sigma + gamma * sigma if churn.as_edm else sigma * (gamma + 1)
    if gamma > 0:
        x = x + noise(1 + i) * churn.s_noise * (sigma_hat**2 - sigma**2) ** 0.5
    return x, sigma_hat


def heun(denoise: SteppedDenoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """Heun's second order method with churn (Karras et al. 2022, algorithm 2); Euler's in the step to 0."""
    for i in range(len(sigmas) - 1):
        x, sigma = add_churn(x, sigmas, i, noise, churn)
        x = heun_step(denoise, x, sigma, sigmas[i + 1], sigmas[i])
    return x


def heun_step(denoise: SteppedDenoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, step: Tensor) -> Tensor:
    """From x at sigma to sigma_next, in a step that began at level `step` (ibid., lines 7 to 11)."""
    d = (x - denoise(x, sigma, step)) / sigma
    x_next = x + d * (sigma_next - sigma)
    if sigma_next > 0:
        d_next = (x_next - denoise(x_next, sigma_next, step)) / sigma_next
        x_next = x + (d + d_next) / 2 * (sigma_next - sigma)
    return x_next


def restart(denoise: SteppedDenoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: RestartOptions) -> Tensor:
    """Heun's method that goes back up and down again within intervals (Xu et al. 2023, "Restart", algorithm 1).

    On reaching the level nearest to an interval's tmin, K times: noise is added up to tmax, then Heun's method goes
    down again on N Karras levels. Draws are numbered in the order in which they are used.
    """
    draw = 0
    levels, intervals = sigmas.tolist(), intervals_of(options)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x = heun_step(denoise, x, sigma, sigma_next, sigma)
        for interval in intervals:
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


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """Euler's method on dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 3)."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_next - sigma)
    return x


def dpm(denoise: SteppedDenoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """The midpoint method, after DPM-Solver-2 (Lu et al. 2022), with churn; midpoints lie on a rho = 3 schedule."""
    for i in range(len(sigmas) - 1):
        x, sigma = add_churn(x, sigmas, i, noise, churn)
        d = (x - denoise(x, sigma, sigmas[i])) / sigma
        sigma_mid = ((sigma ** (1 / 3) + sigmas[i + 1] ** (1 / 3)) / 2) ** 3
        x_mid = x + d * (sigma_mid - sigma)
        d_mid = (x_mid - denoise(x_mid, sigma_mid, sigmas[i])) / sigma_mid
        x = x + d_mid * (sigmas[i + 1] - sigma)
    return x


def ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """Euler steps down past the next level, then fresh noise up to it (Song et al. 2021, as ancestral sampling)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        sigma_down = sigma_next * (sigma_next / sigma)
        sigma_up = sigma_next * ((1 - sigma_next / sigma) * (1 + sigma_next / sigma)) ** 0.5
        d = (x - denoise(x, sigmas[i])) / sigma
        x = x + d * (sigma_down - sigma)
        if sigma_up > 0:
            x = x + noise(1 + i) * sigma_up
    return x


def onestep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """One evaluation at the largest level (Song et al. 2023, "Consistency models")."""
    return denoise(x, sigmas[0])


class Solver(NamedTuple):
    """A solver with all that belongs to it."""

    run: Callable[[SteppedDenoiser, Tensor, Tensor, Noise, Any], Tensor]
    """(denoise, x, sigmas, noise, options) -> x."""
    evaluations: Callable[[int, Any], int]
    """(steps, options) -> calls of the denoiser for one sample."""
    options: type = NoOptions
    """The dataclass of the options that it takes."""
    identity: Callable[[Any], dict[str, Any]] = asdict
    """options -> what of them decides a sample, by effective value."""
    check: Callable[[ScheduleOptions, Any], None] = lambda schedule, options: None
    """Raises RequestError: options are wrong for this solver, or beside the schedule."""
    warning: Callable[[ScheduleOptions, Any], str | None] = lambda schedule, options: None
    """What is right, and perhaps not what was meant."""
    levels: Callable[[ScheduleOptions, Any, torch.dtype], Tensor] = lambda schedule, options, dtype: levels_of(
        schedule, dtype
    )
    """(schedule, options, dtype of the state) -> sigmas, on the host."""
    draws: Callable[[int, Any], int] = lambda steps, options: 0
    """(steps, options) -> draws that the original makes after x_T, used or not: the position of its generators then."""
    uses: tuple[str, ...] = ("steps", "sigma_max", "sigma_min")
    """What of the schedule decides a sample."""
    default_schedule: Callable[[int], str] = lambda steps: "karras"
    """steps -> the schedule where none is asked for."""
    visited: slice = slice(None)
    """Which of `levels` a user sees; the rest are parameters."""
    own_levels: bool = False
    """Whether its levels are its own, so that no other schedule and no --sigmas can replace them."""
    path: Literal["any", "flow", "table"] = "any"
    """Which networks it samples: any; those of a flow, whose velocity it asks; or those of a table of alphas."""
    start: Callable[[Tensor], Tensor | float] | None = None
    """The first level -> what scales x_T; None: that level."""

    def sigmas(self, schedule: ScheduleOptions, options: Any) -> list[float]:
        """The noise levels that it visits, before they are rounded to the dtype of the state."""
        import torch

        return self.levels(schedule, options, torch.float64)[self.visited].tolist()


NEW = ("steps", "sigma_max", "sigma_min", "schedule")


def log_snr_at_few(steps: int) -> str:
    """Third order on few Karras levels extrapolates too far; log-SNR levels do better there (docs/solvers.md)."""
    return "logsnr" if steps <= 15 else "karras"


def each_step(steps: int, options: Any) -> int:
    return steps


def of_order(name: str, run: Callable[..., Tensor], orders: tuple[int, int], **more: Any) -> Solver:
    """A multistep solver whose order can be chosen, from the lowest to the highest, its default."""
    lowest, highest = orders

    def check(schedule: ScheduleOptions, options: OrderOptions) -> None:
        require(
            lowest <= (highest if options.order is None else options.order) <= highest,
            f"--order is {options.order}; for --sampler {name} it must be from {lowest} to {highest}",
        )

    def identity(options: OrderOptions) -> dict[str, Any]:
        return {"order": options.order or highest}

    return Solver(run, each_step, OrderOptions, identity, check, uses=NEW, **more)


def of_flow(name: str, run: Callable[..., Tensor], evaluations: Callable[[int, Any], int] = each_step) -> Solver:
    """A solver of flows, from t = 1 to 0."""
    return Solver(
        run,
        evaluations,
        check=check_times(name),
        levels=flow_times,
        uses=("steps", "schedule"),
        default_schedule=lambda steps: "shifted",
        path="flow",
        start=lambda t: 1.0,
    )


SOLVERS: dict[str, Solver] = {
    "heun": Solver(heun, lambda steps, options: 2 * steps - 1, Churn, churn_identity, draws=each_step),
    "euler": Solver(euler, each_step),
    "dpm": Solver(dpm, lambda steps, options: 2 * steps, Churn, churn_identity, draws=each_step),
    "ancestral": Solver(ancestral, each_step, draws=each_step),
    "onestep": Solver(onestep, lambda steps, options: 1, uses=("sigma_max",), visited=slice(1), own_levels=True),
    "progdist": Solver(  # without the step to 0, the sampler of progressively distilled models
        euler,
        each_step,
        levels=lambda schedule, options, dtype: levels_of(schedule, dtype, schedule.steps + 1)[:-1],
        own_levels=True,
    ),
    "multistep": Solver(
        multistep,
        lambda steps, options: len(indices_of(options)) - 1,
        IndexOptions,
        lambda options: {"ts": ",".join(map(str, indices_of(options)))},
        check_indices,
        left_noise,
        multistep_levels,
        draws=lambda steps, options: len(indices_of(options)) - 1,
        visited=slice(-2),
        own_levels=True,
    ),
    "dpmpp_2m": Solver(partial(dpmpp, order=2), each_step, uses=NEW),
    "dpmpp_3m": Solver(partial(dpmpp, order=3), each_step, uses=NEW, default_schedule=log_snr_at_few),
    "dpmpp_2m_sde": Solver(partial(dpmpp, order=2), each_step, SdeOptions, sde_identity, uses=NEW),
    "dpmpp_3m_sde": Solver(
        partial(dpmpp, order=3), each_step, SdeOptions, sde_identity, uses=NEW, default_schedule=log_snr_at_few
    ),
    "unipc": of_order("unipc", unipc, UNIPC_ORDERS, default_schedule=log_snr_at_few),
    "ipndm": of_order("ipndm", ipndm, IPNDM_ORDERS),
    "deis": of_order("deis", deis, DEIS_ORDERS),
    "restart": Solver(restart, restart_evaluations, RestartOptions, restart_identity, check_intervals, uses=NEW),
    "flow_euler": of_flow("flow_euler", flow_euler),
    "flow_heun": of_flow("flow_heun", flow_heun, lambda steps, options: 2 * steps - 1),
    "flow_sde": of_flow("flow_sde", flow_sde)._replace(levels=sde_times, draws=each_step),
    "ddpm": Solver(
        ddpm,
        each_step,
        TableOptions,
        lambda options: {},
        check_table,
        levels=table_levels,
        draws=each_step,
        uses=("steps",),
        own_levels=True,
        path="table",
        start=scale_of,
    ),
}
"""By name; another solver is one function and one line here."""


@dataclass(frozen=True, kw_only=True)
class SolverOptions(ChurnOptions, IndexOptions, OrderOptions, SdeOptions, RestartOptions):
    """Which solver, and the options of all of them."""

    sampler: str = option("heun", f"Solver: {', '.join(SOLVERS)}.", common=True)

    def check(self) -> None:
        """Raises RequestError: no such solver."""
        known = re.sub("^(k|sample)_|_?karras$", "", re.sub(r"[\s-]+", "_", self.sampler.lower()))
        hint = (
            f"what others call that is --sampler {ELSEWHERE[known]} here"
            if known in ELSEWHERE
            else (f"it must be one of {', '.join(SOLVERS)}")
        )
        require(self.sampler in SOLVERS, f"--sampler is {self.sampler!r}; {hint}")


ELSEWHERE = {
    **dict.fromkeys(("ddim", "ode", "euler_ode", "eulerdiscretescheduler"), "euler (DDIM without noise)"),
    **dict.fromkeys(("euler_a", "euler_ancestral", "ddim_ancestral"), "ancestral"),
    **dict.fromkeys(("edm", "heundiscretescheduler", "heun2"), "heun"),
    **dict.fromkeys(("dpm2", "dpm_2"), "dpm"),
    **dict.fromkeys(
        ("dpm++", "dpmpp", "dpm++_2m", "dpm_solver++", "dpmsolver++", "dpm_solver", "dpmsolver"), "dpmpp_2m"
    ),
    **dict.fromkeys(("dpm++_sde", "dpmpp_sde", "dpm++_2m_sde", "sde_dpmsolver++"), "dpmpp_2m_sde"),
    **dict.fromkeys(("dpm++_3m",), "dpmpp_3m"),
    **dict.fromkeys(("dpm++_3m_sde",), "dpmpp_3m_sde"),
    **dict.fromkeys(("plms", "pndm", "lms"), "ipndm"),
    **dict.fromkeys(("uni_pc", "unipc_bh2"), "unipc"),
    **dict.fromkeys(("lcm", "cm", "consistency"), "multistep or onestep"),
}
"""Solvers by their names in other samplers, in lower case and without the suffix for Karras levels."""
