"""Small autoencoders as diffusers saves them, and a network of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler import Model
from ray_sampler.networks.decoders import autoencoder_class

LEVELS = 2
"""Of the small autoencoder: pictures are twice as large as latents."""


def autoencoder(levels: int = LEVELS, **config: Any) -> Any:
    """An AutoencoderKL of random weights, each of which matters."""
    torch.manual_seed(0)
    vae = autoencoder_class()(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **{"block_out_channels": (8, 16, 16, 16)[:levels], "norm_num_groups": 4, "latent_channels": 4} | config,
    ).eval()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vae


def saved(folder: Path, levels: int = LEVELS, variant: str | None = None, **config: Any) -> Path:
    """Its folder, as diffusers writes it."""
    autoencoder(levels, **config).save_pretrained(folder, variant=variant)
    return folder


class Waves(nn.Module):
    """D of a network of latents: a value is of its own noise alone, so it has the same bits in every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.where(x > 0, 0.5, -0.25) * self.scale + x / sigma[:, None, None, None] / 8


def model(rule: str | None = "sd", channels: int = 4, side: int = 8) -> Model:
    return Model(Waves(), "denoiser", (channels, side, side), decoder=rule)
