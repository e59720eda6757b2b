"""Networks that make features of pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn


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
