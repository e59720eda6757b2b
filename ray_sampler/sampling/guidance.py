"""Guidance: D = D_ref + w (D - D_ref), towards a network's own unconditional answer or another network's.

Ho & Salimans 2022 (classifier-free), Karras et al. 2024 (autoguidance), Kynkaanniemi et al. 2024 (an interval).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option, pick
from ray_sampler.sampling.parameterisation import Denoiser

EVERYWHERE = (0.0, math.inf)
ROUNDING = 1e-5
"""How far, relatively, a level of the schedule may lie from the number that a user writes for it: both are rounded."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, where, and by what the denoiser is guided."""

    guidance: float = option(1.0, "Weight w of guidance, D_ref + w (D - D_ref); 1 is none.", recorded=False)
    guide: str | None = option(
        None,
        "What guides: null (the network without a label; the default where it knows that) or a second network, given "
        "as for --model.",
        recorded=False,
    )
    guidance_interval: str | None = option(
        None, "Noise levels LO,HI between which guidance applies, inclusive (everywhere).", recorded=False
    )
    guidance_channels: int | None = option(
        None, "Channels of x that are guided, counted from the first (all).", recorded=False
    )

    @property
    def interval(self) -> tuple[float, float]:
        """The lowest and the highest guided level."""
        if self.guidance_interval is None:
            return EVERYWHERE
        try:
            low, high = (float(part) for part in self.guidance_interval.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if not 0 <= low <= high:
            raise RequestError(
                f"--guidance_interval is {self.guidance_interval!r}; it must be two noise levels LO,HI with "
                "0 <= LO <= HI, as in 0.28,1.61"
            )
        return low, high

    @property
    def active(self) -> bool:
        return self.guidance != 1

    def validate(self, channels: int) -> None:
        """Raises RequestError: a value is wrong."""
        require(
            math.isfinite(self.guidance), f"--guidance is {self.guidance:g}; it must be a finite number, 1 for none"
        )
        require(
            self.guidance_channels is None or 1 <= self.guidance_channels <= channels,
            f"--guidance_channels is {self.guidance_channels}; the network has {channels} channels, so it must be from "
            f"1 to {channels}",
        )
        self.interval  # noqa: B018  # raises where it is none

    def identity(self, guide: str) -> dict[str, Any]:
        """What decides a sample, by effective value; `guide` is "null" or the guide network's hash."""
        if not self.active:
            return {}
        result: dict[str, Any] = {"guidance": float(self.guidance), "guide": guide}
        if self.interval != EVERYWHERE:
            result["guidance_interval"] = ",".join(f"{level:g}" for level in self.interval)
        if self.guidance_channels is not None:
            result["guidance_channels"] = self.guidance_channels
        return result


def guide_of(settings: Mapping[str, Any]) -> str | None:
    """The second network that settings name as a guide; None where none is used."""
    guidance = pick(Guidance, settings)
    return guidance.guide if guidance.active and guidance.guide != "null" else None


def guided(denoise: Denoiser, pair: Denoiser, guidance: Guidance) -> Denoiser:
    """The guided denoiser.

    Args:
        denoise: D alone, for steps without guidance.
        pair: gives D and D_ref of x, one below the other: (2 B, C, H, W).
    """
    low, high = guidance.interval
    low, high = low * (1 - ROUNDING), high * (1 + ROUNDING)

    def denoiser(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        level = float(sigma if step is None else step)
        if not low <= level <= high:
            return denoise(x, sigma, step)
        conditional, reference = pair(x, sigma, step).chunk(2)
        result = torch.lerp(reference, conditional, guidance.guidance)
        n = guidance.guidance_channels
        return result if n is None else torch.cat([result[:, :n], conditional[:, n:]], dim=1)

    return denoiser
