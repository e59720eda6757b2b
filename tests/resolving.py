"""Requests of a small model, resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_sampler import planning
from ray_sampler.config import RunConfig
from ray_sampler.networks import adm
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.family import NetworkSpec
from ray_sampler.options import of
from ray_sampler.resolve import check, given_values, settings_json, settled
from ray_sampler.resolve import resolve as resolve_request
from ray_sampler.sampling.plan import SamplePlan

SMALL: dict[str, Any] = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2",
    "attention_resolutions": "16",
    "num_head_channels": 32,
}
NO_HEADS: dict[str, Any] = {"num_head_channels": -1}


class Run(NamedTuple):
    """A resolved request with the network that it was resolved against."""

    config: RunConfig
    spec: NetworkSpec

    @property
    def settings(self) -> dict[str, Any]:
        return vars(self.config)

    @property
    def plan(self) -> SamplePlan:
        return planning.plan_of(self.config, {"main": self.spec})

    def as_json(self) -> dict[str, Any]:
        return settings_json(self.config)

    def identity(self, weights: str) -> dict[str, Any]:
        return planning.identity(self.config, self.plan, {"main": self.spec}, {"main": weights})


def resolve(brought: Mapping[str, Any] | None = None, **flags: Any) -> Run:
    """The run of an ADM network, described by flags as `open_adm` reads them."""
    return resolved(RunConfig(**flags), "digits", SMALL if brought is None else brought)


def resolved(request: RunConfig, model: str, brought: Mapping[str, Any], gpus: float | None = None) -> Run:
    check(request)
    settings = {**brought, **given_values(request)}
    options = of(AdmOptions, settings)
    options.validate()
    return resolved_for(request, model, brought, adm.spec_of(options, settings), gpus)


def resolved_for(
    request: RunConfig, model: str, brought: Mapping[str, Any], spec: NetworkSpec, gpus: float | None = 0.0
) -> Run:
    """The run of a network; where `gpus` is None, what waits for the fleet still waits."""
    config = resolve_request(request, model, brought, spec)
    run = Run(config if gpus is None else settled(config, gpus, {}), spec)
    assert gpus is None or run.plan.num_samples  # what is wrong beside the network is refused here
    return run
