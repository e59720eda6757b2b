"""Networks that make features of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ray_sampler.scoring.options import FUNCTION, FeatureOptions

WEIGHTS_FLAG = "--features_weights"


@dataclass(frozen=True)
class Extractor:
    """A network that makes features of pictures, and what is said of it."""

    name: str
    """inception, dinov2, digits or python:module:function."""
    sha256: str
    """Of its weights, 64 hexadecimal digits."""
    network: nn.Module
    """uint8 (B, H, W, C) -> float32 (B, dims); one that takes three channels repeats a grey one itself. On the CPU."""
    dims: int
    resize: str
    """How pictures are brought to the size that it takes."""
    head: Callable[[np.ndarray], np.ndarray] | None = None
    """Features (n, dims) float32 -> logits (n, K) without a bias, for the Inception Score; None where it has none."""
    by_value: tuple[str, ...] = ()
    """Names of modules that travel with the network, as other nodes lack their files."""


def open_extractor(options: FeatureOptions, shape: tuple[int, ...] = (64, 64, 3)) -> Extractor:
    """The extractor that a request asks for.

    Args:
        shape: (H, W, C) of the pictures, with which a function's network is tried.

    Raises:
        RequestError: its weights cannot be read or are others; a package is missing; a user's function raises, or
            returns something else.
    """
    from ray_sampler.scoring import digits_network, dinov2, inception, own

    name, weights = options.extractor, options.features_weights
    if name.startswith(FUNCTION):
        return own.open_own(name, weights, shape)
    if name == "digits":
        return digits_network.open_digits(weights)
    return dinov2.open_dinov2(weights) if name == "dinov2" else inception.open_inception(weights)


def rgb(pictures: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 3, H, W), contiguous; a grey channel three times."""
    return pictures.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
