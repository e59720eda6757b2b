"""A user's network travels by value: workers need none of its files, and compute what the driver would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from torch import nn

from ray_sampler.cluster import shipping
from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks.opening import open_network
from ray_sampler.sampling.plan import sample_block
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("local_ray")

FILES = {
    "entry_of_user.py": """
import torch
from ray_sampler import Model
from sibling_of_user import Network, Own
import package_of_user.times


def make(weights):
    return Model(
        Network(), "edm", (1, 4, 4), 3, c_noise=package_of_user.times.c_noise, sigma_min=0.01
    )


def make_own(weights):
    return Model(Network(), Own(), (1, 4, 4), 3)
""",
    "sibling_of_user.py": """
import torch
from torch import nn
from package_of_user.times import scaled


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(1)
        self.register_buffer("shift", torch.arange(3.0))
        self.register_buffer("scale", torch.tensor(0.5), persistent=False)
        self.plain = torch.tensor([0.25])
        self.listed = [torch.tensor(0.125)]
        torch.manual_seed(0)
        for tensor in self.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) * 2)

    def forward(self, x, t, y):
        h = self.second(scaled(self.first(x))) + self.shift[y][:, None, None, None]
        return self.norm(h * self.scale + self.plain + self.listed[0] + t[:, None, None, None])


class Own:
    def denoiser(self, network, labels):
        def denoise(x, sigma, step=None):
            return scaled(network(x.float(), sigma.float().expand(len(x)), labels)).to(x.dtype)

        return denoise

    def identity(self):
        return {"preconditioning": "own"}
""",
    "package_of_user/__init__.py": "",
    "package_of_user/times.py": """
def c_noise(sigma):
    return scaled(sigma)


def scaled(x):
    return x / 10
""",
}
MODULES = ("entry_of_user", "sibling_of_user", "package_of_user.times")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's modules, which is the current directory."""
    folder = tmp_path / "code"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition("_")[2].startswith("of_user")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


@ray.remote(num_cpus=0)
def importable(names: tuple[str, ...]) -> list[str]:
    import importlib

    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        found.append(name)
    return found


@ray.remote(num_cpus=0)
def asked(shipped: shipping.Shipped) -> torch.Tensor:
    """The weights of a network with a lock, as another process loads it."""
    network: Any = shipping.load(shipped, torch.device("cpu"))
    assert network.network.lock.acquire(blocking=False)
    weight: torch.Tensor = network.network.weight.clone()
    return weight


def request(function: str, **flags: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "model": f"python:entry_of_user:{function}",
        "num_samples": 6,
        "batch_size": 2,
        "shard_size": 2,
    }
    return RunConfig(**(settings | {"gpus_per_actor": 0.0, "max_actors": 1, "steps": 3, "decoder": "none"} | flags))


@pytest.mark.parametrize("function", ["make", "make_own"])
def test_workers_need_no_file_of_the_users(function: str, files: Path, tmp_path: Path) -> None:
    """Neither the function's module nor what it imports, nor what the parameterisation is made of."""
    assert ray.get(importable.remote(MODULES)) == []
    config = request(function, output=str(tmp_path / "run"))
    job = prepare(config)
    network = job.networks["main"].build("fp32")
    with torch.inference_mode():
        blocks = [sample_block({"main": network}, job.plan, torch.arange(i, i + 2)) for i in (0, 2, 4)]
    with np.load(run(config).archive) as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    expected = torch.cat([x for x, _ in blocks]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(labels, torch.cat([y for _, y in blocks if y is not None]).numpy())


def test_a_parameterisation_travels_where_its_network_does_not(files: Path, tmp_path: Path) -> None:
    """As with kept latents, which another actor's plan describes."""
    job = prepare(request("make_own", output=str(tmp_path / "run")))
    shipping.send_by_value(job.networks["main"])
    (tmp_path / "plan").write_bytes(cloudpickle.dumps(job.plan))
    script = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb')).parameterisation).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "plan"],
        cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "Own\n", done.stderr


def test_every_tensor_arrives_and_what_is_one_stays_one(files: Path) -> None:
    """Parameters, buffers of both sorts, whole numbers, tensors that are not parameters; tied weights are sent once."""
    opened = open_network("python:entry_of_user:make", {})
    sent: Any = opened.build("fp32")
    shipped = shipping.ship(opened, "fp32")
    arrived: Any = shipping.load(shipped, torch.device("cpu"))
    for name, tensor in sent.state_dict().items():
        assert torch.equal(arrived.state_dict()[name], tensor), name
    assert arrived.state_dict().keys() == sent.state_dict().keys()
    assert arrived.network.first.weight is arrived.network.second.weight
    assert isinstance(arrived.network.first.weight, nn.Parameter)
    assert torch.equal(arrived.network.scale, torch.tensor(0.5))
    assert torch.equal(arrived.network.plain, torch.tensor([0.25]))
    assert torch.equal(arrived.network.listed[0], torch.tensor(0.125))
    distinct = {id(t) for t in (*sent.state_dict(keep_vars=True).values(), sent.network.scale)}
    assert len(shipped.tensors) == len(distinct) + 2
    assert sum(parameter.numel() for parameter in arrived.parameters()) == opened.parameters == 16 + 2


def test_of_what_cannot_travel_an_actor_calls_the_function(files: Path) -> None:
    (files / "locked_of_user.py").write_text(
        "import threading\nfrom torch import nn\nfrom ray_sampler import Model\n\n\n"
        "def make(weights):\n    network = nn.Conv2d(3, 3, 1)\n    network.lock = threading.Lock()\n"
        "    return Model(network, 'denoiser', (3, 4, 4))\n"
    )
    opened = open_network("python:locked_of_user:make", {})
    arrived: Any = ray.get(asked.remote(shipping.ship(opened, "fp32")))
    here: Any = opened.build("fp32")
    assert torch.equal(arrived, here.network.weight)


def test_a_network_that_returns_another_shape_is_a_wrong_request(files: Path, tmp_path: Path) -> None:
    (files / "wide_of_user.py").write_text(
        "from torch import nn\nfrom ray_sampler import Model\n\n\nclass Network(nn.Conv2d):\n"
        "    def forward(self, x, sigma):\n        return super().forward(x)\n\n\n"
        "def make(weights):\n    return Model(Network(3, 6, 1), 'denoiser', (3, 4, 4))\n"
    )
    config = request("make", model="python:wide_of_user:make", num_samples=2, output=str(tmp_path / "run"))
    with pytest.raises(RequestError) as failed:
        run(config)
    assert not (tmp_path / "run").exists()
    for part in ("[2, 6, 4, 4]", "[2, 3, 4, 4]", "without a variance half"):
        assert part in str(failed.value)


COUNTING = """
import torch
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(64))
        self.plain = torch.zeros(64)

    def forward(self, x, sigma):
        self.calls += 1
        self.plain += 1
        return x * self.gain + self.calls[0]


def make(weights):
    return Model(Network(), "denoiser", (1, 4, 4))
"""


LAZY = """
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __getstate__(self):
        import late_of_user

        return self.__dict__ | {"gain": late_of_user.gain}


def make(weights):
    return Model(Network(), "denoiser", (1, 4, 4))
"""


def test_a_module_is_found_when_it_is_first_needed_and_the_path_is_as_it_was(files: Path) -> None:
    (files / "lazy_of_user.py").write_text(LAZY)
    (files / "late_of_user.py").write_text("gain = 0.5\n")
    before = list(sys.path)
    assert str(files) not in before
    opened = open_network("python:lazy_of_user:make", {})
    assert sys.path == before
    shipped = shipping.ship(opened, "fp32")
    assert sys.path == before
    arrived: Any = shipping.load(shipped, torch.device("cpu"))
    assert arrived.network.gain == 0.5


def test_a_buffer_that_one_actor_changes_stays_as_it_was_for_the_others_of_its_node(files: Path) -> None:
    """Each maps the same memory of the object store."""
    (files / "counting_of_user.py").write_text(COUNTING)
    shipped = shipping.ship(open_network("python:counting_of_user:make", {}), "fp32")
    loaded: list[Any] = [shipping.load(shipped, torch.device("cpu")) for _ in range(2)]
    one, other = loaded
    with torch.inference_mode():
        for count, called in ((1, one), (2, one), (1, other)):
            called(torch.zeros(1, 1, 4, 4), torch.ones(1))
            assert (float(called.network.calls[0]), float(called.network.plain[0])) == (count, count)
