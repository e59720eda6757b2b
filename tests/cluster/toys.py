"""A family, a solver, a decoder and a product, each one object: what others would write beside the built-in ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler.networks.family import Family, NetworkSpec, Opened, Precision, check_fit, without_memory
from ray_sampler.networks.weights import Checkpoint
from ray_sampler.sampling.finish import Finisher, Product
from ray_sampler.sampling.noise import Noise
from ray_sampler.sampling.options import DecoderOptions
from ray_sampler.sampling.parameterisation import Denoiser
from ray_sampler.sampling.solvers import Solver
from ray_sampler.storage.record import Column

SIZE = 4
"""Width and height of x, which has three channels."""


# A family: D(x, sigma, y) is the colour of the class y, whatever x.


@dataclass(frozen=True)
class ColourOptions:
    classes: int

    def identity(self) -> dict[str, Any]:
        return asdict(self)


class Colours(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.colours = nn.Parameter(torch.zeros(classes, 3))

    def forward(self, x: Tensor, times: Tensor, y: Tensor) -> Tensor:
        return self.colours[y][:, :, None, None].expand_as(x)


def open_colours(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    classes = len(checkpoint.tensors["colours"])
    check_fit(without_memory(lambda: Colours(classes)), checkpoint.tensors, "save one colour a class")
    spec = NetworkSpec("colours", ColourOptions(classes), (3, SIZE, SIZE), "denoiser", num_classes=classes)
    return Opened(spec, dict(checkpoint.tensors))


def build_colours(spec: NetworkSpec, precision: Precision) -> nn.Module:
    return Colours(spec.num_classes)


COLOURS = Family("colours", lambda checkpoint: "colours" in checkpoint.tensors, open_colours, build_colours)


# A solver: an eighth of the noise stays.


def grain(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: object) -> Tensor:
    return denoise(x, sigmas[0]) + x / sigmas[0] / 8 + noise(1) / 16


GRAIN = Solver(grain, lambda steps, options: 1)


# A decoder: every value becomes a square of four pixels, inverted.


def inverted(x: Tensor, networks: Mapping[str, Any]) -> dict[str, Tensor]:
    pixels = ((1 - x.clamp(-1, 1)) * 127.5).to(torch.uint8).permute(0, 2, 3, 1)
    return {"image": pixels.repeat_interleave(2, 1).repeat_interleave(2, 2).contiguous()}


def doubled(shape: tuple[int, int, int]) -> dict[str, Column]:
    return {"image": Column("uint8", (2 * shape[1], 2 * shape[2], shape[0]))}


def negative(options: DecoderOptions) -> Finisher:
    return Finisher(inverted, doubled, {"decoder": "negative"})


# A product: the mean colour of every picture, as a metric would keep its features.

MEANS = "features/means-00000000"


def mean_colours(kills_once: Path | None = None) -> Product:
    """Args: `kills_once`, a file that is made by the first actor that comes here, which dies of it."""

    def finish(images: Tensor, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        if kills_once is not None and not kills_once.exists():
            kills_once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"features": images.double().mean((1, 2)).float()}

    return Product("means", MEANS, {"features": Column("float32", (3,))}, "image", finish)
