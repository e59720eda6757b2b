"""Layers that the networks of EDM and EDM2 share: resampling with a separable filter, and attention over pixels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BOX = (1.0, 1.0)
"""With this filter, halving is the mean of 2x2 pixels and doubling repeats each pixel."""


def padding_of(taps: tuple[float, ...]) -> int:
    return (len(taps) - 1) // 2


def _kernel(x: Tensor, taps: tuple[float, ...], gain: float) -> Tensor:
    """`gain` times outer(taps, taps) / sum(taps)^2, for each channel of `x`: (C, 1, K, K).

    It is computed from numbers on x's device: a copy from the host would wait for the device.
    """
    total = sum(taps)
    row = torch.stack([torch.full((), tap / total, dtype=torch.float32, device=x.device) for tap in taps])
    return (gain * torch.outer(row, row)).to(x.dtype).expand(x.shape[1], 1, -1, -1)


def halve(x: Tensor, taps: tuple[float, ...], padding: int | None = None) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2): filtered with `taps`, every second pixel."""
    if taps == BOX and padding is None:
        return F.avg_pool2d(x, 2)
    pad = padding_of(taps) if padding is None else padding
    return F.conv2d(x, _kernel(x, taps, 1.0), stride=2, padding=pad, groups=x.shape[1])


def double(x: Tensor, taps: tuple[float, ...]) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): zeros between the pixels, filtered with 4 times `taps`."""
    if taps == BOX:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    kernel = _kernel(x, taps, 4.0)
    return F.conv_transpose2d(x, kernel, stride=2, padding=padding_of(taps), groups=x.shape[1])


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q^T k / sqrt(D)) v: each (B, heads, D, pixels) -> (B, heads, D, pixels).

    On a CPU it is written out, which gives the published networks' samples to the last bit in float32: solvers with
    guidance and churn can make 1e-4 of a difference in the last bit.
    """
    if not q.is_cpu:
        # Its fast kernels want the numbers of one pixel beside each other; others hold all pairs of pixels in memory.
        q, k, v = (t.transpose(2, 3).contiguous() for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
    weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).float().softmax(3).to(q.dtype)
    return torch.einsum("nhqk,nhck->nhcq", weights, v)
