"""Random numbers of a sample: each a function of where it is used.

The default generator is counter-based (Philox4x32-10; Salmon, Moraes, Dror & Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC'11), so nothing is drawn in order, skipped or stored. The others reproduce runs of the
consistency-models sampling script (determ, determ-indiv, dummy) and of the scripts of EDM and EDM2 (edm).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ray_sampler.sampling.options import NoiseOptions

GENERATORS_OF_N = ("determ", "determ-indiv", "dummy")
"""Generators whose noise depends on num_samples."""

Noise = Callable[[int], Tensor]
"""noise(k): draw k of every sample of a batch, (B, C, H, W) standard normals, float32 but for the generator edm.
Draw 0 is x_T, draw 1 + i belongs to solver step i. Solvers ask in rising order, and only for what they use."""


class Draws(NamedTuple):
    """The random numbers of a batch."""

    noise: Noise
    labels: Callable[[int], Tensor]
    """Uniform class labels, (B,) int64 in [0, num_classes)."""


def noise_identity(options: NoiseOptions, num_samples: int) -> dict[str, Any]:
    """What decides a sample, by effective value."""
    more = {"num_samples": num_samples} if options.generator in GENERATORS_OF_N else {}
    return {"generator": options.generator, "seed": options.seed, **more}


LABEL_DRAW = 0xFFFFFFFF
"""The draw that random labels come from."""

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`, without waiting for what is queued there."""
    source = tensor.pin_memory() if tensor.device.type == "cpu" and device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


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


def individual_normals(
    seed: int, num_samples: int, indices: Tensor, shape: tuple[int, ...], device: torch.device
) -> Callable[[], Tensor]:
    """The original's determ-indiv: sample i has its own torch generator, seeded i + num_samples * seed."""
    generators = [
        torch.Generator(device).manual_seed(min(i, num_samples - 1) + num_samples * seed) for i in indices.tolist()
    ]
    return lambda: torch.cat([torch.randn(1, *shape, generator=g, device=device) for g in generators])


def joint_normals(
    seed: int, num_samples: int, indices: Tensor, shape: tuple[int, ...], device: torch.device
) -> Callable[[], Tensor]:
    """The original's determ: one torch generator that draws for all num_samples each time; rows `indices` are ours."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = on_device(indices.clamp(max=num_samples - 1), device)
    return lambda: torch.randn(num_samples, *shape, generator=generator, device=device)[rows]


def in_order(draw_next: Callable[[], Tensor]) -> Noise:
    """Noise from a stream that can only be drawn in order: draws that are not needed are made and dropped."""
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


def edm_draws(
    seed: int,
    indices: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    num_classes: int,
    every_step: bool,
    device: torch.device,
) -> Draws:
    """The streams of EDM's and EDM2's scripts: sample i has a torch generator seeded (seed + i) mod 2^32.

    It draws x_T in float32, then one label where the network has classes, then churn noise in the state's `dtype`: at
    every step, used or not (EDM), or only where a solver asks for it (EDM2).
    """
    generators = [torch.Generator(device).manual_seed((seed + i) % 2**32) for i in indices.tolist()]

    def draw(dtype: torch.dtype) -> Tensor:
        return torch.cat([torch.randn(1, *shape, generator=g, device=device, dtype=dtype) for g in generators])

    x_T = draw(torch.float32)
    labels = [torch.randint(num_classes, (1,), generator=g, device=device) for g in generators if num_classes]
    churn = in_order(lambda: draw(dtype)) if every_step else lambda _: draw(dtype)
    return Draws(lambda k: churn(k - 1) if k else x_T, lambda _: torch.cat(labels))


def make_draws(
    options: NoiseOptions,
    num_samples: int,
    indices: Tensor,
    shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    num_classes: int = 0,
    every_step: bool = False,
    device: torch.device | None = None,
) -> Draws:
    """The random numbers of a batch.

    Args:
        num_samples: of the whole run; the generators of the consistency-models script depend on it.
        indices: (B,) int64 global sample indices, on the host, or where the numbers are wanted. Those at or past
            num_samples pad a batch: philox and edm continue, the other generators repeat the last sample.
        shape: (C, H, W).
        dtype: of the solver's state; the churn noise of the generator edm has it.
        num_classes: of the network; 0 for an unconditional one.
        every_step: whether the generator edm draws churn noise at every step, used or not.
        device: where the numbers are wanted; that of `indices` unless given.
    """
    seed, device = options.seed, device or indices.device
    if options.generator == "edm":
        return edm_draws(seed, indices, shape, dtype, num_classes, every_step, device)
    places = on_device(indices, device)

    def labels(classes: int) -> Tensor:
        return random_labels(seed, places, classes)

    if options.generator == "philox":
        return Draws(lambda draw: philox_normals(seed, places, draw, shape), labels)
    streams = joint_normals if options.generator == "determ" else individual_normals
    return Draws(in_order(streams(seed, num_samples, indices, shape, device)), labels)
