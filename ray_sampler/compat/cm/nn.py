"""Small functions of tensors that scripts around sampling use."""

from __future__ import annotations

import torch
from torch import Tensor

from ray_sampler.networks.adm_unet import timestep_embedding

__all__ = ["append_dims", "append_zero", "mean_flat", "timestep_embedding"]


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """`x` with dimensions of 1 appended, so that it has `target_dims`.

    Raises:
        ValueError: it has more already.
    """
    if x.dim() > target_dims:
        raise ValueError(f"x has {x.dim()} dimensions; target_dims is {target_dims}, which must be at least as many")
    return x[(...,) + (None,) * (target_dims - x.dim())]


def append_zero(x: Tensor) -> Tensor:
    """(n,) -> (n + 1,), whose last value is 0."""
    return torch.cat([x, x.new_zeros(1)])


def mean_flat(tensor: Tensor) -> Tensor:
    """(B, ...) -> (B,), the mean over all other dimensions."""
    return tensor.mean(dim=tuple(range(1, tensor.dim())))
