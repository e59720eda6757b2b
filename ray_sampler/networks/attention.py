"""Attention over the pixels of a feature map."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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
