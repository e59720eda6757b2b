"""Named models: settings for published checkpoints, and the models that come with the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from ray_sampler.errors import RequestError, redact, require
from ray_sampler.options import option

PUBLISHED_AT = "https://openaipublic.blob.core.windows.net/consistency/"
DEFAULT_MODEL = "digits"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which network."""

    model: str | None = option(
        None,
        "Weights: a bundled model's name (digits, digits-cd), which brings its settings, or a checkpoint: a local path "
        "or any fsspec URL. Without one the bundled digits model runs.",
    )
    model_path: str = option("", "The same as --model.")
    preset: str | None = option(
        None,
        "Settings alone, for weights that you have: architecture, preconditioning, solver and ts. Explicit flags win. "
        "`ray-sampler presets` lists them.",
    )


@dataclass(frozen=True)
class Preset:
    """Settings for a published checkpoint, which the user has."""

    description: str
    file: str
    """Its name where it was published."""
    parameters: int
    settings: Mapping[str, Any]
    """By flag name."""

    @property
    def url(self) -> str:
        return PUBLISHED_AT + self.file

    @property
    def class_cond(self) -> bool:
        return bool(self.settings["class_cond"])


@dataclass(frozen=True)
class Bundled:
    """A model whose weights are in the package."""

    description: str
    file: str
    """In the package's folder models/digits."""
    parameters: int
    settings: Mapping[str, Any]
    """By flag name."""


IMAGENET64 = {
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "class_cond": True,
    "num_classes": 1000,
}
LSUN256 = {
    "image_size": 256,
    "num_channels": 256,
    "num_res_blocks": 2,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "resblock_updown": True,
    "use_scale_shift_norm": False,
    "class_cond": False,
}
DIGITS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1,2,2",
    "attention_resolutions": "8",
    "num_head_channels": 32,
    "resblock_updown": True,
    "use_scale_shift_norm": True,
    "class_cond": True,
    "num_classes": 10,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}

EDM = {"training_mode": "edm", "sampler": "heun", "steps": 40}
CD = {"training_mode": "consistency_distillation"}
CT = {"training_mode": "consistency_training"}
ONE_STEP = {"sampler": "onestep", "steps": 40}

IMAGENET64_PARAMETERS = 295_899_267
LSUN256_PARAMETERS = 526_304_771
DIGITS_PARAMETERS = 1_372_387


def _multistep(ts: str, steps: int = 40) -> dict[str, Any]:
    return {"sampler": "multistep", "steps": steps, "ts": ts}


def _imagenet64(description: str, file: str, settings: Mapping[str, Any]) -> Preset:
    return Preset(f"{description}, ImageNet 64x64", file, IMAGENET64_PARAMETERS, {**IMAGENET64, **settings})


def _lsun256(description: str, category: str, file: str, settings: Mapping[str, Any]) -> Preset:
    return Preset(f"{description}, LSUN {category} 256x256", file, LSUN256_PARAMETERS, {**LSUN256, **settings})


PRESETS: dict[str, Preset] = {
    "edm-imagenet64": _imagenet64("EDM", "edm_imagenet64_ema.pt", EDM),
    "cd-imagenet64-l2": _imagenet64(
        "consistency distillation (l2)", "cd_imagenet64_l2.pt", {**CD, **_multistep("0,22,39")}
    ),
    "cd-imagenet64-lpips": _imagenet64(
        "consistency distillation (LPIPS)", "cd_imagenet64_lpips.pt", {**CD, **_multistep("0,22,39")}
    ),
    "ct-imagenet64": _imagenet64("consistency training", "ct_imagenet64.pt", {**CT, **_multistep("0,106,200", 201)}),
    "edm-bedroom256": _lsun256("EDM", "Bedroom", "edm_bedroom256_ema.pt", EDM),
    "cd-bedroom256-l2": _lsun256(
        "consistency distillation (l2)", "Bedroom", "cd_bedroom256_l2.pt", {**CD, **_multistep("0,18,39")}
    ),
    "cd-bedroom256-lpips": _lsun256(
        "consistency distillation (LPIPS)", "Bedroom", "cd_bedroom256_lpips.pt", {**CD, **_multistep("0,17,39")}
    ),
    "ct-bedroom256": _lsun256(
        "consistency training", "Bedroom", "ct_bedroom256.pt", {**CT, **_multistep("0,67,150", 151)}
    ),
    "edm-cat256": _lsun256("EDM", "Cat", "edm_cat256_ema.pt", EDM),
    "cd-cat256-l2": _lsun256("consistency distillation (l2)", "Cat", "cd_cat256_l2.pt", {**CD, **ONE_STEP}),
    "cd-cat256-lpips": _lsun256("consistency distillation (LPIPS)", "Cat", "cd_cat256_lpips.pt", {**CD, **ONE_STEP}),
    "ct-cat256": _lsun256("consistency training", "Cat", "ct_cat256.pt", {**CT, **_multistep("0,62,150", 151)}),
}
"""Two steps where indices for them were published, else one."""

BUNDLED: dict[str, Bundled] = {
    "digits": Bundled(
        "EDM, handwritten digits 32x32",
        "digits.safetensors",
        DIGITS_PARAMETERS,
        {**DIGITS, "training_mode": "edm", "sampler": "heun", "steps": 18},
    ),
    "digits-cd": Bundled(
        "consistency distillation of digits, handwritten digits 32x32",
        "digits-cd.safetensors",
        DIGITS_PARAMETERS,
        {**DIGITS, **CD, "sampler": "onestep", "steps": 18, "ts": "0,9,17"},
    ),
}
"""ts serves where the user asks for --sampler multistep."""


def settings_for(options: ModelOptions) -> tuple[str, dict[str, Any]]:
    """The weights of a request, as a bundled name or URL, and the settings that its model and preset bring.

    Raises:
        RequestError: two models, an unknown name, or a preset without weights.
    """
    require(
        not (options.model and options.model_path and options.model != options.model_path),
        f"--model {redact(options.model)} and --model_path {redact(options.model_path)} name two models; "
        "give one of the two",
    )
    weights = options.model or options.model_path
    preset = None
    if options.preset is not None:
        if options.preset not in PRESETS:
            raise RequestError(f"--preset is {options.preset!r}; {_known(options.preset, PRESETS)}")
        preset = PRESETS[options.preset]
        require(
            bool(weights),
            f"--preset {options.preset} brings settings but no weights; "
            f"add --model_path FILE, the checkpoint published as {preset.file}",
        )
    weights = weights or DEFAULT_MODEL
    bundled = BUNDLED.get(weights)
    if bundled is None and PurePosixPath(weights).name == weights and not PurePosixPath(weights).suffix:
        require(
            weights not in PRESETS,
            f"--model is {weights!r}, a preset; give --preset {weights} --model_path FILE",
        )
        raise RequestError(
            f"--model is {weights!r}; {_known(weights, BUNDLED)} (a file's name ends in .pt, .pth or .safetensors)"
        )
    return weights, {**(bundled.settings if bundled else {}), **(preset.settings if preset else {})}


def _known(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), cutoff=0.5)
    return f"the closest is {' or '.join(close)}" if close else f"it must be one of {', '.join(names)}"
