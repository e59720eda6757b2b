"""Each kind of network compiles into one graph, whatever its solver hands it; another takes minutes on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from ray_sampler.networks import edm, edm2
from ray_sampler.networks.custom import Called
from ray_sampler.sampling import engine
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.parameterisation import parameterise
from ray_sampler.sampling.plan import MAIN
from tests.gpu.networks import random_network, tiny
from tests.sampling.plans import plan

CPU = torch.device("cpu")
M = TypeVar("M", bound=nn.Module)


class Mine(nn.Module):
    """A user's network, laid out as GPUs like it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.conv.weight.data = self.conv.weight.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.conv(x))


def filled(network: M) -> M:
    """The network with small random weights."""
    random = torch.Generator().manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.data.normal_(0, 0.05, generator=random)
    return network.requires_grad_(False).eval()


def song() -> nn.Module:
    shape: dict[str, Any] = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "label_dim": 10}
    return filled(edm.SongUNet(edm.SongUNetOptions(**shape, model_channels=32, channel_mult=(1,), num_blocks=1)))


def folded() -> nn.Module:
    shape: dict[str, Any] = {"img_resolution": 16, "img_channels": 3, "label_dim": 10}
    widths: dict[str, Any] = {"channels": (64,), "noise_channels": 32, "emb_channels": 32}
    return edm2.fold(filled(edm2.Edm2UNet(edm2.Edm2Options(**shape, **widths, num_blocks=1))), torch.float32)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "adm": (lambda: random_network(tiny(), "fp32", CPU), parameterise("edm", c_noise="250log")),
    "edm": (song, parameterise("edm", shared_time=True)),
    "edm2": (folded, parameterise("edm", shared_time=True)),
    "a user's": (lambda: Called(filled(Mine()), 10, False, "fp32"), parameterise("denoiser")),
}


@pytest.mark.parametrize(("sampler", "name"), [*(("heun", name) for name in NETWORKS), ("multistep", "adm")])
def test_a_network_is_compiled_once(sampler: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(
        engine, "compiled", lambda network, mode: torch.compile(network, backend=backend, dynamic=False, fullgraph=True)
    )
    made, parameterisation = NETWORKS[name]
    planned = plan(LabelRule("random", 10), image_size=16, sampler=sampler, steps=4, ts="0,1,2,3", num_samples=4)
    planned = replace(planned, parameterisation=parameterisation, clip_denoised=False)
    Engine({MAIN: made()}, batch_size=2, device=CPU, compile="on").sample(planned, 0, 4)()
    assert len(graphs) == 1
