"""Sample plans of small ADM networks, from flags."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ray_sampler.config import RunConfig
from ray_sampler.networks import adm
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.options import flags_of
from ray_sampler.planning import plan_of
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.noise import Noise
from ray_sampler.sampling.parameterisation import Denoiser
from ray_sampler.sampling.plan import SamplePlan

DEFAULTS = {name: flag.default for name, flag in flags_of(RunConfig).items()}


def plan(labels: LabelRule | None = None, *, image_size: int = 8, **flags: Any) -> SamplePlan:
    """The plan of an ADM network with the classes of `labels`; unconditional without."""
    classes: dict[str, Any] = {"class_cond": True, "num_classes": labels.num_classes} if labels else {}
    spec = adm.spec_of(AdmOptions(image_size=image_size, **classes), flags)
    config = RunConfig().filled(DEFAULTS | flags | {"labels": None})
    return replace(plan_of(config, {"main": spec}), condition=labels)


def solve(plan: SamplePlan, denoise: Denoiser, noise: Noise) -> Tensor:
    """What the plan's solver makes of a denoiser and noise, clamped to [-1, 1] as a picture is: (B, C, H, W)."""
    sigmas = plan.solver.levels(plan.schedule, plan.solver_options, torch.float32)
    x_T = noise(0) * plan.schedule.sigma_max

    def stepped(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        return denoise(x, sigma)

    return plan.solver.run(
        lambda x, sigma, step=None: denoise(x, sigma), x_T, sigmas, noise, plan.solver_options
    ).clamp(-1, 1)
