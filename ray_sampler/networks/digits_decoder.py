"""The decoder of the bundled latent model: from latents (B, 4, 8, 8) to pictures (B, 3, 32, 32)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ray_sampler.networks.family import DTYPES, Decodes, Family, NetworkSpec, Opened, Precision, without_memory
from ray_sampler.networks.weights import Checkpoint

LATENT_CHANNELS = 4
FACTOR = 4
"""Pixels in a row for each of a latent."""


class DigitsDecoder(nn.Module):
    """Latents of unit variance -> pictures of about [-1, 1] with three equal channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(64, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(48, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        grey: Tensor = self.layers(latents)
        return grey.expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class DecoderOptions:
    """There is one such network."""

    def identity(self) -> dict[str, Any]:
        return {}


def recognises(checkpoint: Checkpoint) -> bool:
    return checkpoint.tensors.keys() == without_memory(DigitsDecoder).state_dict().keys()


def open_decoder(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """The bundled weights, which fit."""
    spec = NetworkSpec(
        family="digits-decoder",
        options=DecoderOptions(),
        shape=(LATENT_CHANNELS, 1, 1),
        kind="decoder",
        decodes=Decodes(LATENT_CHANNELS, FACTOR, pictures=3),
    )
    return Opened(spec, checkpoint.tensors)


def build(spec: NetworkSpec, precision: Precision) -> nn.Module:
    return DigitsDecoder().to(DTYPES[precision])


DIGITS_DECODER = Family("digits-decoder", recognises, open_decoder, build)
