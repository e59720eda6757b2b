"""A user's network that keeps something between calls: right and equal on any number of threads, for any shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from ray_sampler.cluster.job import prepare
from ray_sampler.config import RunConfig
from ray_sampler.networks.called import Called, remember, twin
from ray_sampler.networks.custom import Model
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.plan import MAIN, sample_block
from tests.networks.users_models import Write, job

SELF_CONDITIONED = """
import torch
from torch import nn
from ray_sampler import Model


class Kept:
    def __init__(self):
        self.last = []


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 1, 3, padding=1)
        with torch.no_grad():
            for tensor in self.layer.parameters():
                tensor.copy_(torch.linspace(-0.3, 0.3, tensor.numel()).view_as(tensor))
        self.register_buffer("shift", torch.zeros(()))
        {setup}

    def forward(self, x, sigma):
        self.shift += 0.01
        before = {before}
        scale = (1 + sigma**2).sqrt()[:, None, None, None]
        output = self.layer(torch.cat([x / scale, torch.zeros_like(x) if before is None else before], 1)).tanh()
        {keep}
        return output + self.shift


def make(weights):
    return Model(Network(), "denoiser", (1, 4, 4))
"""
WAYS = {
    "an attribute": ("self.last = None", "self.last", "self.last = output"),
    "an attribute that comes later": ("pass", "getattr(self, 'last', None)", "self.last = output"),
    "a list": ("self.kept = []", "self.kept[-1] if self.kept else None", "self.kept.append(output)"),
    "an object": ("self.kept = Kept()", "self.kept.last[-1] if self.kept.last else None", "self.kept.last += [output]"),
    "a buffer": (
        "self.register_buffer('last', torch.zeros(2, 1, 4, 4), persistent=False)",
        "self.last",
        "self.last.copy_(output)",
    ),
    "a buffer that is exchanged": ("self.register_buffer('last', None)", "self.last", "self.last = output"),
    "a hook that closes over the network": (
        "self.kept = {}; self.layer.register_forward_hook(lambda m, i, o: self.kept.update(last=o.tanh()))",
        "self.kept.get('last')",
        "pass",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_kept_between_calls_is_kept_within_a_block(way: str, write: Write) -> None:
    """On 1, 2 and 4 threads, in shards of 2, 6 and 24 samples: what a fresh network computes, for each block alone."""
    setup, before, keep = WAYS[way]
    source = SELF_CONDITIONED.replace("{setup}", setup).replace("{before}", before).replace("{keep}", keep)
    made = job(write(source), steps=4, decoder="none")
    expected = []
    for start in range(0, 24, 2):
        with torch.inference_mode():
            fresh = made.networks[MAIN].build("fp32").another()  # type: ignore[operator]  # a Called
            expected.append(sample_block({MAIN: fresh}, made.plan, torch.arange(start, start + 2))[0])
    wanted = torch.cat(expected).permute(0, 2, 3, 1).numpy()
    for cores in (1, 2, 4):
        network = made.networks[MAIN].build("fp32")
        engine = Engine({MAIN: network}, batch_size=2, device=torch.device("cpu"), compile="off", cores=cores)
        for size in (2, 6, 24):
            shards = [engine.sample(made.plan, start, start + size)() for start in range(0, 24, size)]
            np.testing.assert_array_equal(np.concatenate([each.columns["image"] for each in shards]), wanted)


WRITERS = {
    "to x": "result = self.layer(x); given.zero_(); return result",
    "to t": "result = self.layer(x); t.zero_(); return result",
    "to y": "y.zero_(); return self.layer(x)",
    "to what it returned": "self.out.copy_(self.layer(x)); return self.out",
}


@pytest.mark.parametrize("way", WRITERS)
@pytest.mark.parametrize(("kind", "sampler"), [("denoiser", "dpmpp_2m"), ("velocity", "heun")])
def test_what_a_network_writes_to_its_arguments_and_results_changes_no_sample(
    way: str, kind: str, sampler: str
) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)
            for tensor in self.layer.parameters():
                tensor.data.fill_(0.1)
            self.register_buffer("out", torch.zeros(8, 2, 4, 4), persistent=False)

    def sampled(body: str) -> torch.Tensor:
        names: dict[str, Any] = {}
        exec(
            f"def forward(self, x, t, y):\n    given, x = x, x * (y.sum() == 30)\n    {body}", names
        )  # lines of this file
        made = type("Network", (Network,), {"forward": names["forward"]})
        options: dict[str, Any] = {"data_at": 0} if kind == "velocity" else {}
        model = Model(made(), kind, (2, 4, 4), num_classes=5, null_label=5, **options)
        fixed: dict[str, Any] = {"labels": "1,2,3,4", "guidance": 2.0, "decoder": "none", "num_samples": 4, "steps": 4}
        prepared = prepare(RunConfig(model=model, sampler=sampler, **fixed))
        with torch.inference_mode():
            network = prepared.networks[MAIN].build("fp32")
            return sample_block({MAIN: network}, prepared.plan, torch.arange(4))[0]

    assert torch.equal(sampled(WRITERS[way]), sampled("return self.layer(x)"))


def test_threads_share_weights_and_nothing_else() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.script = torch.jit.script(nn.Linear(2, 2))
            self.register_buffer("count", torch.zeros(1))
            self.plain = torch.zeros(1)
            self.names = ["a"]
            self.own = self.first
            self.method = self.called

        def called(self) -> Network:
            return self

    one = Network().requires_grad_(False)
    other: Any = twin(one)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    assert other.first.weight is other.second.weight
    assert other.own is other.first
    assert other.method() is other
    for name in ("count", "plain", "names"):
        assert getattr(one, name) is not getattr(other, name)
        assert getattr(one, name) == getattr(other, name)
    assert type(other.norm) is type(one.norm)


def test_a_lock_is_shared_where_all_else_is_copied() -> None:
    import threading

    network: Any = nn.Linear(2, 2)
    network.lock, network.seen, lock = threading.Lock(), [], threading.Lock()
    network.register_forward_hook(lambda *_: lock.locked())
    other: Any = twin(network)
    assert other.lock is network.lock
    assert other.seen is not network.seen
    other(torch.zeros(1, 2))


def test_what_cannot_be_written_in_place_is_put_back_too() -> None:
    network: Any = nn.Module()
    network.register_buffer("wide", torch.zeros(1).expand(3))
    network.register_buffer("sparse", torch.eye(2).to_sparse())
    network.kept = None
    put_back = remember(network)
    network.wide, network.sparse, network.kept = torch.ones(3), None, 3
    put_back()
    assert network.wide.tolist() == [0, 0, 0]
    assert network.sparse.to_dense().tolist() == [[1, 0], [0, 1]]
    assert network.kept is None


def test_a_parameterisation_of_the_users_own_passes_more_and_answers_for_the_result(write: Write) -> None:
    """A concatenated condition, a separate condition, and two results, of which one is a variance."""
    module = write(
        """
import torch
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def forward(self, x, sigma, y, before, scale=1):
        assert x.shape[1] == 4
        return {"mean": scale * (x[:, :2] + before), "variance": x.sum()}


class Own:
    def denoiser(self, network, labels):
        def denoise(x, sigma, step=None):
            noisy = torch.cat([x, torch.ones_like(x)], dim=1)
            return network(noisy, sigma.expand(len(x)), labels, 0.5, scale=2)["mean"]

        return denoise

    def identity(self):
        return {"preconditioning": "own"}


def make(weights):
    return Model(Network(), Own(), (2, 4, 4))
"""
    )
    made = job(module, steps=1, sampler="onestep", decoder="none")
    network = made.networks[MAIN].build("fp32")
    assert isinstance(network, Called)
    engine = Engine({MAIN: network}, batch_size=2, device=torch.device("cpu"), compile="off")
    with torch.inference_mode():
        expected = sample_block({MAIN: network}, made.plan, torch.arange(2))[0].permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(engine.sample(made.plan, 0, 2)().columns["image"], expected)


class Pair(NamedTuple):
    value: Any
    scale: float = 1.0


@dataclass(frozen=True)
class Output:
    sample: Any
    loss: None = None


HELD: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "a tuple": (lambda x: (x, None), lambda held: held[0]),
    "a named tuple": (Pair, lambda held: held.value),
    "a list in a dictionary": (lambda x: {"all": [x]}, lambda held: held["all"][0]),
    "a dataclass": (Output, lambda held: held.sample),
}


@pytest.mark.parametrize("form", HELD)
def test_tensors_in_other_arguments_and_results_are_copied_too(form: str) -> None:
    hold, take = HELD[form]

    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(1, 2))

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: None, more: Any, cond: Any) -> Any:
            self.last += take(more).add_(1) + take(cond).add_(1)
            return hold(self.last)

    x = torch.ones(1, 2)
    called = Called(Writer(), 0, False, "fp32", checked=False)
    first, second = (called(x, x[:, 0], None, hold(x), cond=hold(x)) for _ in range(2))
    assert (x.tolist(), take(first).tolist(), take(second).tolist()) == ([[1, 1]], [[4, 4]], [[8, 8]])
    assert type(first) is type(hold(x))
