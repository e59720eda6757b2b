"""Whole runs on a GPU: actors that share a card, a resumed run, and weights that a node holds once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler import RunConfig, RunError, run
from ray_sampler.networks.adm import ADM, spec_of
from ray_sampler.networks.family import Network, without_memory
from tests.gpu.networks import options_of

MAPPED_SHARE = 0.2
"""Of the weights' size: what an actor may hold itself, where it maps the node's copy."""


@pytest.fixture(scope="module")
def started_ray(device: torch.device) -> Iterator[None]:
    """A Ray on this machine; skips where none can start."""
    ray = pytest.importorskip("ray")
    if ray.is_initialized():
        yield
        return
    try:
        from ray_sampler.cluster.session import connect

        connection = connect(None)
        connection.__enter__()
    except Exception as error:
        pytest.skip(f"Ray cannot start here: {type(error).__name__}: {error}")
    yield
    connection.__exit__(None, None, None)


@pytest.fixture
def configure(device: torch.device, started_ray: None, tmp_path: Path) -> Any:
    """Requests for a small run of the bundled model."""
    gpu = device.type == "cuda"

    def request(name: str, **flags: Any) -> RunConfig:
        settings: dict[str, Any] = {
            "model": "digits",
            "steps": 4,
            "num_samples": 64 if gpu else 16,
            "batch_size": 8 if gpu else 2,
            "shard_size": 8 if gpu else 4,
            "precision": "fp16" if gpu else "fp32",
            "gpus_per_actor": 1.0 if gpu else 0.0,
            "max_actors": 1,
            "progress": "none",
            "output": str(tmp_path / name),
        }
        return RunConfig(**settings | flags)

    return request


def pictures(archive: str) -> bytes:
    with np.load(archive) as arrays:
        return bytes(arrays["arr_0"].tobytes() + arrays["arr_1"].tobytes())


def test_actors_that_share_a_card_and_a_resumed_run_write_the_same_bytes(
    configure: Any, device: torch.device, tmp_path: Path
) -> None:
    one = run(configure("one"))
    two = run(configure("two", max_actors=2, gpus_per_actor=0.5 if device.type == "cuda" else 0.0))
    expected = pictures(one.archive)
    assert pictures(two.archive) == expected
    assert not two.summary["mixed_numerics"]
    (tmp_path / "one" / "summary.json").unlink()
    Path(one.archive).unlink()
    for fragment in sorted((tmp_path / "one" / "fragments").iterdir())[::2]:
        fragment.unlink()
    resumed = run(configure("one"))
    assert resumed.summary["reused"] > 0
    assert resumed.summary["computed"] > 0
    assert pictures(resumed.archive) == expected
    if device.type == "cuda":
        assert resumed.summary["seconds"]["gpu_computing"] > 0


def test_a_batch_that_does_not_fit_ends_the_run_with_one_that_does(configure: Any, gpu: torch.device) -> None:
    """On a tenth of a card."""
    with pytest.raises(
        RunError, match=r"ran out of memory with --batch_size 65536; try --batch_size 32768, or --precision"
    ):
        run(configure("large", num_samples=2**20, batch_size=2**16, gpus_per_actor=0.1))


class Mapped:
    """An actor that maps a network."""

    def own_bytes(self, shipped: Any) -> int:
        """Memory that a network itself takes, read through once."""
        import psutil

        from ray_sampler.cluster.shipping import unpack

        before = psutil.Process().memory_full_info().uss
        self.network = unpack(shipped)
        for parameter in self.network.parameters():
            parameter.sum()
        return int(psutil.Process().memory_full_info().uss - before)

    def on_device(self, shipped: Any, device: str) -> float:
        """The sum of a network's weights, loaded as an actor loads it."""
        from ray_sampler.cluster.shipping import load

        self.network = load(shipped, torch.device(device))
        return float(sum(parameter.float().sum().item() for parameter in self.network.parameters()))


def test_weights_are_held_once_by_a_node(started_ray: None, device: torch.device) -> None:
    import ray

    from ray_sampler.cluster.shipping import ship

    spec = spec_of(options_of("imagenet64", num_channels=64), {})
    shapes = without_memory(lambda: ADM.build(spec, "fp32")).state_dict()
    tensors = {name: torch.full(tensor.shape, 2.0**-10) for name, tensor in shapes.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    total = sum(tensor.numel() for tensor in tensors.values()) * 2.0**-10
    network = Network(
        spec=spec,
        build=lambda precision: without_memory(lambda: ADM.build(spec, precision)),
        prepare=ADM.prepare,
        tensors=tensors,
        weights="",
        parameters=0,
    )
    shipped = ship(network, "fp32", contiguous=True)
    kind = ray.remote(Mapped).options(num_cpus=0, num_gpus=0.1 if device.type == "cuda" else 0)
    actors: list[Any] = [kind.remote() for _ in range(2)]
    try:
        own = ray.get([actor.own_bytes.remote(shipped) for actor in actors], timeout=120)
        assert max(own) < MAPPED_SHARE * size
        sums = ray.get([actor.on_device.remote(shipped, device.type) for actor in actors], timeout=120)
        assert sums == pytest.approx([total, total], rel=1e-4)
    finally:
        for actor in actors:
            ray.kill(actor)
