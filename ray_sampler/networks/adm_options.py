"""The ADM family: the UNet of EDM and consistency-models checkpoints, by its flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ray_sampler.errors import require
from ray_sampler.options import option

CHANNEL_MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
"""What an empty channel_mult means, by image size."""

LARGEST = 10**6
"""What the numbers of a list stay below."""

HEAD_CHANNELS = 64
"""Of an attention head in the published networks."""


@dataclass(frozen=True, kw_only=True)
class AdmFlags:
    """The shape of an ADM UNet, as flags. The defaults are those of the consistency-models repository."""

    image_size: int = option(64, "Height and width in pixels.")
    num_channels: int = option(128, "Base width of the network.")
    num_res_blocks: int = option(2, "Residual blocks at each level.")
    num_heads: int = option(4, "Attention heads, if --num-head-channels is -1.")
    num_heads_upsample: int = option(-1, "Attention heads on the way up; -1 means --num-heads.")
    num_head_channels: int = option(-1, "Channels per attention head; -1 divides by --num-heads.")
    attention_resolutions: str = option("32,16,8", "Resolutions that have attention.", numbers=True)
    channel_mult: str = option(
        "", "Width multiplier of each level, such as 1,2,3,4 (default: by image size).", numbers=True
    )
    class_cond: bool = option(False, "The model is class-conditional.")
    num_classes: int = option(1000, "Number of classes.")
    label_dropout: float = option(
        0.0,
        "Share of labels dropped in training; above 0, the last row of label_emb is the null label.",
        recorded=False,
    )
    use_scale_shift_norm: bool = option(True, "The embedding scales and shifts the normalised features (FiLM).")
    resblock_updown: bool = option(False, "Residual blocks change the resolution.")
    learn_sigma: bool = option(False, "The network has variance channels, which are ignored.")
    dropout: float = option(0.0, "Dropout in training.", inert=True)

    family_defaults: ClassVar[Mapping[str, Any]] = {"clip_denoised": True, "rounding": "truncate", "state": "fp32"}
    """What the family brings of other components' settings."""

    def check(self) -> None:
        """Check each value by itself.

        Raises:
            RequestError: one is wrong whatever the others are.
        """
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, f"--{name} is {value}; it must be -1 or at least 1")
        for name in ("dropout", "label_dropout"):
            require(0 <= getattr(self, name) < 1, f"--{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name, kind in (("channel_mult", float), ("attention_resolutions", int)):
            text = getattr(self, name)
            try:
                positive = all(0 < kind(part) < LARGEST for part in text.split(",") if text)
            except ValueError:
                positive = False
            require(positive, f"--{name} is {text!r}; it must be positive numbers with commas, like 1,2,2")


@dataclass(frozen=True, kw_only=True)
class AdmOptions(AdmFlags):
    """The shape of an ADM UNet."""

    in_channels: int = 3
    """Of x; inferred from the weights."""

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def num_labels(self) -> int:
        """Rows of label_emb: the classes, and the null label where there is one."""
        return self.num_classes + (1 if self.label_dropout else 0)

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
        """Attention heads of a block with these channels, where `num_heads` is asked for."""
        return num_heads if self.num_head_channels == -1 else channels // self.num_head_channels

    def validate(self) -> None:
        self.check()
        if not self.channel_mult:
            require(
                self.image_size in CHANNEL_MULTIPLIERS,
                f"--channel_mult is needed for --image_size {self.image_size}; "
                f"only {', '.join(map(str, sorted(CHANNEL_MULTIPLIERS)))} have one by default",
            )
        self.check_image_size()
        for multiplier in self.channel_multipliers:
            channels = int(multiplier * self.num_channels)
            require(
                channels > 0 and channels % 32 == 0,
                f"--num_channels {self.num_channels} with --channel_mult {multiplier:g} gives {channels} "
                "channels; they must be a multiple of 32, the groups of each normalisation",
            )
        self.check_heads()

    def check_image_size(self) -> None:
        """Raises RequestError: the picture cannot be halved at each level."""
        levels = len(self.channel_multipliers)
        require(
            self.image_size % 2 ** (levels - 1) == 0,
            f"--image_size is {self.image_size}; with {levels} channel multipliers it must be a "
            f"multiple of {2 ** (levels - 1)}",
        )

    def check_heads(self) -> None:
        """Raises RequestError: channels that attention has cannot be split into heads of one size."""
        channels = [int(multiplier * self.num_channels) for multiplier in self.channel_multipliers]
        widths = sorted({channels[-1], *(c for level, c in enumerate(channels) if self.attends_at(level))})
        shared = math.gcd(*widths)
        asked = {"num_heads": self.num_heads, "num_heads_upsample": self.heads_upsample}
        if self.num_head_channels != -1:
            asked = {"num_head_channels": self.num_head_channels}
        for name, value in asked.items():
            fits = math.gcd(shared, HEAD_CHANNELS if name == "num_head_channels" else value)
            require(
                shared % value == 0,
                f"--{name} is {value}; it must divide the channels that attention has, "
                f"{' and '.join(map(str, widths))}, such as {fits}",
            )

    def identity(self) -> dict[str, Any]:
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
        if self.in_channels != 3:
            result |= {"in_channels": self.in_channels}
        return result


TrainingMode = Literal["edm", "consistency_distillation", "consistency_training", "progdist"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a checkpoint was trained: flags of published command lines, of which only the mode changes samples."""

    training_mode: TrainingMode = option(
        "edm", "How the model was trained: the consistency modes have their own preconditioning."
    )
    use_checkpoint: bool = option(False, "Gradient checkpointing in training.", inert=True)
    use_new_attention_order: bool = option(
        False, "Without effect in the original too: its attention has one order of channels.", inert=True
    )
    weight_schedule: str = option("karras", "Weighting of the training loss.", inert=True)
