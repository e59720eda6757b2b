"""Solvers, finishers, products and conditions go through the engine: each is registered in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_sampler.options import option
from ray_sampler.sampling.engine import Engine, NonFiniteError
from ray_sampler.sampling.finish import FINISHERS, Finisher, pixels
from ray_sampler.sampling.noise import Draws, Noise, philox_normals
from ray_sampler.sampling.options import DecoderOptions, GuidanceOptions
from ray_sampler.sampling.parameterisation import Denoiser, parameterise
from ray_sampler.sampling.plan import MAIN, SamplePlan
from ray_sampler.sampling.solvers import SOLVERS, Solver
from ray_sampler.storage.record import Column
from tests.sampling.plans import plan

N, BATCH, DEPTH = 10, 4, 3


# A solver with an option: a share of the noise stays.


@dataclass(frozen=True, kw_only=True)
class GrainOptions:
    grain: float = option(0.125, "How much of the noise stays.")


def grain(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: GrainOptions) -> Tensor:
    return denoise(x, sigmas[0]) + options.grain * x / sigmas[0]


# A condition that is a vector: the network gives it back as a colour.


@dataclass(frozen=True)
class Colours:
    seed: int = 42

    num_classes: ClassVar[int] = 0

    def at(self, draws: Draws, indices: Tensor, device: torch.device | None = None) -> Tensor:
        return philox_normals(self.seed, indices, 99, (DEPTH,)).to(device or indices.device)

    def null(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def columns(self) -> dict[str, Column]:
        return {"colour": Column("float32", (DEPTH,))}

    def stored(self, y: Tensor) -> dict[str, Tensor]:
        return {"colour": y}

    def identity(self) -> dict[str, Any]:
        return {"colours": "normal"}


class Painter(nn.Module):
    def forward(self, x: Tensor, times: Tensor, y: Tensor) -> Tensor:
        assert y.shape == (len(x), DEPTH)
        return torch.tanh(y)[:, :, None, None].expand_as(x)


# A finisher that asks a second network, and stores its answer beside the images.


class Judge(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(dim=1, keepdim=True).repeat(1, 2)


def judged(options: DecoderOptions) -> Finisher:
    rounded = pixels(options.rounding)
    return Finisher(
        lambda x, networks: {**rounded.finish(x, networks), "score": networks["judge"](x)},
        lambda shape: {**rounded.columns(shape), "score": Column("float32", (2,))},
        {"decoder": "judged"},
        {"judge": "judge.pt"},
    )


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> SamplePlan:
    """A plan of all of ours together."""
    monkeypatch.setitem(SOLVERS, "grain", Solver(grain, lambda steps, options: 1, GrainOptions))
    monkeypatch.setitem(FINISHERS, "judged", judged)
    made = plan(sampler="grain", decoder="judged", num_samples=N, clip_denoised=False)
    return replace(made, condition=Colours(), parameterisation=parameterise("denoiser"))


def engine(**networks: nn.Module) -> Engine:
    roles = {MAIN: Painter(), "judge": Judge()} | networks
    return Engine(roles, batch_size=BATCH, device=torch.device("cpu"), compile="off")


def test_what_is_ours_is_computed_block_by_block_and_said_in_the_identity(planned: SamplePlan) -> None:
    whole, part = engine().sample(planned, 0, N)().columns, engine().sample(planned, 3, 9)().columns
    kinds = {name: Column(str(array.dtype), array.shape[1:]) for name, array in whole.items()}
    assert kinds == planned.columns()
    assert kinds["colour"] == Column("float32", (DEPTH,))
    for name, array in part.items():
        assert array.tobytes() == whole[name][3:9].tobytes()
    colours = philox_normals(42, torch.arange(N), 99, (DEPTH,))
    assert torch.equal(torch.from_numpy(whole["colour"]), colours)
    x = torch.tanh(colours)[:, :, None, None] + philox_normals(42, torch.arange(N), 0, planned.shape) / 8
    np.testing.assert_allclose(whole["score"][:, 0], x.flatten(1).mean(dim=1).numpy(), rtol=1e-5, atol=1e-6)
    identity = planned.identity({MAIN: "hash", "judge": "of the judge"})
    wanted = {"grain": 0.125, "colours": "normal", "decoder": "judged", "judge": "of the judge"}
    assert {name: identity[name] for name in wanted} == wanted


def test_guidance_asks_the_condition_for_the_null_condition(planned: SamplePlan) -> None:
    """tanh(0) is 0, so that a weight of 2 doubles D."""
    once = engine().sample(planned, 0, N)().columns
    twice = engine().sample(replace(planned, guidance=GuidanceOptions(guidance=2.0)), 0, N)().columns
    more = torch.tanh(torch.from_numpy(once["colour"])).mean(dim=1)
    np.testing.assert_allclose(twice["score"][:, 0] - once["score"][:, 0], more, rtol=1e-4, atol=1e-5)


def test_products_are_made_of_the_same_results_beside_the_columns(planned: SamplePlan) -> None:
    def latents(x: Tensor, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"latent": x.float(), "score": networks["judge"](x)}

    alone, beside = engine().sample(planned, 2, N)(), engine().sample(planned, 2, N, {"latents": latents})()
    assert alone.products == {}
    assert {name: array.tobytes() for name, array in beside.columns.items()} == {
        name: array.tobytes() for name, array in alone.columns.items()
    }
    made = beside.products["latents"]
    assert made["latent"].shape == (N - 2, *planned.shape)
    assert made["score"].tobytes() == beside.columns["score"].tobytes()


def test_a_finisher_that_gives_what_is_not_finite_is_told_apart(planned: SamplePlan) -> None:
    class Broken(Judge):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log() - torch.inf

    with pytest.raises(NonFiniteError, match="for 10 of the samples 0 to 9"):
        engine(judge=Broken()).sample(planned, 0, N)()
