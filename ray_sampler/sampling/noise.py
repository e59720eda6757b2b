"""Random numbers of a sample: each a function of where it is used.

The default generator is counter-based (Philox4x32-10; Salmon, Moraes, Dror & Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC'11), so nothing is drawn in order, skipped or stored. The other two
reproduce runs of the consistency-models sampling script.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ray_sampler.config import Generator

Noise = Callable[[int], Tensor]
"""noise(k): draw k of every sample of a batch, (B, C, H, W) float32 standard normals.
Draw 0 is x_T, draw 1 + i belongs to solver step i. Solvers ask in rising order, and only for what they use."""

LABEL_DRAW = 0xFFFFFFFF
"""The draw that random labels come from."""

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of broadcastable int64 counter words in [0, 2^32), keyed by a seed of 64 bits, low word first.

    Returns four int64 tensors of words in [0, 2^32). Products wrap in int64, whose bits are those of uint64.
    """
    c0, c1, c2, c3 = counter
    key0, key1 = seed & MASK, seed >> 32 & MASK
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (product1 >> 32).bitwise_and_(MASK) ^ c1 ^ key0, product1.bitwise_and_(MASK)
        c2, c3 = (product0 >> 32).bitwise_and_(MASK) ^ c3 ^ key1, product0.bitwise_and_(MASK)
        key0, key1 = key0 + WEYL[0] & MASK, key1 + WEYL[1] & MASK
    return c0, c1, c2, c3


def words(seed: int, indices: Tensor, draw: int, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first `blocks` blocks of a draw of the samples `indices`, (B,) int64: four tensors of (B, blocks)."""
    device = indices.device
    low, high = (indices & MASK)[:, None], (indices >> 32)[:, None]
    block = torch.arange(blocks, device=device)[None, :]
    return philox((block, torch.full_like(block, draw), low, high), seed)


def box_muller(w0: Tensor, w1: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent float64 normals from two words, each in [0, 2^32)."""
    radius = w0.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = w1.double().mul_(2 * math.pi * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def philox_normals(seed: int, indices: Tensor, draw: int, shape: tuple[int, ...]) -> Tensor:
    """Draw `draw` of the samples `indices`, (B,) int64: (B, *shape) float32 normals on the device of `indices`.

    Element e in C order over `shape` comes from block e // 4: Box-Muller on its words (0, 1) and (2, 3),
    in float64, rounded to float32 once.
    """
    elements = math.prod(shape)
    w0, w1, w2, w3 = words(seed, indices, draw, -(-elements // 4))
    normals = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1).float()
    return normals.reshape(len(indices), -1)[:, :elements].reshape(len(indices), *shape)


def random_labels(seed: int, indices: Tensor, num_classes: int) -> Tensor:
    """Uniform class labels of the samples `indices`, (B,) int64, in [0, num_classes)."""
    return words(seed, indices, LABEL_DRAW, 1)[0][:, 0] * num_classes >> 32


def individual_normals(seed: int, num_samples: int, indices: Tensor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """The original's determ-indiv: sample i has its own torch generator, seeded i + num_samples * seed."""
    device = indices.device
    generators = [
        torch.Generator(device).manual_seed(min(i, num_samples - 1) + num_samples * seed) for i in indices.tolist()
    ]
    return lambda: torch.cat([torch.randn(1, *shape, generator=g, device=device) for g in generators])


def joint_normals(seed: int, num_samples: int, indices: Tensor, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """The original's determ: one torch generator that draws for all num_samples each time; rows `indices` are ours."""
    device = indices.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = indices.clamp(max=num_samples - 1)
    return lambda: torch.randn(num_samples, *shape, generator=generator, device=device)[rows]


def in_order(draw_next: Callable[[], Tensor]) -> Noise:
    """Noise from a stream that can only be drawn in order: draws nobody asked for are made and dropped."""
    drawn = -1

    def noise(draw: int) -> Tensor:
        nonlocal drawn
        if draw <= drawn:
            raise ValueError(f"draw {draw} was asked for after draw {drawn}; a stream only goes forward")
        for _ in range(drawn + 1, draw):
            draw_next()
        drawn = draw
        return draw_next()

    return noise


def make_noise(generator: Generator, seed: int, num_samples: int, indices: Tensor, shape: tuple[int, ...]) -> Noise:
    """The noise of a batch.

    Args:
        seed: in [0, 2^64).
        num_samples: of the whole run; the original's generators depend on it.
        indices: (B,) int64 global sample indices, on the device where the noise is wanted. Those at or past
            num_samples pad a batch: philox continues, the original's generators repeat the last sample.
        shape: (C, H, W).
    """
    if generator == "philox":
        return lambda draw: philox_normals(seed, indices, draw, shape)
    streams = joint_normals if generator == "determ" else individual_normals
    return in_order(streams(seed, num_samples, indices, shape))
