"""How publications scale latents for their networks, and take the pictures of their decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_sampler.networks.family import Decodes

EDM2_LATENTS: dict[str, Any] = {
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0,
    "final_std": 0.5,
}
"""How latents of Stable Diffusion's autoencoder are scaled, by channel, for the networks of EDM2:
what its StabilityVAEEncoder has by default."""


class Rule(NamedTuple):
    """How a publication turns the solver's results into what its decoder takes, and that into pixels."""

    latents: Callable[[Tensor, Decodes], Tensor]
    """x (B, C, H, W) float32 -> z."""
    unit: bool
    """Whether the decoder's pictures are taken to be in [0, 1], and not in [-1, 1]."""
    channels: int | None = None
    """Of the only latents for which it is; None: of any."""


def sd_latents(x: Tensor, decodes: Decodes) -> Tensor:
    """As Stable Diffusion, DiT, SiT and REPA scale latents."""
    return x / decodes.scaling + decodes.shift


def edm2_latents(x: Tensor, decodes: Decodes) -> Tensor:
    """As EDM2 scales latents, to a deviation of 0.5 by channel; what the autoencoder's config says is not used."""
    mean, std = (torch.tensor(EDM2_LATENTS[name], device=x.device)[:, None, None] for name in ("raw_mean", "raw_std"))
    scale = EDM2_LATENTS["final_std"] / std
    return (x + mean * scale) / scale


RULES = {
    "sd": Rule(sd_latents, unit=False),
    "edm2": Rule(edm2_latents, unit=True, channels=len(EDM2_LATENTS["raw_mean"])),
}
"""By name: what `NetworkSpec.latent` is."""
