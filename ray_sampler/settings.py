"""What decides a sample: the network's architecture and the way of sampling, each resolved and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

SAMPLING_VERSION = 1
"""Raised whenever a change of the code changes samples."""

Solver = Literal["heun", "euler", "dpm", "ancestral", "onestep", "progdist", "multistep"]
TrainingMode = Literal["edm", "consistency_distillation", "consistency_training", "progdist"]
Generator = Literal["philox", "determ", "determ-indiv", "dummy"]
Precision = Literal["fp32", "fp16", "bf16"]
Rounding = Literal["truncate", "nearest"]
FragmentFormat = Literal["parquet", "npz"]
Compile = Literal["auto", "on", "off"]
Progress = Literal["auto", "bar", "log", "none"]

GENERATORS_OF_N = ("determ", "determ-indiv", "dummy")
"""Generators whose noise depends on num_samples."""

CHANNEL_MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
"""What an empty channel_mult means, by image size."""


class RequestError(ValueError):
    """The request is wrong: one sentence that names the setting, its value and what would be right."""


class RunError(RuntimeError):
    """The run failed or is incomplete: one sentence that says why and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `RequestError` with `message` unless `condition` holds."""
    if not condition:
        raise RequestError(message)


@dataclass(frozen=True)
class Architecture:
    """The shape of a UNet. The defaults are the original's."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "32,16,8"
    channel_mult: str = ""
    class_cond: bool = False
    num_classes: int = 1000
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    learn_sigma: bool = False
    dropout: float = 0.0

    in_channels = 3

    @property
    def out_channels(self) -> int:
        return 6 if self.learn_sigma else 3

    @property
    def embedding_channels(self) -> int:
        return 4 * self.num_channels

    @property
    def channel_multipliers(self) -> tuple[float, ...]:
        if not self.channel_mult:
            return CHANNEL_MULTIPLIERS[self.image_size]
        return tuple(float(m) for m in self.channel_mult.split(","))

    @property
    def attention_factors(self) -> tuple[int, ...]:
        """Downsampling factors at which attention sits."""
        return tuple(self.image_size // int(r) for r in self.attention_resolutions.split(",") if r)

    def attends_at(self, level: int) -> bool:
        return 2**level in self.attention_factors

    @property
    def heads_upsample(self) -> int:
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    def heads_at(self, channels: int, num_heads: int) -> int:
        """Attention heads of a block with so many channels, where `num_heads` is asked for."""
        return num_heads if self.num_head_channels == -1 else channels // self.num_head_channels

    def validate(self) -> None:
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, f"--{name} is {value}; it must be -1 or at least 1")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        if not self.channel_mult:
            require(
                self.image_size in CHANNEL_MULTIPLIERS,
                f"--channel_mult is needed for --image_size {self.image_size}; "
                f"only {', '.join(map(str, sorted(CHANNEL_MULTIPLIERS)))} have one by default",
            )
        for name, kind in (("channel_mult", float), ("attention_resolutions", int)):
            text = getattr(self, name)
            try:
                positive = all(0 < kind(part) < math.inf for part in text.split(",") if text)
            except ValueError:
                positive = False
            require(positive, f"--{name} is {text!r}; it must be positive numbers with commas, as in 1,2,2")
        multipliers = self.channel_multipliers
        factor = 2 ** (len(multipliers) - 1)
        require(
            self.image_size % factor == 0,
            f"--image_size is {self.image_size}; with {len(multipliers)} channel multipliers it must be a "
            f"multiple of {factor}",
        )
        for level, multiplier in enumerate(multipliers):
            channels = int(multiplier * self.num_channels)
            require(
                channels > 0 and channels % 32 == 0,
                f"--num_channels {self.num_channels} with --channel_mult {multiplier:g} gives {channels} "
                "channels; they must be a multiple of 32, the groups of each normalisation",
            )
            if self.attends_at(level) or level == len(multipliers) - 1:
                for flag, asked in (("num_heads", self.num_heads), ("num_heads_upsample", self.heads_upsample)):
                    heads = self.heads_at(channels, asked)
                    whole = heads > 0 and channels % heads == 0
                    require(
                        whole and self.num_head_channels in (-1, channels // heads),
                        f"{channels} channels cannot be split into attention heads with --{flag} "
                        f"{asked} and --num_head_channels {self.num_head_channels}; "
                        "the channels must be a multiple of the head size",
                    )

    def effective(self) -> dict[str, Any]:
        """What decides the network's function, by effective value."""
        result: dict[str, Any] = {
            "image_size": self.image_size,
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": ",".join(f"{m:g}" for m in self.channel_multipliers),
            "attention_resolutions": ",".join(
                str(self.image_size // 2**level)
                for level in range(len(self.channel_multipliers))
                if self.attends_at(level)
            ),
            "class_cond": self.class_cond,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resblock_updown,
            "learn_sigma": self.learn_sigma,
        }
        if self.num_head_channels == -1:
            result |= {"num_heads": self.num_heads, "num_heads_upsample": self.heads_upsample}
        else:
            result |= {"num_head_channels": self.num_head_channels}
        if self.class_cond:
            result |= {"num_classes": self.num_classes}
        return result


@dataclass(frozen=True)
class Sampling:
    """How a sample comes from a network and noise. The defaults are the original's, philox apart."""

    training_mode: TrainingMode = "edm"
    sampler: Solver = "heun"
    steps: int = 40
    ts: tuple[int, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    clip_denoised: bool = True
    rounding: Rounding = "truncate"
    generator: Generator = "philox"
    seed: int = 42

    @property
    def consistency(self) -> bool:
        """Whether the consistency models' preconditioning applies."""
        return "consistency" in self.training_mode

    def validate(self) -> None:
        require(self.steps >= 1, f"--steps is {self.steps}; it must be at least 1")
        require(
            0 < self.sigma_min < self.sigma_max < math.inf,
            f"--sigma_min is {self.sigma_min:g} and --sigma_max {self.sigma_max:g}; "
            "they must satisfy 0 < sigma_min < sigma_max",
        )
        for name in ("s_churn", "s_tmin", "s_noise"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name} is {value:g}; it must be a finite number of at least 0")
        require(self.s_tmax >= self.s_tmin, f"--s_tmax is {self.s_tmax:g}; it must be at least s_tmin, {self.s_tmin:g}")
        require(0 <= self.seed < 2**64, f"--seed is {self.seed}; it must be in [0, 2^64)")
        if self.sampler == "multistep":
            require(self.steps >= 2, f"--steps is {self.steps}; --sampler multistep needs at least 2")
            require(
                len(self.ts) >= 2,
                f"--ts is {','.join(map(str, self.ts))!r}; --sampler multistep needs two or more, as in 0,22,39",
            )
            for t in self.ts:
                require(
                    0 <= t < self.steps,
                    f"--ts has {t}; with --steps {self.steps} its indices must be from 0 to {self.steps - 1}",
                )

    def effective(self, num_samples: int) -> dict[str, Any]:
        """What decides a sample, by effective value: settings that the solver does not use are left out."""
        result: dict[str, Any] = {
            "preconditioning": "consistency" if self.consistency else "edm",
            "sampler": self.sampler,
            "sigma_max": float(self.sigma_max),
            "clip_denoised": self.clip_denoised,
            "rounding": self.rounding,
            "generator": self.generator,
            "seed": self.seed,
        }
        if self.sampler != "onestep" or self.consistency:
            result["sigma_min"] = float(self.sigma_min)
        if self.sampler != "onestep":
            result["steps"] = self.steps
        if self.sampler == "multistep":
            result["ts"] = ",".join(map(str, self.ts))
        if self.sampler in ("heun", "dpm"):
            result["s_churn"] = float(self.s_churn)
            if self.s_churn > 0:
                result |= {
                    "s_tmin": float(self.s_tmin),
                    "s_tmax": str(float(self.s_tmax)),
                    "s_noise": float(self.s_noise),
                }
        if self.generator in GENERATORS_OF_N:
            result["num_samples"] = num_samples
        return result
