"""What the tests of whole runs share: one local Ray, and a checkpoint small enough for runs of a second."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from ray_sampler.config import RunConfig
from ray_sampler.storage.record import Samples

ROOT = Path(__file__).resolve().parents[1]

Configure = Callable[..., RunConfig]

# A property holds however busy the machine is: no test of one fails because an example took long.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def aws_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of the shared Ray look for an S3 server and its keys; written by the tests that have one."""
    return tmp_path_factory.mktemp("aws") / "config"


@pytest.fixture(scope="session")
def local_ray(aws_config: Path) -> Iterator[None]:
    """A Ray of two CPUs, started as a run does, that all tests share."""
    from ray_sampler.cluster import own_ray

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_CONFIG_FILE", str(aws_config))
        patch.setenv("PYTHONPATH", str(ROOT))  # for the workers of whoever joins it from another folder
        head, address = own_ray.up(2, threading.Event())
        own_ray.join_head(head, address)
    for each, handler in handlers.items():
        signal.signal(each, handler)
    yield
    own_ray.leave()
    own_ray.end(head)


@pytest.fixture(scope="session")
def torchvision() -> Iterator[None]:
    """A torchvision that imports, though its compiled part, which no evaluator uses, may be for another build of torch.

    It then misses two operators that it describes; they are declared here, without anything that computes them.
    """
    import torch

    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
        yield


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
    from tests.cluster.runs import small

    return partial(small, checkpoint, output=tmp_path / "run")


@pytest.fixture(scope="session")
def samples(checkpoint: Path) -> Samples:
    """What one engine computes for the small run."""
    from tests.cluster.runs import sampled, small

    return sampled(small(checkpoint, Path("unused")))


@pytest.fixture(scope="session")
def longer_samples(checkpoint: Path) -> Samples:
    """What one engine computes for the longer run."""
    from tests.cluster.runs import LONGER, sampled, small

    return sampled(small(checkpoint, Path("unused"), **LONGER))


@pytest.fixture(scope="session")
def finished(checkpoint: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small run that is complete; to be copied before anything in it is changed."""
    from ray_sampler.cluster.driver import run
    from tests.cluster.runs import small

    output = tmp_path_factory.mktemp("finished") / "run"
    run(small(checkpoint, output))
    return output


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A complete small run in tmp_path/run, where `configure` continues it; its files are of another day."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in output.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return output
