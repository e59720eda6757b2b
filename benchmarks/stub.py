"""A network of one block, which stands in for a real one where the question is what a run does around it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_sampler import Model
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet


def one_block(image_size: int) -> AdmOptions:
    return AdmOptions(
        image_size=image_size, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="4"
    )


def settings(arch: AdmOptions) -> dict[str, Any]:
    """What describes the architecture to a run."""
    plain = asdict(AdmOptions())
    return {name: value for name, value in asdict(arch).items() if value != plain[name]}


def save_random(arch: AdmOptions, path: Path) -> Path:
    """Write small random weights as a checkpoint; returns its path."""
    torch.manual_seed(0)
    save_file({name: torch.randn_like(w) * 0.02 for name, w in UNet(arch).state_dict().items()}, path)
    return path


class OneValue(nn.Module):
    """D of a network of latents."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(x) * self.scale


def latents(weights: str | None) -> Model:
    """For --model python:stub:latents: latents of 4 x 32 x 32."""
    return Model(OneValue(), "denoiser", (4, 32, 32), decoder="sd")
