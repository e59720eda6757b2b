"""Requests of a small model, resolved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray_sampler.config import Run, RunConfig

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
    return RunConfig(**flags).resolve(SMALL if brought is None else brought, "digits")
