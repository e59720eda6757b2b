"""A user's network is called once before anything is sampled: what is wrong with it is a wrong request."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ray_sampler.cluster.job import tried
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.inspection import inspect
from ray_sampler.sampling.trial import within
from tests.networks.users_models import Write, job

BEGIN = """
import dataclasses
from collections import OrderedDict, namedtuple
import torch
from torch import nn
from ray_sampler import Model

Pair = namedtuple("Pair", "mean variance")


class Own:
    def denoiser(self, network, labels):
        return lambda x, sigma: network(x, sigma)[:1]

    def identity(self):
        return {}


@dataclasses.dataclass
class Output:
    loss: object
    sample: torch.Tensor


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)
        with torch.no_grad():
            self.layer.weight.fill_(0.1)
            self.layer.bias.fill_(0.1)

    def forward(self, x, t, y=None):
        x = self.layer(x)
        BODY
"""
WRONG = {
    "a dataclass": ("return Output(None, x)", "Network(), 'eps'", ("returned a Output", "as output.sample")),
    "a tuple": ("return x, None", "Network(), 'eps'", ("returned a tuple", "as output[0]")),
    "a named tuple": ("return Pair(x, x)", "Network(), 'eps'", ("returned a Pair", "as output[0]")),
    "a dict": ("return {'x': x}", "Network(), 'eps'", ("returned a dict", "as output['x']")),
    "nothing": ("pass", "Network(), 'eps'", ("returned a NoneType; it must return a tensor like x",)),
    "twice the channels": ("return torch.cat([x, x], 1)", "Network(), 'v'", ("[2, 4, 4, 4]", "output[:, :2]")),
    "another size": ("return x[:, :, ::2]", "Network(), 'v'", ("[2, 2, 2, 4]", "must return one like x")),
    "complex numbers": ("return x * 1j", "Network(), 'v'", ("complex64", "as output.real")),
    "bf16 weights": ("return x", "Network().bfloat16(), 'edm'", ("its weights bfloat16", "network.float()")),
    "fp64 weights": ("return x", "Network().double(), 'edm'", ("its weights float64", "network.float()")),
    "an exception at small levels": (
        "assert t[0] > 1\n        return x",
        "Network(), 'denoiser'",
        ("AssertionError",),
    ),
    "no row for the null label": (
        "return x + nn.functional.embedding(y, torch.ones(3, 1))[:, :, None, None]",
        "Network(), 'eps', num_classes=3, null_label=3",
        ("IndexError",),
    ),
    "gradients": (
        "return torch.autograd.grad(x.square().sum(), x)[0]",
        "Network(), 'eps'",
        ("raised RuntimeError", "take gradients of a clone of x, under torch.inference_mode(False)"),
    ),
    "no argument for labels": (
        "return x\n\n    def forward(self, x, t):\n        return x",
        "Network(), 'eps', num_classes=3",
        ("Network.forward() takes 3 positional arguments but 4 were given", "it is called as network(x, t, y)"),
    ),
    "a sparse tensor": (
        "return x.to_sparse()",
        "Network(), 'eps'",
        ("tensor that is sparse_coo; it must return a dense",),
    ),
    "a tensor without memory": (
        "return x.to('meta')",
        "Network(), 'eps'",
        ("is on meta; it must return a dense one on cpu",),
    ),
    "an end of the program": ("raise SystemExit(0)", "Network(), 'eps'", ("raised SystemExit: 0",)),
    "a time of another size": (
        "return x",
        "Network(), 'edm', c_noise=lambda sigma: torch.ones(7)",
        ("c_noise gave shape [7] for a batch of 2; it must give one time for all",),
    ),
    "a time that is none": ("return x", "Network(), 'edm', c_noise=print", ("c_noise gave a NoneType",)),
    "a result of its own parameterisation": (
        "return x",
        "Network(), Own()",
        ("parameterisation of --model gave shape [1, 2, 4, 4] for x of shape [2, 2, 4, 4]",),
    ),
}


def source_of(body: str, made: str) -> str:
    model = made.replace("), ", "), ", 1)
    head, comma, rest = model.partition(", num_classes" if "num_classes" in model else ", c_noise")
    return (
        f"{BEGIN.replace('BODY', body)}\n\ndef make(weights):\n    return Model({head}, shape=(2, 4, 4){comma}{rest})\n"
    )


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_before_anything_is_sampled(what: str, write: Write) -> None:
    """With the user's file and line, and the same by inspect."""
    body, made, parts = WRONG[what]
    module = write(source_of(body, made))
    with pytest.raises(RequestError) as refused:
        tried(job(module, decoder="none"))
    with pytest.raises(RequestError) as found:
        inspect(RunConfig(model=f"python:{module}:make"))
    assert str(found.value) == str(refused.value)
    place = () if "parameterisation" in what or "a time" in what else (f"{Path.cwd().resolve() / module}.py, line ",)
    for part in (*parts, *place):
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "warned"),
    [
        ("return x", False),
        ("return x + torch.randn_like(x)", True),
        ("return torch.dropout(x, 0.5, True)", True),
        ("last = getattr(self, 'last', 0 * x)\n        self.last = x\n        return x + last", False),
    ],
)
def test_random_numbers_in_forward_are_noticed(body: str, warned: bool, write: Write) -> None:
    warnings = tried(job(write(source_of(body, "Network(), 'denoiser'")), decoder="none"))
    assert warnings is not None
    assert [warning.startswith("the network of --model gave two results") for warning in warnings] == [True] * warned


def test_values_that_are_not_finite_at_the_largest_level_are_noticed(write: Write) -> None:
    module = write(source_of("return x / (t < 500).view(-1, 1, 1, 1)", "Network(), 'eps'"))
    (warning,) = tried(job(module, decoder="none")) or ["none"]
    assert "gave values that are not finite at sigma 157.407" in warning
    assert f"{module}.py, line " in warning


def test_gradients_may_be_taken_of_a_clone(write: Write) -> None:
    body = """with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            return torch.autograd.grad(self.layer(x).square().sum(), x)[0]"""
    assert tried(job(write(source_of(body, "Network(), 'eps'")), decoder="none")) == []


@pytest.mark.parametrize("time", ["float(sigma) ** 0.5", "sigma.reshape(1)", "sigma.expand(2, 1)"])
def test_a_time_may_be_a_number_or_have_a_form_that_the_network_takes(time: str, write: Write) -> None:
    module = write(source_of("return x * t.view(-1, 1, 1, 1)", f"Network(), 'edm', c_noise=lambda sigma: {time}"))
    assert tried(job(module, decoder="none")) == []


def test_a_network_of_one_batch_size_is_tried_with_that(write: Write) -> None:
    module = write(source_of("assert len(x) == 5\n        return x", "Network(), 'denoiser'"))
    assert tried(job(module, decoder="none", batch_size=5)) == []


def test_a_trial_that_takes_long_is_left_to_an_actor() -> None:
    ended = threading.Event()
    assert within(0.01, lambda: [str(ended.wait())]) is None
    ended.set()
    assert within(600.0, lambda: ["x"]) == ["x"]
