"""Networks of random weights and plans for them: for bytes and for speed only their shapes matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from ray_sampler import planning
from ray_sampler.config import RunConfig
from ray_sampler.networks.adm import ADM, spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.family import Precision, lay_out_contiguously, without_memory
from ray_sampler.options import flags_of
from ray_sampler.published import BUNDLED, IMAGENET64, LSUN256
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.plan import SamplePlan

TINY: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "class_cond": True,
    "num_classes": 10,
    "resblock_updown": True,
}
SETTINGS: dict[str, Mapping[str, Any]] = {
    "tiny": TINY,
    "digits": BUNDLED["digits-v1"].settings,
    "imagenet64": IMAGENET64,
    "lsun256": LSUN256,
}
"""Settings by a network's name: one of milliseconds, the bundled one, and the two published architectures."""

DEFAULTS = {name: flag.default for name, flag in flags_of(RunConfig).items()}


def options_of(name: str, **changed: Any) -> AdmOptions:
    """The architecture of a network."""
    known = {f.name for f in fields(AdmOptions)}
    return AdmOptions(**{key: value for key, value in {**SETTINGS[name], **changed}.items() if key in known})


def tiny() -> AdmOptions:
    return options_of("tiny")


def random_network(
    options: AdmOptions, precision: Precision, device: torch.device, contiguous: bool = False
) -> nn.Module:
    """A network with weights that keep activations of about one, as trained ones do, equal in every process.

    Args:
        contiguous: lay filters out as for a GPU that runs them uncompiled, not channels last.
    """
    module = without_memory(lambda: ADM.build(spec_of(options, {}), precision))
    if contiguous:
        lay_out_contiguously(module)
    module = module.to_empty(device=device)
    random = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            values = torch.randn(parameter.shape, generator=random, device=device)
            parameter.copy_(values.mul_(scale))
    return module


def plan_of(options: AdmOptions, labels: LabelRule | None = None, **flags: Any) -> SamplePlan:
    """A plan for a network: 3 steps of heun with churn unless `flags` say otherwise."""
    if labels is None and options.class_cond:
        labels = LabelRule("random", options.num_classes)
    flags = {"steps": 3, "s_churn": 2.0, "s_noise": 1.003} | flags
    config = RunConfig().filled(DEFAULTS | flags | {"labels": None})
    return replace(planning.plan_of(config, {"main": spec_of(options, flags)}), condition=labels)
