"""The sampling function and the preconditioning that it takes."""

from __future__ import annotations

from torch import Tensor

from ray_sampler.compat.generators import Device
from ray_sampler.compat.karras import karras_sample
from ray_sampler.compat.preconditioned import KarrasDenoiser
from ray_sampler.sampling.schedules import karras_sigmas

__all__ = ["KarrasDenoiser", "get_sigmas_karras", "karras_sample"]


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0: (n + 1,) float32 (Karras et al. 2022, eq. 5)."""
    return karras_sigmas(n, sigma_min, sigma_max, rho).to(device)
