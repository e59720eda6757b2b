"""Solvers in a network's own time: of flows, in x_t and t, and ancestral sampling on a table of alphas.

Those of flows ask a network's velocity v(x_t, t), with t from 1 (noise) to 0 (data) whichever way its authors count,
and begin at noise itself, which has no finite sigma. Signature and conventions are those of `solvers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt
from typing import TYPE_CHECKING

from ray_sampler.errors import require
from ray_sampler.sampling.schedules import ScheduleOptions, name_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ray_sampler.sampling.guidance import SteppedDenoiser
    from ray_sampler.sampling.noise import Noise

LAST_NOISY = 0.04
"""The t at which flow_sde begins its last step, which adds no noise (Ma et al. 2024)."""


def flow_euler(velocity: SteppedDenoiser, x: Tensor, times: Tensor, noise: Noise, options: object) -> Tensor:
    """Euler's method on dx_t/dt = v(x_t, t) (Lipman et al. 2023)."""
    for t, t_next in pairwise(times):
        x = x + velocity(x, t, t) * (t_next - t)
    return x


def flow_heun(velocity: SteppedDenoiser, x: Tensor, times: Tensor, noise: Noise, options: object) -> Tensor:
    """Heun's second order method on the same; Euler's in the step to data (Yu et al. 2025, "REPA")."""
    for t, t_next in pairwise(times):
        v = velocity(x, t, t)
        ahead = x + v * (t_next - t)
        x = x + (v + velocity(ahead, t_next, t)) / 2 * (t_next - t) if t_next > 0 else ahead
    return x


def flow_sde(velocity: SteppedDenoiser, x: Tensor, times: Tensor, noise: Noise, options: object) -> Tensor:
    """Euler-Maruyama on dx = (v - w score / 2) dt + sqrt(w) dW with w = 2 t (Ma et al. 2024, eq. 4), last without dW.

    The score is -((1 - t) v + x) / t, so that the drift is v - t score = (2 - t) v + x at every t, 1 included.
    """
    for i, (t, t_next) in enumerate(pairwise(times)):
        drift = (2 - t) * velocity(x, t, t) + x
        x = x + drift * (t_next - t)
        if t_next > 0:
            x = x + noise(1 + i).to(x.dtype) * (2 * t * (t - t_next)).sqrt()
    return x


def even_times(n: int, end: float) -> list[float]:
    """n times from 1 to `end`, evenly; n = 1 gives [1]."""
    return [1 + i / (n - 1) * (end - 1) for i in range(n - 1)] + [end] if n > 1 else [1.0]


def flow_times(schedule: ScheduleOptions, options: object, dtype: torch.dtype) -> Tensor:
    """n steps from 1 to 0, even before --shift s: t' = s t / (1 + (s - 1) t). (n + 1,) on the host."""
    return shifted(even_times(schedule.steps + 1, 0.0), schedule.shift, dtype)


def sde_times(schedule: ScheduleOptions, options: object, dtype: torch.dtype) -> Tensor:
    """n - 1 steps from 1 to LAST_NOISY, even before --shift, and one to 0. (n + 1,) on the host."""
    return shifted([*even_times(schedule.steps, LAST_NOISY), 0.0], schedule.shift, dtype)


def shifted(times: list[float], s: float, dtype: torch.dtype) -> Tensor:
    """Esser et al. 2024, eq. 23."""
    import torch

    return torch.tensor([s * t / (1 + (s - 1) * t) for t in times], dtype=dtype)


def check_times(name: str) -> Callable[[ScheduleOptions, object], None]:
    """The check of a solver of flows."""

    def check(schedule: ScheduleOptions, options: object) -> None:
        require(
            name_of(schedule) == "shifted",
            f"the levels are {name_of(schedule)}, but --sampler {name} has fixed times, even or with --shift; "
            "leave --schedule, --rho and --sigmas out",
        )

    return check


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The table on which a network was trained; no flag, but the network's own."""

    alphas: tuple[float, ...] | None = None
    """Cumulative alphas; None: those of DDPM."""


def ddpm(denoise: SteppedDenoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    """Ancestral sampling on levels of a table (Ho et al. 2020, algorithm 2), in EDM coordinates.

    With s = sigma_i and r = sigma_{i+1}: the posterior's mean is D + (r / s)^2 (x - D), and its variance lies between
    r^2 (s^2 - r^2) / s^2, which is taken where no variance is learned, and (s^2 - r^2) (1 + r^2) / (1 + s^2). A learned
    one, v in [-1, 1], is between their logarithms (Nichol & Dhariwal 2021, eq. 15). D has it in the channels after
    those of x.
    """
    channels = x.shape[1]
    for i, (s, r) in enumerate(pairwise(sigmas.tolist())):
        result = denoise(x, sigmas[i])
        denoised, learned = result[:, :channels], result[:, channels:]
        x = denoised + (r / s) ** 2 * (x - denoised)
        if r > 0:
            deviation: Tensor | float = r / s * sqrt((s - r) * (s + r))
            if learned.shape[1]:
                widest = log((1 + r**-2) / (1 + s**-2)) / 2
                deviation = deviation * ((learned + 1) / 2 * widest).exp()
            x = x + noise(1 + i).to(x.dtype) * deviation
    return x


def table_levels(schedule: ScheduleOptions, options: TableOptions, dtype: torch.dtype) -> Tensor:
    """The levels of n indices of the table, even from its last to its first, then 0: (n + 1,) on the host."""
    import torch

    from ray_sampler.sampling.parameterisation import LINEAR_ALPHAS

    alphas, n = options.alphas or LINEAR_ALPHAS, schedule.steps
    last = len(alphas) - 1
    indices = [round(i * last / (n - 1)) for i in reversed(range(n))] if n > 1 else [last]
    return torch.tensor([*(sqrt((1 - alphas[i]) / alphas[i]) for i in indices), 0.0], dtype=dtype)


def check_table(schedule: ScheduleOptions, options: TableOptions) -> None:
    """Raises RequestError: there are more steps than levels."""
    most = len(options.alphas or range(schedule.steps))
    require(
        schedule.steps <= most,
        f"--steps is {schedule.steps}; for --sampler ddpm it must be at most {most}, the length of the network's table",
    )


def scale_of(sigma: Tensor) -> Tensor:
    """What makes a state of a table's path, which has variance 1, one of EDM coordinates: 1 / sqrt(alpha)."""
    return (1 + sigma**2).sqrt()
