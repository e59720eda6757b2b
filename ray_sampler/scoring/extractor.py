"""What a network that makes features of pictures is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

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


def rgb(pictures: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, 3, H, W), contiguous; a grey channel three times."""
    return pictures.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()
