"""A sample plan: everything that decides a sample beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ray_sampler.errors import RequestError
from ray_sampler.networks.family import NetworkSpec, Script
from ray_sampler.sampling.conditions import Condition
from ray_sampler.sampling.finish import Finisher
from ray_sampler.sampling.guidance import Pair, SteppedDenoiser, guidance_identity, guided
from ray_sampler.sampling.noise import make_draws, noise_identity
from ray_sampler.sampling.options import GuidanceOptions, NoiseOptions, StateType
from ray_sampler.sampling.parameterisation import (
    Denoiser,
    Network,
    Parameterisation,
    Preconditioned,
    parameterise,
)
from ray_sampler.sampling.schedules import ScheduleOptions, schedule_identity
from ray_sampler.sampling.solvers import Solver
from ray_sampler.storage.record import Column

STATE_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}

MAIN, GUIDE = "main", "guide"
"""Roles of the networks that a solver asks. A finisher names others."""


@dataclass(frozen=True)
class Kept:
    """The solver's results of the samples [start, start + n), kept by an earlier run."""

    start: int
    x: Tensor
    """(n, C, H, W) float32."""

    def at(self, indices: Tensor, device: torch.device | None) -> Tensor:
        """Those of `indices`, zeros for others."""
        places = indices - self.start
        inside = (places >= 0) & (places < len(self.x))
        found = self.x.new_zeros((len(indices), *self.x.shape[1:]))
        found[inside] = self.x[places[inside]]
        return found.to(device)


@dataclass(frozen=True)
class SamplePlan:
    """All that decides a sample beside the weights; small enough to go with a run to every worker."""

    shape: tuple[int, int, int]
    """(C, H, W) of x."""
    parameterisation: Parameterisation
    sampler: str
    """The solver's name."""
    solver: Solver
    solver_options: Any
    """As its `options` declare them."""
    schedule: ScheduleOptions
    finisher: Finisher
    noise: NoiseOptions
    num_samples: int
    condition: Condition | None = None
    """None for an unconditional network."""
    clip_denoised: bool = True
    state: StateType = "fp32"
    guidance: GuidanceOptions = field(default_factory=GuidanceOptions)
    guide: Parameterisation | None = None
    """Of the guide network; None where the network guides itself without a condition, or nothing does."""
    guide_conditioned: bool = False
    """Whether the guide network takes the condition."""
    script: Script = "consistency-models"
    """Whose script's arithmetic is followed to the last bit."""
    kept: Kept | None = None
    """What is taken in place of the solver's results."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C) of the images that are written."""
        return self.columns()["image"].shape

    def columns(self) -> dict[str, Column]:
        """What is written of each sample."""
        return self.finisher.columns(self.shape) | (self.condition.columns() if self.condition else {})

    def identity(self, hashes: Mapping[str, str]) -> dict[str, Any]:
        """What decides a sample, flat, by effective value.

        Args:
            hashes: of the networks, by role.
        """
        return (
            {"sampler": self.sampler, "clip_denoised": self.clip_denoised}
            | schedule_identity(self.schedule, self.solver.uses)
            | self.solver.identity(self.solver_options)
            | noise_identity(self.noise, self.num_samples)
            | self.parameterisation.identity()
            | dict(self.finisher.identity)
            | {role: hashes[role] for role in self.finisher.networks}
            | guidance_identity(self.guidance, hashes.get(GUIDE, "null"))
            | (self.condition.identity() if self.condition else {})
            | ({} if self.state == "fp32" else {"state": self.state})
        )

    def evaluations(self) -> int:
        """NFE: calls of the denoiser D for one sample. A guided call is one, although it asks the network twice."""
        return self.solver.evaluations(self.schedule.steps, self.solver_options)

    def sigmas(self) -> list[float]:
        """The noise levels that the solver visits, before they are rounded to the dtype of the state."""
        return self.solver.sigmas(self.schedule, self.solver_options)


def parameterisation_of(spec: NetworkSpec, sigma_min: float) -> Parameterisation:
    """What a network computes, in a run that ends at sigma_min.

    Raises:
        RequestError: a user's Model names no such kind, or options that it does not have.
    """
    try:
        return parameterise(spec.kind, sigma_min, **spec.kind_options)
    except RequestError as error:
        raise RequestError(
            f"--model {getattr(spec.options, 'name', spec.family)} returned a Model that cannot be sampled: {error}"
        ) from error


def sample_block(
    networks: Mapping[str, Network], plan: SamplePlan, indices: Tensor, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """The solver's results x_0 for the samples `indices`, and their condition.

    Args:
        networks: by role; each F is called as F(x, t, y).
        indices: (B,) int64 global sample indices, best on the host: then nothing in here waits for the device.
        device: the networks'; that of `indices` unless given.

    Returns:
        (B, C, H, W) in the dtype of the state, before it is finished; what the network received, (B, ...) or None.
    """
    dtype, condition = STATE_DTYPES[plan.state], plan.condition
    draws = make_draws(
        plan.noise,
        plan.num_samples,
        indices,
        plan.shape,
        dtype=dtype,
        num_classes=condition.num_classes if condition else 0,
        every_step=plan.script == "edm",
        device=device,
    )
    y = condition.at(draws, indices, device) if condition else None
    if plan.kept is not None:
        return plan.kept.at(indices, device), y
    denoise = make_denoiser(networks, plan, y)
    sigmas = plan.solver.levels(plan.schedule, plan.solver_options, dtype)
    first = plan.schedule.sigma_max if plan.script == "consistency-models" else sigmas[0]
    x = draws.noise(0).to(dtype) * (plan.solver.start(sigmas[0]) if plan.solver.start else first)
    return plan.solver.run(denoise, x, sigmas, draws.noise, plan.solver_options), y


def make_denoiser(networks: Mapping[str, Network], plan: SamplePlan, y: Tensor | None) -> SteppedDenoiser:
    """D of a batch under the condition y, guided and clamped as the plan says; for a solver of flows, the velocity."""
    denoise = asked(plan)(networks[MAIN], y)
    guide = guided(denoise, pair_of(networks, plan, y), plan.guidance) if plan.guidance.guidance != 1 else None

    def denoiser(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        denoised = guide(x, sigma, step) if guide else denoise(x, sigma)
        if not plan.clip_denoised:
            return denoised
        clamped, beyond = denoised[:, : x.shape[1]].clamp(-1, 1), denoised[:, x.shape[1] :]
        return torch.cat([clamped, beyond], dim=1) if beyond.shape[1] else clamped

    return denoiser


def asked(plan: SamplePlan) -> Callable[[Network, Tensor | None], Denoiser]:
    """What the solver asks of the network and the condition of a batch."""
    kind = plan.parameterisation
    if plan.solver.path == "any":
        return kind.denoiser
    assert isinstance(kind, Preconditioned), "the plan was checked"
    return kind.velocity if plan.solver.path == "flow" else partial(kind.denoiser, with_variance=True)


def pair_of(networks: Mapping[str, Network], plan: SamplePlan, y: Tensor | None) -> Pair:
    """D and D_ref: of two networks, or of one that is called on a doubled batch."""
    if plan.guide is not None:
        denoise = asked(plan)(networks[MAIN], y)
        ask = asked(replace(plan, parameterisation=plan.guide)) if plan.solver.path == "flow" else plan.guide.denoiser
        reference = ask(networks[GUIDE], y if plan.guide_conditioned else None)
        return lambda x, sigma: (denoise(x, sigma), reference(x, sigma))
    assert plan.condition is not None
    assert y is not None
    doubled = asked(plan)(networks[MAIN], torch.cat([y, plan.condition.null(y)]))

    def both(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        conditional, reference = doubled(torch.cat([x, x]), sigma).chunk(2)
        return conditional, reference

    return both
