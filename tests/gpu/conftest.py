"""Where the tests of GPUs run: on a GPU, or with GPU_REHEARSAL=1 on the CPU, to prove the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

from ray_sampler.sampling.numerics import pin

REHEARSAL = os.environ.get("GPU_REHEARSAL") == "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test; torch is set for it as an actor sets it."""
    if torch.cuda.is_available():
        found = torch.device("cuda")
    elif REHEARSAL:
        found = torch.device("cpu")
    else:
        pytest.skip("torch finds no GPU; GPU_REHEARSAL=1 runs what it can on the CPU")
    pin(found, "auto")
    return found


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The device, for what a CPU cannot show."""
    if device.type != "cuda":
        pytest.skip("a CPU cannot show this")
    return device
