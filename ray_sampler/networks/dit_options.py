"""Flags of the family `dit`: settings that the weights of a transformer do not determine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ray_sampler.errors import require
from ray_sampler.options import option

Prediction = Literal["eps", "velocity"]


@dataclass(frozen=True, kw_only=True)
class DitFlags:
    """What a transformer was trained to predict."""

    prediction: Prediction | None = option(
        None,
        "What a transformer predicts: eps (DiT) or velocity (SiT, REPA). A file with REPA's projectors needs no flag.",
        recorded=False,
    )
    data_at: int | None = option(
        None, "The t that holds data for --prediction velocity: 1 as in SiT, 0 as in REPA.", recorded=False
    )

    shared: ClassVar[tuple[str, ...]] = ("image_size", "num_heads", "class_cond", "num_classes", "learn_sigma")
    """Flags of other families that may be given for this one too."""

    family_defaults: ClassVar[Mapping[str, Any]] = {"clip_denoised": False, "state": "fp64"}
    """What the family brings of other components' settings; the rounding is by what was published of each kind."""

    def check(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(self.data_at in (None, 0, 1), f"--data_at is {self.data_at}; it must be the t that holds data, 0 or 1")
