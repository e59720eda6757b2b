"""The loop that people write today: the other side of the engine's benchmarks.

The same weights, run as papers and sampling scripts do: contiguous (N, C, H, W) activations, one eager operation
after the other, GroupNorm through float32, a torch generator for each sample, and a level read from the device in
every step. Attention is already scaled_dot_product_attention, which many scripts lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.networks.adm_unet import AttentionBlock, ResBlock, UNet, timestep_embedding


def normalize(norm: Any, h: Tensor) -> Tensor:
    return F.group_norm(h.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(h.dtype)


def convolve(conv: Any, h: Tensor) -> Tensor:
    return F.conv2d(h, conv.weight, conv.bias, conv.stride, conv.padding)


def residual(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    h = F.silu(normalize(block.in_layers[0], x))
    if block.resample is not None:
        h, x = block.resample(h), block.resample(x)
    h = convolve(block.in_layers[2], h)
    shift = block.emb_layers(emb).to(h.dtype)[:, :, None, None]
    if block.scale_shift:
        scale, shift = shift.chunk(2, dim=1)
        h = normalize(block.out_layers[0], h) * (1 + scale) + shift
    else:
        h = normalize(block.out_layers[0], h + shift)
    h = convolve(block.out_layers[3], F.silu(h))
    return (x if isinstance(block.skip_connection, nn.Identity) else convolve(block.skip_connection, x)) + h


def attention(block: AttentionBlock, x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    qkv = convolve(block.qkv, normalize(block.norm, x)).reshape(b, 3, block.heads, c // block.heads, height * width)
    q, k, v = qkv.transpose(3, 4).unbind(1)
    a = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, c, height, width)
    return x + convolve(block.proj_out, a)


def through(block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    for layer in block.children():
        if isinstance(layer, ResBlock):
            h = residual(layer, h, emb)
        elif isinstance(layer, AttentionBlock):
            h = attention(layer, h)
        else:
            h = convolve(layer, h)
    return h


class Textbook:
    """F(x, times, y) by the modules and weights of a UNet without plain up- and downsampling layers.

    The network's tensors are made contiguous, so it must not be one that something else runs.
    """

    def __init__(self, network: UNet) -> None:
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
        self.network = network

    def __call__(self, x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        network = self.network
        emb = network.time_embed(timestep_embedding(times, network.arch.num_channels))
        if y is not None:
            emb = emb + network.label_emb(y)
        h, skips = x.to(network.dtype), []
        for block in network.input_blocks:
            h = through(block, h, emb)
            skips.append(h)
        h = through(network.middle_block, h, emb)
        for block in network.output_blocks:
            h = through(block, torch.cat([h, skips.pop()], dim=1), emb)
        norm, _, conv = network.out
        return convolve(conv, F.silu(normalize(norm, h.to(x.dtype))))


def levels(steps: int, sigma_min: float, sigma_max: float, device: torch.device) -> Tensor:
    """The rho = 7 schedule and 0, (steps + 1,), on the device, as scripts keep it."""
    ramp = torch.linspace(0, 1, steps, device=device)
    low, high = sigma_min ** (1 / 7), sigma_max ** (1 / 7)
    return torch.cat([(high + ramp * (low - high)) ** 7, ramp.new_zeros(1)])


@torch.no_grad()
def sample(
    network: Textbook, labels: Tensor | None, seeds: Sequence[int], size: int, steps: int, device: torch.device
) -> Tensor:
    """One batch: (B, size, size, 3) uint8 on the host. Heun's method, or one evaluation for steps = 1."""
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def draw() -> Tensor:
        return torch.cat([torch.randn(1, 3, size, size, generator=g, device=device) for g in generators])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigmas = sigma * x.new_ones(len(x))
        c_skip, c_out, c_in = (
            s[:, None, None, None]
            for s in (
                0.25 / (sigmas**2 + 0.25),
                sigmas * 0.5 / (sigmas**2 + 0.25) ** 0.5,
                1 / (sigmas**2 + 0.25) ** 0.5,
            )
        )
        output = network(c_in * x, 250.0 * torch.log(sigmas + 1e-44), labels)
        return (c_skip * x + c_out * output).clamp(-1, 1)

    sigmas = levels(steps, 0.002, 80.0, device)
    x = draw() * 80.0
    for i in range(steps):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        if steps == 1:
            x = denoise(x, sigma)
            break
        draw()  # the original's churn noise, drawn at every step, used or not
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + d * (sigma_next - sigma)
        if sigma_next.item() > 0:
            d_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (d + d_next) / 2 * (sigma_next - sigma)
        x = x_next
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()
