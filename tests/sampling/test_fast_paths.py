"""Compiled networks and those of fewer bits draw the pictures of the plain float32 one, within stated bounds."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from ray_sampler.networks.family import Precision
from ray_sampler.networks.opening import open_network
from ray_sampler.presets import BUNDLED
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.engine import Engine, compiled
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.plan import MAIN
from tests.loading import loaded
from tests.sampling.plans import plan

N, BATCH = 16, 8
BOUNDS: dict[Precision, tuple[int, float]] = {"fp16": (2, 0.05), "bf16": (12, 0.4)}
"""Largest and mean difference of a value of 0 to 255 that docs/reproducibility.md states."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def pictures(device: str, precision: Precision, compile: Compile, warm: bool = False, **settings: Any) -> np.ndarray:
    """N images of the bundled one-step model, as integers that differences do not wrap in."""
    known = dict(BUNDLED["digits-cd"].settings) | settings
    network: Any = loaded(open_network("digits-cd", known), precision, device)
    if device == "cpu" and compile == "on":  # without timing the kernels, which takes a minute
        network, compile = cast(nn.Module, compiled(network, "auto")), "off"
    engine = Engine({MAIN: network}, batch_size=BATCH, device=torch.device(device), compile=compile)
    sampling = {name: known[name] for name in ("training_mode", "sampler", "steps")}
    planned = plan(LabelRule("random", 10), image_size=32, num_samples=N, **sampling)
    if warm:
        engine.warm_up(planned)
    return engine.sample(planned, 0, N)().columns["image"].astype(int)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", BOUNDS)
def test_fewer_bits_move_a_value_by_little(device: str, precision: Precision) -> None:
    largest, mean = BOUNDS[precision]
    moved = abs(pictures(device, precision, "off") - pictures(device, "fp32", "off"))
    assert 0 < moved.max() <= largest
    assert moved.mean() <= mean


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_float32_network_moves_no_value_by_more_than_one(device: str) -> None:
    moved = abs(pictures(device, "fp32", "on", warm=True) - pictures(device, "fp32", "off"))
    assert moved.max() <= 1
    assert moved.mean() < 0.01
