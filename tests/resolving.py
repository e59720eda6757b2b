"""Requests of a small model, resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray_sampler.resolved
from ray_sampler.config import RunConfig
from ray_sampler.networks import adm
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.options import pick
from ray_sampler.resolved import Run

SMALL: dict[str, Any] = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
    "num_head_channels": 32,
}
NO_HEADS: dict[str, Any] = {"num_head_channels": -1}


def resolve(brought: Mapping[str, Any] | None = None, **flags: Any) -> Run:
    """The run of an ADM network, described by flags as `open_adm` reads them."""
    return resolved(RunConfig(**flags), "digits", SMALL if brought is None else brought)


def resolved(request: RunConfig, model: str, brought: Mapping[str, Any], gpus: float | None = None) -> Run:
    request.check()
    settings = dict(brought) | request.given()
    options = pick(AdmOptions, settings)
    options.validate()
    return ray_sampler.resolved.resolve(request, model, brought, adm.spec_of(options, settings), gpus=gpus)
