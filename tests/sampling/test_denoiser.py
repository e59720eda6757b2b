"""The denoiser is the network between the scalings of EDM or of consistency models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ray_sampler.networks.adm import spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.sampling.parameterisation import (
    TIMES,
    Denoiser,
    Network,
    clipped,
    consistency_scalings,
    edm_scalings,
    parameterise,
)
from ray_sampler.sampling.plan import MAIN, parameterisation_of, sample_block
from tests.sampling.plans import plan

SIGMA_MIN = 0.002
SPEC = replace(spec_of(AdmOptions(image_size=8), {}), kind_options={})
SIGMAS = st.floats(SIGMA_MIN, 80.0)
network_time = TIMES["250log"]


def make_denoiser(
    network: Network, labels: Tensor | None, *, consistency: bool, sigma_min: float, clip: bool
) -> Denoiser:
    """D of a checkpoint of consistency-models."""
    kind = parameterise("consistency", sigma_min) if consistency else parameterise("edm", c_noise="250log")
    denoise = kind.denoiser(network, labels)
    return clipped(denoise) if clip else denoise


def scalings_formula(sigma: float, consistency: bool) -> tuple[float, float, float]:
    """c_skip, c_out, c_in in float64, with sigma_data 0.5."""
    d, above = 0.5, sigma - SIGMA_MIN if consistency else sigma
    root = math.hypot(sigma, d)
    return d**2 / (above**2 + d**2), above * d / root, 1 / root


def cube(x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
    """A network that depends on all that it is given."""
    output = x**3 - times[:, None, None, None] / 1000
    return output if y is None else output + y[:, None, None, None]


@pytest.mark.parametrize("mode", ["edm", "consistency"])
def test_scalings_equal_the_original(golden: Path, mode: str) -> None:
    numbers = np.load(golden / "schedule.npz")
    sigma = torch.from_numpy(numbers["sigma"])
    scalings = edm_scalings(sigma) if mode == "edm" else consistency_scalings(sigma, SIGMA_MIN)
    for name, values in zip(("c_skip", "c_out", "c_in"), scalings, strict=True):
        np.testing.assert_allclose(values.numpy(), numbers[f"{mode}_{name}"], rtol=1e-6, atol=1e-9)


@given(sigma=SIGMAS, consistency=st.booleans())
def test_scalings_follow_the_formulas(sigma: float, consistency: bool) -> None:
    level = torch.tensor(sigma)
    scalings = consistency_scalings(level, SIGMA_MIN) if consistency else edm_scalings(level)
    assert [float(c) for c in scalings] == pytest.approx(scalings_formula(sigma, consistency), rel=1e-6, abs=1e-9)


@given(sigma=SIGMAS)
def test_the_network_is_told_250_times_the_logarithm_of_sigma(sigma: float) -> None:
    assert float(network_time(torch.tensor(sigma))) == pytest.approx(250 * math.log(sigma), rel=1e-6, abs=1e-4)


def test_the_time_of_sigma_0_is_finite() -> None:
    assert network_time(torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize("consistency", [False, True])
@pytest.mark.parametrize("labels", [None, torch.tensor([0, 3])])
@settings(max_examples=20)
@given(sigma=SIGMAS)
def test_the_denoiser_follows_the_formula(consistency: bool, labels: Tensor | None, sigma: float) -> None:
    x = torch.linspace(-2, 2, 2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    denoise = make_denoiser(cube, labels, consistency=consistency, sigma_min=SIGMA_MIN, clip=False)
    c_skip, c_out, c_in = scalings_formula(sigma, consistency)
    times = torch.full((2,), 250 * math.log(sigma), dtype=torch.float64)
    expected = c_skip * x.double() + c_out * cube(c_in * x.double(), times, labels)
    denoised = denoise(x, torch.tensor(sigma))
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_consistency_model_is_the_identity_at_sigma_min() -> None:
    x = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4)
    for clip in (False, True):
        denoise = make_denoiser(cube, None, consistency=True, sigma_min=SIGMA_MIN, clip=clip)
        assert torch.equal(denoise(x, torch.tensor(SIGMA_MIN)), x)


def test_an_edm_model_is_not_the_identity_at_sigma_min() -> None:
    x = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4)
    denoise = make_denoiser(cube, None, consistency=False, sigma_min=SIGMA_MIN, clip=False)
    assert not torch.equal(denoise(x, torch.tensor(SIGMA_MIN)), x)


@settings(max_examples=30)
@given(sigmas=st.lists(SIGMAS, min_size=1, max_size=4), consistency=st.booleans())
def test_a_level_for_each_image_is_the_same_as_a_level_for_all(sigmas: list[float], consistency: bool) -> None:
    x = torch.linspace(-1, 1, len(sigmas) * 12).reshape(len(sigmas), 3, 2, 2)
    denoise = make_denoiser(cube, None, consistency=consistency, sigma_min=SIGMA_MIN, clip=False)
    together = denoise(x, torch.tensor(sigmas))
    alone = torch.cat([denoise(x[i : i + 1], torch.tensor(sigma)) for i, sigma in enumerate(sigmas)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_clipping_clamps_to_one() -> None:
    x = torch.linspace(-9, 9, 3 * 4 * 4).reshape(1, 3, 4, 4)
    within, free = (
        make_denoiser(cube, None, consistency=False, sigma_min=SIGMA_MIN, clip=clip)(x, torch.tensor(0.1))
        for clip in (True, False)
    )
    assert free.abs().max() > 1
    assert torch.equal(within, free.clamp(-1, 1))


def test_a_run_ends_only_what_was_left_open() -> None:
    """D of a consistency model is the identity at its own sigma_min, where it has one, and else at the run's."""
    x = torch.linspace(-1, 1, 3 * 4 * 4).reshape(1, 3, 4, 4)
    own, left_open = parameterise("consistency", sigma_min=0.01), parameterise("consistency")
    for kind, end in ((own, 0.01), (left_open, 0.05)):
        taken = parameterisation_of(replace(SPEC, kind=kind), 0.05)
        assert taken.identity()["sigma_min"] == end
        assert torch.equal(taken.denoiser(cube, None)(x, torch.tensor(end)), x)


def test_a_parameterisation_of_ones_own_gets_no_step() -> None:
    """It has the methods of `Parameterisation`, whose D takes a state and a level."""

    class Halved:
        def denoiser(self, network: Network, y: Tensor | None) -> Denoiser:
            return lambda x, sigma: x / 2

        def identity(self) -> dict[str, Any]:
            return {"preconditioning": "halved"}

    planned = replace(plan(), parameterisation=parameterisation_of(replace(SPEC, kind=Halved()), 0.002))
    x, _ = sample_block({MAIN: cube}, planned, torch.arange(2))
    assert x.isfinite().all()
    assert planned.identity({})["preconditioning"] == "halved"
