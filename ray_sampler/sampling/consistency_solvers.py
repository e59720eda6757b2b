"""Solvers of consistency models (Song et al. 2023, "Consistency models"): one evaluation, or several.

Signature and conventions are those of `ray_sampler.sampling.solvers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option
from ray_sampler.sampling.schedules import ScheduleOptions, multistep_sigmas

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ray_sampler.sampling.noise import Noise
    from ray_sampler.sampling.parameterisation import Denoiser


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Where a consistency model is evaluated."""

    ts: str = option("", "Indices into the schedule for --sampler multistep, as 0,22,39.", numbers=True)

    def check(self) -> None:
        """Raises RequestError: the text is no list of numbers."""
        indices_of(self)


def indices_of(options: IndexOptions) -> tuple[int, ...]:
    """The indices that --ts gives. Raises RequestError: the text is no list of numbers."""
    try:
        return tuple(int(part) for part in options.ts.split(",")) if options.ts else ()
    except ValueError:
        raise RequestError(f"--ts is {options.ts!r}; it must be whole numbers with commas, as in 0,22,39") from None


def check_range(schedule: ScheduleOptions, options: IndexOptions) -> None:
    """Check only what the original code needs, which takes indices in any order.

    Raises:
        RequestError: there are too few, or one is not in the schedule.
    """
    indices = indices_of(options)
    require(schedule.steps >= 2, f"--steps is {schedule.steps}; --sampler multistep needs at least 2")
    require(len(indices) >= 2, f"--ts is {options.ts!r}; --sampler multistep needs two or more, as in 0,22,39")
    for t in indices:
        require(
            0 <= t < schedule.steps,
            f"--ts has {t}; with --steps {schedule.steps} its indices must be from 0 to {schedule.steps - 1}",
        )


def check_rise(schedule: ScheduleOptions, options: IndexOptions) -> None:
    """Raises RequestError: the indices are not in the schedule, or do not rise."""
    check_range(schedule, options)
    for before, after in pairwise(indices_of(options)):
        require(
            before < after,
            f"--ts is {options.ts!r}, where {after} follows {before}; its indices must rise, as in 0,22,39",
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


def onestep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """One evaluation at the largest level (Song et al. 2023, "Consistency models")."""
    return denoise(x, sigmas[0])


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
