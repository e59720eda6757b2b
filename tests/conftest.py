"""What the tests of whole runs share: one local Ray, and a checkpoint small enough for runs of a second."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.config import RunConfig

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of two CPUs, reachable from this machine only, that all tests share."""
    import ray

    from ray_sampler.cluster.session import on_loopback

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with on_loopback():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    for each, handler in handlers.items():
        signal.signal(each, handler)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .safetensors file of random weights, of the architecture `runs.TINY`."""
    from safetensors.torch import save_file

    from tests.cluster.runs import random_weights

    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_file(random_weights(), path)
    return path


@pytest.fixture
def configure(checkpoint: Path, tmp_path: Path) -> Configure:
    """The request for a small run into tmp_path/run; keywords set or replace its flags."""
    from tests.cluster.runs import SMALL, TINY

    def make(**flags: Any) -> RunConfig:
        return RunConfig(**(TINY | SMALL | {"model": str(checkpoint), "output": str(tmp_path / "run")} | flags))

    return make
