"""What travels of a user's network, and what is said of what cannot: no Ray is needed to know."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_sampler.cluster import shipping
from ray_sampler.config import RequestError
from ray_sampler.networks.opening import open_network
from tests.networks.users_models import Write

BEGIN = """
import threading
import torch
from torch import nn
from torch.nn.utils import parametrizations
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.backend = torch.nn.attention.SDPBackend.MATH
        self.kind = torch.nn.attention.SDPBackend
        self.backends = [torch.nn.attention.SDPBackend.FLASH_ATTENTION]

    def forward(self, x, t):
        assert self.backend == torch.nn.attention.SDPBackend.MATH and isinstance(self.backends[0], self.kind)
        return self.layer(x)


def filled(module, scale=0.3):
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.copy_(torch.linspace(-scale, scale, tensor.numel()).view_as(tensor))
    return module.eval()


class Sparse(nn.Module):
    def __init__(self, layout):
        super().__init__()
        self.register_buffer("matrix", torch.eye(4).to_sparse(layout=layout))

    def forward(self, x):
        return (self.matrix @ x.reshape(4, -1)).view_as(x)


class Complex(nn.Module):
    def __init__(self, conjugate):
        super().__init__()
        factor = torch.tensor([0.5 + 0.5j])
        self.register_buffer("factor", factor.conj() if conjugate else factor)

    def forward(self, x):
        return (x * self.factor).imag


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.tensor([0.5]).to(torch.float8_e4m3fn))

    def forward(self, x):
        return x * self.gain.float()


class Quantised(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.quantize_per_tensor(torch.tensor([0.3]), 0.1, 0, torch.qint8))

    def forward(self, x):
        return x * self.gain.dequantize()


class Linear(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)).view_as(x)


def quantised_layer():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(filled(nn.Linear(4, 4))), {nn.Linear}, torch.qint8)


def exported():
    return torch.export.export(filled(nn.Conv2d(1, 1, 3, padding=1)), (torch.zeros(2, 1, 4, 4),)).module()


def with_a_hook():
    layer, lock = filled(nn.Conv2d(1, 1, 1)), threading.Lock()
    layer.register_forward_hook(lambda *_: lock.acquire() and lock.release())
    return layer
"""
LAYERS = {
    "enums of torch": "filled(nn.Conv2d(1, 1, 1))",
    "weight_norm": "filled(parametrizations.weight_norm(nn.Conv2d(1, 1, 1)))",
    "spectral_norm": "filled(parametrizations.spectral_norm(nn.Conv2d(1, 1, 3, padding=1)))",
    "orthogonal": "filled(parametrizations.orthogonal(Linear(16, 16)))",
    "the older weight_norm": "filled(nn.utils.weight_norm(nn.Conv2d(1, 1, 1)))",
    "scripted": "torch.jit.script(filled(nn.Conv2d(1, 1, 1)))",
    "traced": "torch.jit.trace(filled(nn.Conv2d(1, 1, 1)), torch.zeros(2, 1, 4, 4))",
    "exported": "exported()",
    "a hook that closes over a lock": "with_a_hook()",
    "sparse": "Sparse(torch.sparse_coo)",
    "sparse in rows": "Sparse(torch.sparse_csr)",
    "complex": "Complex(False)",
    "conjugate": "Complex(True)",
    "float8": "Narrow()",
    "a quantised tensor": "Quantised()",
    "a quantised layer": "quantised_layer()",
}


def travelled(opened: Any) -> nn.Module:
    """What an actor would load."""
    tensors: list[Tensor] = []

    def take(tensor: Tensor) -> int:
        kept = tensor.detach().clone()
        tensors.append(nn.Parameter(kept, requires_grad=False) if isinstance(tensor, nn.Parameter) else kept)
        return len(tensors) - 1

    pickled = shipping.pickled_by_value(opened, opened.build("fp32"), "fp32", take)
    module: nn.Module = shipping._TensorUnpickler(io.BytesIO(pickled), tensors).load()
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize("layer", LAYERS)
def test_it_travels_and_computes_the_same(layer: str, write: Write) -> None:
    module = write(
        f"{BEGIN}\n\ndef make(weights):\n    return Model(Network({LAYERS[layer]}), 'denoiser', (1, 4, 4))\n"
    )
    opened = open_network(f"python:{module}:make", {})
    x, t = torch.linspace(-1, 1, 32).view(2, 1, 4, 4), torch.ones(2)
    with torch.inference_mode():
        expected = opened.build("fp32")(x, t)
        there = travelled(opened)
        assert torch.equal(there(x, t), expected)
        assert torch.equal(there.another()(x, t), expected)  # type: ignore[operator]  # a Called
    assert len(opened.weights) == 64


@pytest.mark.parametrize(
    ("made", "named"),
    [("Complex(False)", "layer.factor"), ("Complex(True)", "layer.factor"), ("Narrow()", "layer.gain")],
)
def test_values_that_are_not_finite_are_found_whatever_the_type(made: str, named: str, write: Write) -> None:
    source = BEGIN.replace("0.5 + 0.5j", "complex(0.5, float('nan'))").replace("[0.5])", "[float('nan')])")
    module = write(f"{source}\n\ndef make(weights):\n    return Model(Network({made}), 'denoiser', (1, 4, 4))\n")
    with pytest.raises(RequestError, match=f"values that are not finite, in {named}$"):
        open_network(f"python:{module}:make", {})


def test_a_tensor_that_cannot_be_read_is_named(write: Write) -> None:
    module = write(
        f"{BEGIN}\n\ndef make(weights):\n    network = nn.Module()\n"
        "    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])\n"
        "    network.register_buffer('ragged', ragged)\n    return Model(network, 'denoiser', (1, 4, 4))\n"
    )
    with pytest.raises(RequestError, match=r"; its tensor ragged \(float32, .*cannot be read as numbers") as refused:
        open_network(f"python:{module}:make", {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("setup", "path"),
    [
        ("network.layer.lock = threading.Lock()", r"network\.layer\.lock"),
        ("network.layer.register_forward_hook(lambda *_: LOCK.locked())", r"network\.layer\._forward_hooks"),
    ],
)
def test_a_model_that_cannot_travel_is_refused_by_the_path_of_what_is_in_the_way(
    setup: str, path: str, write: Write
) -> None:
    """Given as an object, it has no function that an actor could call; inspect finds the same."""
    from ray_sampler.config import RunConfig
    from ray_sampler.inspection import inspect

    module = write(f"{BEGIN}\nLOCK = threading.Lock()\nnetwork = Network(filled(nn.Conv2d(1, 1, 1)))\n{setup}\n")
    sys.path.insert(0, str(Path.cwd()))
    made = __import__(module)
    model = made.Model(made.network, "denoiser", (1, 4, 4))
    with pytest.raises(RequestError, match=rf"cannot be sent to an actor: TypeError: cannot pickle .*, in {path}; "):
        travelled(open_network(model, {}))
    with pytest.raises(RequestError, match=rf"cannot be sent to an actor: .*, in {path}; "):
        inspect(RunConfig(model=model))
