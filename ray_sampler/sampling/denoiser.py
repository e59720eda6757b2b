"""Preconditioning: a network F becomes a denoiser D (Karras et al. 2022, table 1; Song et al. 2023, appendix C)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIGMA_DATA = 0.5
"""Standard deviation of the training images, the same for all models of the family."""

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Scalings = tuple[Tensor, Tensor, Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma): (B, C, H, W) images at a noise level -> the images expected without noise. The level is one
for all, 0-d on the host, so that no copy to the device is needed, or one for each, (B,) beside x."""


def edm_scalings(sigma: Tensor) -> Scalings:
    """c_skip, c_out, c_in of EDM (Karras et al. 2022, table 1), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance**0.5, 1 / variance**0.5


def consistency_scalings(sigma: Tensor, sigma_min: float) -> Scalings:
    """c_skip, c_out, c_in with D(x, sigma_min) = x (Song et al. 2023, appendix C), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    above = sigma - sigma_min
    return (
        SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2),
        above * SIGMA_DATA / variance**0.5,
        1 / variance**0.5,
    )


def network_time(sigma: Tensor) -> Tensor:
    """The time that the networks of this family are conditioned on: 250 ln sigma."""
    return 250.0 * torch.log(sigma + 1e-44)


def make_denoiser(
    network: Network, labels: Tensor | None, *, consistency: bool, sigma_min: float, clip: bool
) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, 250 ln sigma, y), clamped to [-1, 1] if `clip`.

    Args:
        network: F, called as F(x, times (B,), y) with x float32.
        labels: y, (B,) int64 classes, or None for an unconditional network.
        consistency: take the consistency models' scalings, with `sigma_min`, in place of EDM's.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        scalings = consistency_scalings(sigma, sigma_min) if consistency else edm_scalings(sigma)
        c_skip, c_out, c_in = scalings if sigma.ndim == 0 else (s[:, None, None, None] for s in scalings)
        time = network_time(sigma)
        times = time if time.ndim else x.new_full((len(x),), time.item())
        denoised = c_skip * x + c_out * network(c_in * x, times, labels)
        return denoised.clamp(-1, 1) if clip else denoised

    return denoise
