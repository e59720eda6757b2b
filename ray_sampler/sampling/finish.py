"""Finishing: from a solver's result to the columns that are written. Only a finisher clamps and rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_sampler.sampling.options import DecoderOptions, Rounding
from ray_sampler.storage.record import Column

Shape = tuple[int, int, int]
SOUND = "sound"
"""A column that is not written: whether what a sample's others were made of was finite, (B,) bool."""
Finish = Callable[[Tensor, Mapping[str, Any]], Mapping[str, Tensor]]
"""(x (B, C, H, W) in the dtype of the state, networks by role) -> columns by name, each (B, ...), contiguous."""


class Finisher(NamedTuple):
    """How results of a solver become what is written."""

    finish: Finish
    """One of its columns is image, (B, H, W, C) uint8 or float32."""
    columns: Callable[[Shape], dict[str, Column]]
    """(C, H, W) of x -> what becomes of it."""
    identity: Mapping[str, Any]
    """What of it decides a sample, beside the hashes of its networks."""
    networks: Mapping[str, str] = {}
    """Networks that it needs beside the model, by role: what each is, given as for --model."""
    numerics: str = ""
    """What of it decides the last bits of a sample, beside the numerics key."""


def to_uint8(x: Tensor, rounding: Rounding, unit: bool = False) -> Tensor:
    """(B, C, H, W) in [-1, 1], or in [0, 1] if `unit`, -> (B, H, W, C) uint8.

    Truncated as guided-diffusion does, to the nearest level as EDM2 does, or rounded as diffusers does.
    """
    if rounding == "nearest":
        scaled = x * 255 + 0.5 if unit else x * 127.5 + 128
    else:
        scaled = x * 255 if unit else (x + 1) * 127.5
    if rounding == "round":
        scaled = scaled.round()
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def images(dtype: str) -> Callable[[Shape], dict[str, Column]]:
    """One column, of images as large as x."""
    return lambda shape: {"image": Column(dtype, (*shape[1:], shape[0]))}


def pixels(rounding: Rounding) -> Finisher:
    """x is the picture, in [-1, 1]: images are uint8."""
    return Finisher(
        lambda x, networks: {"image": to_uint8(x.clamp(-1, 1), rounding)}, images("uint8"), {"rounding": rounding}
    )


UNDECODED = Finisher(
    lambda x, networks: {"image": x.float().permute(0, 2, 3, 1).contiguous()}, images("float32"), {"decoder": "none"}
)
"""x is written as float32, neither clamped nor rounded."""

FINISHERS: dict[str, Callable[[DecoderOptions], Finisher]] = {"none": lambda options: UNDECODED}
"""By the value of --decoder; another finisher is one entry more here."""
