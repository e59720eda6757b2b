"""Data whose denoiser is known exactly: every value of x comes from a mixture of four Gaussians, or from one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MEANS = torch.tensor([-1.0, -0.4, 0.3, 0.9], dtype=torch.float64)
STD = 0.25


def mixture(x: Tensor, sigma: Tensor | float, step: Tensor | None = None) -> Tensor:
    """E[x_0 | x] at a level, elementwise, in float64."""
    variance, noise = STD**2, float(sigma) ** 2
    weights = torch.softmax(-((x.double()[..., None] - MEANS) ** 2) / (2 * (variance + noise)), dim=-1)
    means = (variance * x.double()[..., None] + noise * MEANS) / (variance + noise)
    return (weights * means).sum(-1).to(x.dtype)


def gaussian(x: Tensor, sigma: Tensor | float, step: Tensor | None = None) -> Tensor:
    """The same for N(0, STD^2)."""
    return STD**2 / (STD**2 + float(sigma) ** 2) * x


def gaussian_flow(x: Tensor, high: float, low: float) -> Tensor:
    """The solution at level `low` of dx/dsigma = (x - gaussian(x, sigma)) / sigma from x at level `high`."""
    return x * math.sqrt((STD**2 + low**2) / (STD**2 + high**2))


def of_levels(levels: Sequence[float]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float64)


def start(high: float, values: int = 8) -> Tensor:
    """x_T: (values, 1, 1, 1) float64 over the range that has noise of level `high`."""
    return torch.linspace(-1.3 * high, 1.3 * high, values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def no_noise(draw: int) -> Tensor:
    raise AssertionError(f"draw {draw} was asked for, but nothing uses it")
