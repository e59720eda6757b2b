"""The options that families of networks have, and what they say without a file. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ray_sampler.errors import require
from ray_sampler.networks.adm_options import AdmFlags, TrainingOptions
from ray_sampler.options import flags_of, option

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


BROUGHT = ("clip_denoised", "rounding", "state", "steps", "sigma_min", "sigma_max")
"""Settings of other components whose defaults a file or its family decides."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureOptions(AdmFlags, TrainingOptions, DitFlags):
    """The options of every family; a family with more options is one more base here."""


INERT = tuple(name for name, flag in flags_of(TrainingOptions).items() if flag.inert)
"""Options of published command lines that change no sample, whatever the network."""

ARCHITECTURE = tuple(name for name in flags_of(ArchitectureOptions) if name not in INERT)
"""Options that describe a network: None in a resolved run where they do not apply to its family."""


OWN_DEFAULTS = {"clip_denoised": False, "rounding": "truncate", "state": "fp32"}
"""What a user's network brings of other components' settings, whatever it is."""


def told_by_flags(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of the network that `settings` describe, by flag name; None for those that only a file determines.

    Settings that name options of a family describe a network of that family. Of a user's network all is known but its
    architecture and its range of levels.
    """
    if str(settings.get("model")).startswith("python:"):
        return dict.fromkeys((*ARCHITECTURE, "sigma_min", "sigma_max")) | OWN_DEFAULTS
    open_ = dict.fromkeys((*ARCHITECTURE, *BROUGHT))
    if settings.keys() & flags_of(DitFlags).keys():  # which say nothing of its shape
        return {**open_, **DitFlags.family_defaults}
    for component in ArchitectureOptions.__bases__:
        own = flags_of(component).keys() - {*INERT, *DitFlags.shared}
        if settings.keys() & own and hasattr(component, "family_defaults"):
            return {name: flag.default for name, flag in flags_of(ArchitectureOptions).items()} | dict(
                component.family_defaults
            )
    return open_
