"""Decoding: from a solver's result to what is written. Only a decoder clamps and quantises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_sampler.sampling.options import DecoderOptions, Rounding


class Decoder(Protocol):
    """Results of a solver become what is written."""

    dtype: str
    """Of what is written: uint8 or float32."""

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H', W', C'), contiguous."""

    def shape(self, x: tuple[int, int, int]) -> tuple[int, int, int]:
        """(H', W', C') of what becomes of a (C, H, W)."""

    def identity(self) -> dict[str, Any]:
        """What of it decides a sample."""


def to_uint8(x: Tensor, rounding: Rounding) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, truncated as guided-diffusion does or rounded as EDM2 does."""
    scaled = (x + 1) * 127.5 if rounding == "truncate" else x * 127.5 + 128
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class Pixels:
    """x is the picture, in [-1, 1]."""

    rounding: Rounding = "truncate"

    dtype = "uint8"

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x.clamp(-1, 1), self.rounding)

    def shape(self, x: tuple[int, int, int]) -> tuple[int, int, int]:
        return (x[1], x[2], x[0])

    def identity(self) -> dict[str, Any]:
        return {"rounding": self.rounding}


@dataclass(frozen=True)
class AsItIs:
    """x is written as float32, neither clamped nor rounded."""

    dtype = "float32"

    def decode(self, x: Tensor) -> Tensor:
        return x.float().permute(0, 2, 3, 1).contiguous()

    def shape(self, x: tuple[int, int, int]) -> tuple[int, int, int]:
        return (x[1], x[2], x[0])

    def identity(self) -> dict[str, Any]:
        return {"decoder": "none"}


DECODERS: dict[str, Callable[[DecoderOptions], Decoder]] = {"none": lambda options: AsItIs()}
"""By the value of --decoder; another decoder is one entry more here."""
