"""The preconditioning and the sampling function of the consistency-models repository, over our solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ray_sampler.compat.cm.random_util import Device, NoiseSource, get_generator
from ray_sampler.errors import require
from ray_sampler.sampling.guidance import SteppedDenoiser
from ray_sampler.sampling.multistep_solvers import AddedNoise, IndexOptions, check_indices
from ray_sampler.sampling.noise import in_order
from ray_sampler.sampling.parameterisation import SIGMA_DATA, TIMES, consistency_scalings, edm_scalings
from ray_sampler.sampling.schedules import RHO, ScheduleOptions, karras_sigmas
from ray_sampler.sampling.solvers import SOLVERS, Churn, Solver

EVALUATIONS = {"heun": 2, "dpm": 2, "euler": 1, "ancestral": 1, "progdist": 1}
"""Network evaluations of a step, for the solvers that report their steps; the others report none."""

ORIGINAL = ("heun", "euler", "dpm", "ancestral", "onestep", "progdist", "multistep")
"""The solvers of the consistency-models repository."""

RAISES_SIGMA = ("heun", "dpm", "ancestral")
"""Solvers that report sigma_hat, the level of the step's first evaluation."""


@dataclass
class KarrasDenoiser:
    """Preconditioning of a network: EDM's, or with `distillation` that of consistency models."""

    sigma_data: float = SIGMA_DATA
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = RHO
    weight_schedule: str = "karras"
    """Of the training loss; inert in sampling."""
    distillation: bool = False

    def __post_init__(self) -> None:
        require(self.sigma_data == SIGMA_DATA, f"sigma_data is {self.sigma_data}; only {SIGMA_DATA} is supported")

    def denoise(
        self, model: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, **model_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """F(c_in x, 250 ln sigma, **model_kwargs) and D(x, sigma), unclamped, of x_t (B, C, H, W) at sigmas (B,)."""
        scalings = consistency_scalings(sigmas, self.sigma_min) if self.distillation else edm_scalings(sigmas)
        c_skip, c_out, c_in = (s[:, None, None, None] for s in scalings)
        model_output = model(c_in * x_t, TIMES["250log"](sigmas), **model_kwargs)
        return model_output, c_out * model_output + c_skip * x_t


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0: (n + 1,) float32 (Karras et al. 2022, eq. 5)."""
    return karras_sigmas(n, sigma_min, sigma_max, rho).to(device)


def karras_sample(
    diffusion: KarrasDenoiser,
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], object] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: Device | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7.0,
    sampler: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = inf,
    s_noise: float = 1.0,
    generator: NoiseSource | None = None,
    ts: Iterable[int] | None = None,
) -> Tensor:
    """Samples x_0 of `shape`, (B, C, H, W), float32 in [-1, 1] on `device`.

    Args:
        callback: called once a step by heun, dpm, euler, ancestral and progdist with x, i, sigma, denoised and,
            where the solver has one, sigma_hat, as of the step's first evaluation.
        model_kwargs: passed to the model, as {"y": labels}.
        generator: from `get_generator`; its streams end where the original's would. Without one, torch's global
            generator serves.
        ts: indices into the schedule, for multistep.

    Raises:
        RequestError: an argument is wrong.
    """
    rho = diffusion.rho if sampler == "multistep" else rho
    schedule = ScheduleOptions(steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    solver, options = settled(
        sampler, schedule, Churn(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise), ts
    )
    source = get_generator("dummy") if generator is None else generator
    x_T = source.randn(*shape, device=torch.get_default_device() if device is None else device)
    drawn = 0

    def draw_next() -> Tensor:
        nonlocal drawn
        drawn += 1
        return x_T if drawn == 1 else source.randn_like(x_T)

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        _, denoised = diffusion.denoise(model, x, sigma.to(x).expand(len(x)), **(model_kwargs or {}))
        return denoised.clamp(-1, 1) if clip_denoised else denoised

    sigmas, noise = solver.levels(schedule, options, torch.float32), in_order(draw_next)
    with Progress(disable=not progress or sampler not in EVALUATIONS) as bar, torch.no_grad():
        task = bar.add_task("sampling", total=steps)
        reported = reporting(denoise, sampler, sigmas, callback, lambda: bar.advance(task))
        x_0 = solver.run(reported, noise(0) * sigma_max, sigmas, noise, options).clamp(-1, 1)
    while drawn < 1 + solver.draws(steps, options):
        draw_next()
    return x_0


def settled(sampler: str, schedule: ScheduleOptions, churn: Churn, ts: Iterable[int] | None) -> tuple[Solver, Any]:
    """The solver of that name and its options, once all values have been checked."""
    require(sampler in ORIGINAL, f"sampler is {sampler!r}; it must be one of {', '.join(ORIGINAL)}")
    solver = SOLVERS[sampler]
    schedule.check()
    churn.check()
    AddedNoise.check(churn)
    if solver.options is not IndexOptions:
        return solver, churn
    options = IndexOptions(ts=",".join(map(str, ts or ())))
    check_indices(schedule, options, rising=False)
    return solver, options


def reporting(
    denoise: SteppedDenoiser,
    sampler: str,
    sigmas: Tensor,
    callback: Callable[[dict[str, Any]], object] | None,
    advance: Callable[[], None],
) -> SteppedDenoiser:
    """`denoise`, which at the first evaluation of each step calls `callback` with its state and then `advance`."""
    if sampler not in EVALUATIONS:
        return denoise
    evaluations = 0

    def reported(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        nonlocal evaluations
        denoised = denoise(x, sigma)
        number, within = divmod(evaluations, EVALUATIONS[sampler])
        evaluations += 1
        if within == 0:
            if callback is not None:
                state = {"x": x, "i": number, "sigma": sigmas[number], "denoised": denoised}
                callback(state | ({"sigma_hat": sigma} if sampler in RAISES_SIGMA else {}))
            advance()
        return denoised

    return reported
