"""Options of a sample set, of guidance and of the device that computes; those of a schedule or solver are beside it.

None of these modules imports torch or numpy before it computes, so that a wrong value is refused at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option

Generator = Literal["philox", "edm", "determ", "determ-indiv", "dummy"]
Rounding = Literal["truncate", "nearest", "round"]
StateType = Literal["fp32", "fp64"]
Compile = Literal["auto", "on", "off"]

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Where random numbers come from."""

    seed: int = option(42, "Seed of the noise and of random labels.", common=True)
    generator: Generator = option(
        "philox",
        "Source of the noise: philox (counter-based), edm (as in EDM's and EDM2's scripts), or determ, determ-indiv "
        "and dummy (as in the consistency-models script).",
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
        "Class labels: random, balanced, a list such as 0,3,999, or a file (.npz with arr_1, .npy, text); a list "
        "shorter than N is repeated (default: random).",
        numbers=True,
        common=True,
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How many samples, and how the solver works on them."""

    num_samples: int = option(10000, "Number of samples N.", common=True)
    clip_denoised: bool = option(True, "Clamp every denoiser output to [-1, 1].")
    state: StateType = option("fp32", "Precision of the solver's state.", recorded=False)

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(1 <= self.num_samples <= 10**12, f"--num_samples is {self.num_samples}; it must be from 1 to 10^12")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How strongly, where, and by what the denoiser is guided."""

    guidance: float = option(
        1.0,
        "Weight w of guidance, D_ref + w (D - D_ref): classifier-free guidance (CFG) or autoguidance; 1 is none.",
        recorded=False,
        common=True,
    )
    guide: str | None = option(
        None,
        "D_ref: null (the unconditional branch, the default where the network has one) or a second model, given as for "
        "--model.",
        recorded=False,
        common=True,
    )
    guide_weights: str | None = option(
        None, "Checkpoint passed to the function of --guide python:module:function.", recorded=False
    )
    guidance_interval: str | None = option(
        None,
        "Noise levels LO,HI between which guidance applies, inclusive; for flow_euler, flow_heun and flow_sde times t "
        "(default: all).",
        recorded=False,
        numbers=True,
    )
    guidance_channels: int | None = option(
        None, "Number of channels of x that are guided, from the first (default: all).", recorded=False
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
            "0 <= LO <= HI, for example 0.28,1.61"
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
        "Conversion to pixels: truncate, as in guided-diffusion and REPA; nearest, as in EDM, EDM2 and DiT; or round, "
        "as in diffusers.",
    )
    decoder: str | None = option(
        None,
        "Decoder of latents: the directory of a diffusers AutoencoderKL, a local path or any fsspec URL; none writes "
        "the solver's result as it is, float32 (H, W, C).",
        recorded=False,
    )
    decoder_batch: int = option(
        4,
        "Latents that are decoded at once; the default needs at most 8 GB for pictures of 512 pixels.",
        recorded=False,
    )
    decoder_precision: Literal["fp32", "fp16", "bf16"] = option("fp32", "Precision of the decoder.", recorded=False)
    keep_latents: bool = option(
        False,
        "Keep the solver's results as well, float32, in latents/ beside the fragments.",
        recorded=False,
    )
    latents: str | None = option(
        None,
        "Run directory whose latents, kept by --keep-latents or --decoder none, are decoded in place of sampling.",
        recorded=False,
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(self.decoder != "", "--decoder is empty; it must be a directory, or none")
        require(1 <= self.decoder_batch <= 10**6, f"--decoder_batch is {self.decoder_batch}; it must be from 1 to 10^6")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a device computes."""

    batch_size: int = option(16, "Images per batch of an actor.", common=True)
    compile: Compile = option(
        "auto",
        "torch.compile: off, on (kernels chosen by timing: not bit-reproducible), or auto (reproducible; on GPUs where "
        "the run is long enough to repay it).",
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(1 <= self.batch_size <= 10**6, f"--batch_size is {self.batch_size}; it must be from 1 to 10^6")
