"""Options of a sample set, of guidance and of the device that computes; those of a schedule or solver stand beside it.

None of these modules imports torch or numpy before it computes, so that a wrong value is refused at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option

Generator = Literal["philox", "edm", "determ", "determ-indiv", "dummy"]
Rounding = Literal["truncate", "nearest"]
StateType = Literal["fp32", "fp64"]
Compile = Literal["auto", "on", "off"]

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Where random numbers come from."""

    seed: int = option(42, "Decides the noise and the random labels, together with each sample's index.")
    generator: Generator = option(
        "philox",
        "Where noise comes from: philox (counter-based), edm (the seeds of EDM's and EDM2's scripts), or the "
        "consistency-models script's determ, determ-indiv and dummy.",
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(0 <= self.seed < 2**64, f"--seed is {self.seed}; it must be in [0, 2^64)")


def check_seeds(options: NoiseOptions, num_samples: int) -> None:
    """Raises RequestError: a sample's own seed would not fit in 64 bits."""
    require(
        options.generator != "determ-indiv" or num_samples * (options.seed + 1) <= 2**64,
        f"--seed is {options.seed}; --generator determ-indiv seeds sample i with i + num_samples * seed, so with "
        f"--num_samples {num_samples} it must be below {2**64 // num_samples}",
    )


@dataclass(frozen=True, kw_only=True)
class ConditionOptions:
    """What the samples of a conditional model show."""

    labels: str | None = option(
        None,
        "Labels of a class-conditional model: random (the default), balanced, a list as 0,3,999, or a file (.npz with "
        "arr_1, .npy, text); a list shorter than N is repeated.",
        numbers=True,
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How many samples, and how the solver works on them."""

    num_samples: int = option(10000, "How many samples the archive holds.")
    clip_denoised: bool = option(
        True, "Whether every denoiser output is clamped to [-1, 1]; a model may bring another default."
    )
    state: StateType = option(
        "fp32", "Precision of the solver's state; a model may bring another default.", recorded=False
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(1 <= self.num_samples <= 10**12, f"--num_samples is {self.num_samples}; it must be from 1 to 10^12")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How strongly, where, and by what the denoiser is guided."""

    guidance: float = option(1.0, "Weight w of guidance, D_ref + w (D - D_ref); 1 is none.", recorded=False)
    guide: str | None = option(
        None,
        "What guides: null (the network without a label; the default where it knows that) or a second network, given "
        "as for --model.",
        recorded=False,
    )
    guide_weights: str | None = option(
        None, "Passed to the function of --guide python:module:function.", recorded=False
    )
    guidance_interval: str | None = option(
        None, "Noise levels LO,HI between which guidance applies, inclusive (everywhere).", recorded=False, numbers=True
    )
    guidance_channels: int | None = option(
        None, "Channels of x that are guided, counted from the first (all).", recorded=False
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(
            math.isfinite(self.guidance), f"--guidance is {self.guidance:g}; it must be a finite number, 1 for none"
        )
        interval_of(self)


def interval_of(options: GuidanceOptions) -> tuple[float, float]:
    """The lowest and the highest guided level.

    Raises:
        RequestError: the text holds none.
    """
    if options.guidance_interval is None:
        return EVERYWHERE
    try:
        low, high = (float(part) for part in options.guidance_interval.split(","))
    except ValueError:
        low, high = math.nan, math.nan
    if not 0 <= low <= high:
        raise RequestError(
            f"--guidance_interval is {options.guidance_interval!r}; it must be two noise levels LO,HI with "
            "0 <= LO <= HI, as in 0.28,1.61"
        )
    return low, high


def guide_of(options: GuidanceOptions) -> str | None:
    """The second network that is named as a guide; None where none is used."""
    return options.guide if options.guidance != 1 and options.guide != "null" else None


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How results become what is written."""

    rounding: Rounding = option(
        "truncate",
        "Pixel conversion: truncate, as guided-diffusion does, or nearest, as EDM, EDM2 and DiT do; a model may bring "
        "another default.",
    )
    decoder: str | None = option(
        None,
        "none writes the solver's result as it is, float32 (H, W, C), as for latents; without it pixels are written.",
        recorded=False,
    )


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a device computes."""

    batch_size: int = option(16, "Images that one actor computes at once.")
    compile: Compile = option(
        "auto",
        "torch.compile: off, on (kernels chosen by timing, so bytes may differ from process to process), or auto (on a "
        "GPU, without timing, where the run is long enough to repay it).",
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(1 <= self.batch_size <= 10**6, f"--batch_size is {self.batch_size}; it must be from 1 to 10^6")
