"""What becomes of a solver's results: the columns that are written, and what else a run keeps of its samples.

Only a finisher clamps and rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.sampling.options import DecoderOptions, Rounding
from ray_sampler.storage.record import Column, Samples

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


LATENTS = "latents"


@dataclass(frozen=True)
class Product:
    """Columns that are made of each range of samples and stored in a separate folder, for example features for a score.

    Where a product takes images, it is made of the pictures as they are written, on the actor that has them or, for
    those of an earlier start, of the stored fragments. One that takes x needs the solver, and lacking ranges of it are
    sampled again.
    """

    name: str
    folder: str
    """In the run directory: latents, or one below features."""
    columns: Mapping[str, Column]
    """What `finish` gives."""
    takes: Literal["x", "image"]
    finish: Callable[[Tensor, Mapping[str, nn.Module]], Mapping[str, Tensor]]
    """Of x (B, C, H, W), the solver's result in the dtype of its state, or of images (B, H, W, C), and the networks by
    role: the columns, each (B, ...), on the device."""
    block: int = 64
    """Pictures that `finish` is given at once, always; x comes in the blocks of --batch_size."""


def latents(shape: tuple[int, int, int]) -> Product:
    """The solver's results as they are, before any scaling for a decoder; `shape` is (C, H, W)."""
    return Product(
        LATENTS, LATENTS, {"latent": Column("float32", shape)}, "x", lambda x, networks: {"latent": x.float()}
    )


def derive(
    product: Product,
    images: np.ndarray,
    start: int,
    networks: Mapping[str, nn.Module],
    device: torch.device,
    workers: ThreadPoolExecutor | None = None,
) -> Samples:
    """A product that takes images, of the pictures [start, start + n).

    It is computed in fixed blocks of indices [kB, (k + 1)B), the last one padded, so that what comes of a picture
    depends neither on the range nor on --batch_size.

    Args:
        images: (n, H, W, C).
        workers: a thread for each block at a time; this one alone unless given.
    """
    size, stop = product.block, start + len(images)

    @torch.inference_mode()
    def block(first: int) -> list[np.ndarray]:
        low, high = max(first, start), min(first + size, stop)
        batch = torch.zeros((size, *images.shape[1:]), dtype=torch.from_numpy(images[:1]).dtype)
        batch[low - first : high - first] = torch.from_numpy(images[low - start : high - start])
        made = product.finish(batch.to(device), networks)
        return [made[name][low - first : high - first].cpu().numpy() for name in product.columns]

    firsts = range(start // size * size, stop, size)
    parts = list(workers.map(block, firsts) if workers else map(block, firsts))
    return checked(
        product, start, {name: np.concatenate(arrays) for name, *arrays in zip(product.columns, *parts, strict=True)}
    )


def checked(product: Product, start: int, columns: Mapping[str, np.ndarray]) -> Samples:
    """Raises ValueError: the columns are not those that the product says it has."""
    samples = Samples(start, columns)
    if samples.kinds() != dict(product.columns):
        raise ValueError(f"product {product.name} gave {samples.kinds()}; it must be {dict(product.columns)}")
    return samples
