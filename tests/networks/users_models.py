"""Modules with a network of the user's own, as tests write and open them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ray_sampler.cluster.job import Job, prepare
from ray_sampler.config import RunConfig
from ray_sampler.sampling.plan import sample_block

Write = Callable[..., str]
"""(source, sibling=source, ...) -> the name of a fresh module in the current directory."""


def job(module: str, **flags: Any) -> Job:
    settings: dict[str, Any] = {"model": f"python:{module}:make", "gpus_per_actor": 0.0, "num_samples": 8}
    return prepare(RunConfig(**(settings | flags)))


def sampled(made: Job, count: int = 4) -> tuple[Tensor, Tensor | None]:
    network = made.networks["main"].build(made.precision)
    with torch.inference_mode():
        return sample_block({"main": network}, made.plan, torch.arange(count))
