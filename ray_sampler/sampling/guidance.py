"""Guidance: D = D_ref + w (D - D_ref), towards a network's own unconditional answer or another network's.

Ho & Salimans 2022 (classifier-free), Karras et al. 2024 (autoguidance), Kynkaanniemi et al. 2024 (an interval).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_sampler.errors import require
from ray_sampler.sampling.options import EVERYWHERE, GuidanceOptions, interval_of
from ray_sampler.sampling.parameterisation import Denoiser

ROUNDING = 1e-5
"""How far, relatively, a level of the schedule may lie from the number that a user writes for it: both are rounded."""


class SteppedDenoiser(Protocol):
    """D as a solver calls it."""

    def __call__(self, x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        """
        Args:
            step: the level at which the solver's step began, which decides whether guidance applies; None: sigma.
        """


def check_channels(options: GuidanceOptions, channels: int) -> None:
    """Raises RequestError: the network does not have the channels that are to be guided."""
    require(
        options.guidance_channels is None or 1 <= options.guidance_channels <= channels,
        f"--guidance_channels is {options.guidance_channels}; the network has {channels} channels, so it must be from "
        f"1 to {channels}",
    )


def guidance_identity(options: GuidanceOptions, guide: str) -> dict[str, Any]:
    """What decides a sample, by effective value; `guide` is "null" or the guide network's hash."""
    if options.guidance == 1:
        return {}
    interval = interval_of(options)
    result = {
        "guidance": float(options.guidance),
        "guide": guide,
        "guidance_interval": None if interval == EVERYWHERE else ",".join(f"{level:g}" for level in interval),
        "guidance_channels": options.guidance_channels,
    }
    return {name: value for name, value in result.items() if value is not None}


Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, sigma) -> D and D_ref."""


def guided(denoise: Denoiser, pair: Pair, guidance: GuidanceOptions) -> SteppedDenoiser:
    """The guided denoiser, or a flow's guided velocity: what holds for D holds for all that is affine in it.

    What D has beyond the channels of x, a learned variance, stays that of D.

    Args:
        denoise: D alone, for steps without guidance.
        pair: gives D and D_ref of x.
    """
    low, high = interval_of(guidance)
    low, high = low * (1 - ROUNDING), high * (1 + ROUNDING)

    def denoiser(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        if not low <= float(sigma if step is None else step) <= high:
            return denoise(x, sigma)
        conditional, reference = pair(x, sigma)
        n = guidance.guidance_channels or x.shape[1]
        result = torch.lerp(reference[:, :n], conditional[:, :n], guidance.guidance)
        return torch.cat([result, conditional[:, n:]], dim=1)

    return denoiser
