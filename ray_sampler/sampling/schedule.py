"""Noise schedules (Karras et al. 2022, eq. 5). They live on the host: solvers take their entries as scalars."""

from __future__ import annotations

import torch
from torch import Tensor

RHO = 7.0


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0: (n + 1,) float32 on the CPU. n = 1: [sigma_max, 0]."""
    ramp = torch.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1)])


def multistep_sigmas(ts: tuple[int, ...], steps: int, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """The levels at indices `ts` of a schedule of `steps` points: (len(ts),) float64 on the CPU.

    The last point is sigma_min itself, free of rounding, so that the solver sees that no noise is due there.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    last = steps - 1
    levels = [sigma_min if t == last else (high + t / last * (low - high)) ** rho for t in ts]
    return torch.tensor(levels, dtype=torch.float64)
