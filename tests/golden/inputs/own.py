"""Tiny networks of a user's own, of every kind: each function is a --model python:own:NAME."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler import Model

HIDDEN = 8


def fill(tensor: Tensor, salt: int, scale: float) -> None:
    """Weights that are the same on every machine: multiples of 2^-16 in [-scale, scale], for a scale that is one."""
    index = torch.arange(tensor.numel(), dtype=torch.int64) + 7919 * salt
    hashed = (index * 2654435761 % 2**32) // 2**15 % 2**16
    with torch.no_grad():
        tensor.copy_(((hashed - 2**15).double() / 2**15 * scale).view(tensor.shape))


class Small(nn.Module):
    """Two convolutions, with the time and the label added between them."""

    def __init__(self, channels: int, rows: int = 0, one_hot: bool = False, salt: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, HIDDEN, 3, padding=1)
        self.time = nn.Linear(2, HIDDEN)
        self.label = (nn.Linear(rows, HIDDEN, bias=False) if one_hot else nn.Embedding(rows, HIDDEN)) if rows else None
        self.last = nn.Conv2d(HIDDEN, channels, 3, padding=1)
        for place, tensor in enumerate(self.parameters()):
            fill(tensor, salt + place, 0.25)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = self.first(x) + self.time(torch.stack([t.sin(), (t / 100).cos()], dim=1))[:, :, None, None]
        if self.label is not None:
            hidden = hidden + self.label(y)[:, :, None, None]
        return self.last(torch.nn.functional.silu(hidden))


class Half:
    """A parameterisation of a user's own: F sees x / (1 + sigma) and ln sigma, and D is half of each."""

    def denoiser(self, network: Any, labels: Tensor | None) -> Any:
        def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
            inputs, level = x.float(), sigma.float()
            scaled = inputs / (1 + level)
            return (0.5 * scaled + 0.5 * network(scaled, level.log().expand(len(x)), labels)).to(x.dtype)

        return denoise

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": "half"}


COLOUR = (3, 8, 8)


def edm(weights: str | None) -> Model:
    return Model(Small(3), "edm", COLOUR, c_noise="log/4")


def edm_time(weights: str | None) -> Model:
    return Model(Small(3), "edm", COLOUR, c_noise=lambda sigma: sigma.log() / 2)


def denoiser(weights: str | None) -> Model:
    return Model(Small(3), "denoiser", COLOUR, sigma_min=0.01, sigma_max=30.0)


def consistency(weights: str | None) -> Model:
    return Model(Small(3), "consistency", COLOUR)


def eps(weights: str | None) -> Model:
    return Model(Small(3, 6), "eps", COLOUR, num_classes=5, null_label=5)


def v(weights: str | None) -> Model:
    return Model(Small(3), "v", COLOUR, alphas=[math.cos(math.pi / 2 * (i + 1) / 52) ** 2 for i in range(50)])


def x0(weights: str | None) -> Model:
    return Model(Small(3), "x0", COLOUR)


def x0_of_a_path(weights: str | None) -> Model:
    return Model(Small(3), "x0", COLOUR, data_at=1)


def velocity(weights: str | None) -> Model:
    return Model(Small(3), "velocity", COLOUR, data_at=0)


def velocity_from_noise(weights: str | None) -> Model:
    return Model(Small(3, 4), "velocity", COLOUR, num_classes=4, data_at=1)


def object_of_its_own(weights: str | None) -> Model:
    return Model(Small(3), Half(), COLOUR)


def one_hot(weights: str | None) -> Model:
    return Model(Small(3, 5, one_hot=True), "edm", COLOUR, num_classes=5, null_label=5, one_hot=True)


def grey(weights: str | None) -> Model:
    return Model(Small(1, 6), "edm", (1, 8, 8), num_classes=5, null_label=5)


def latent(weights: str | None) -> Model:
    return Model(Small(4), "edm", (4, 8, 8), decoder="sd")


def guide(weights: str | None) -> Model:
    """Another network without classes, to guide by."""
    return Model(Small(3, salt=100), "v", COLOUR)
