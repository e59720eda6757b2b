"""Networks in this process, as a worker loads them, without Ray."""

from __future__ import annotations

import torch
from torch import nn

from ray_sampler.networks.family import Network, Precision


def loaded(network: Network, precision: Precision = "fp32", device: str = "cpu") -> nn.Module:
    """The module of an opened network with its tensors, ready to compute."""
    module = network.build(precision)
    placed = {}
    for name, wanted in module.state_dict().items():
        dtype = network.tensors[name].dtype if network.as_stored else wanted.dtype
        data = torch.empty_strided(wanted.shape, wanted.stride(), dtype=dtype)
        placed[name] = data.copy_(network.tensors[name])
    module.load_state_dict(placed, assign=True)
    return network.prepare(module.to(device).requires_grad_(False).eval(), precision)
