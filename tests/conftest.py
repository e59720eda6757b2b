"""What the tests of whole runs share: one local Ray, and a checkpoint small enough for runs of a second."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import hypothesis
import pytest

from ray_sampler.config import RunConfig
from ray_sampler.storage.record import Samples

ROOT = Path(__file__).resolve().parents[1]

Configure = Callable[..., RunConfig]

# An example may take as long as it does: on a busy machine any of them takes more than Hypothesis's 200 ms at times.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session")
def aws_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the workers of the shared Ray look for an S3 server and its keys; written by the tests that have one."""
    return tmp_path_factory.mktemp("aws") / "config"


@pytest.fixture(scope="session")
def local_ray(aws_config: Path) -> Iterator[None]:
    """A Ray of two CPUs, reachable from this machine only, that all tests share."""
    import ray

    from ray_sampler.cluster.own_ray import on_loopback

    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with on_loopback(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_CONFIG_FILE", str(aws_config))
        patch.setenv("PYTHONPATH", str(ROOT))  # for the workers of whoever joins it from another folder
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
    """A complete small run in tmp_path/run, where `configure` goes on with it; its files are of another day."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    for path in output.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return output
