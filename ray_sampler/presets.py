"""Which network a request means, and the settings that its name brings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Protocol

from ray_sampler.errors import RequestError, redact, require
from ray_sampler.options import option
from ray_sampler.published import BUNDLED, PRESETS, Preset

__all__ = ["BUNDLED", "PRESETS", "ModelOptions", "Preset", "model_of"]

DEFAULT_MODEL = "digits"
UNTOLD = ("image_size", "num_head_channels", "training_mode", "prediction", "data_at", "num_heads")
"""Flags that the weights of a bundled network do not determine."""
OBJECT = "object:"
"""Begins the name of a model that was given as an object."""
OWN = re.compile(r"(?!python:)([a-zA-Z_][\w./]*):([a-zA-Z_]\w*)")
"""A user's function without the prefix `python:`."""


class OwnModel(Protocol):
    """A `ray_sampler.Model`, as Python may give it or a function that returns it in place of a name."""

    network: Any
    kind: Any
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which network."""

    model: str | Callable[[str | None], Any] | OwnModel | None = option(
        None,
        "A bundled model (digits, digits-latent, digits-v1, digits-cd), the path or URL of a checkpoint, or "
        "python:module:function, a network of your own (default: digits).",
        common=True,
    )
    model_path: str = option("", "The same as --model.")
    weights_key: str | None = option(
        None,
        "Where in the checkpoint the weights are, such as ema or state_dict (default: found automatically).",
        recorded=False,
    )
    weights: str | None = option(
        None, "Checkpoint passed to the function of --model python:module:function.", recorded=False, common=True
    )
    tag: str | None = option(
        None, "Text added to the fingerprint of --model python:module:function, such as a version.", recorded=False
    )
    preset: str | None = option(
        None,
        "A published checkpoint: its architecture, solver and guidance, and without --model its weights too; see "
        "`ray-sampler presets`. Explicit flags win.",
        common=True,
    )


def model_name(model: Any) -> str:
    """A model as text: what was given, or of a function, a class or a Model its qualified name."""
    if isinstance(model, str):
        return model
    named = model if hasattr(model, "__qualname__") else type(getattr(model, "network", model))
    return f"{OBJECT}{named.__qualname__}"


def model_of(options: ModelOptions) -> tuple[Any, dict[str, Any]]:
    """The weights of a request, as a bundled name, a URL or an object, and what its model and preset bring.

    Raises:
        RequestError: two models, or an unknown name.
    """
    require(
        not (options.model and options.model_path and options.model != options.model_path),
        f"--model {redact(model_name(options.model))} and --model_path {redact(options.model_path)} name two models; "
        "give one of the two",
    )
    weights = options.model or options.model_path
    preset = None
    if options.preset is not None:
        require(
            options.preset not in BUNDLED,
            f"--preset is {options.preset!r}, a bundled model; give --model {options.preset}",
        )
        require(
            options.preset in PRESETS,
            f"unknown --preset {options.preset!r}; "
            f"{_closest(options.preset, PRESETS) or '`ray-sampler presets` lists them'}",
        )
        preset = PRESETS[options.preset]
        require(
            not isinstance(weights, str) or weights not in BUNDLED,
            f"--preset is {options.preset!r} beside --model {weights}, a bundled model that brings its own settings; "
            "give one of the two",
        )
        require(
            bool(weights or preset.file),
            f"--preset is {options.preset!r}, whose weights are at no plain address; give --model FILE beside it",
        )
        weights = weights or preset.url
    weights = weights or DEFAULT_MODEL
    if not isinstance(weights, str):
        return weights, dict(preset.settings) if preset else {}
    if (own := OWN.fullmatch(weights)) and not os.path.exists(weights):
        module = own[1].removesuffix(".py").replace("/", ".")
        raise RequestError(f"--model is {weights!r}; for a function of your own give python:{module}:{own[2]}")
    bundled = BUNDLED.get(weights)
    bare = PurePosixPath(weights).name == weights and not PurePosixPath(weights).suffix and ":" not in weights
    if bundled is None and bare and not os.path.exists(weights):
        require(
            weights not in PRESETS,
            f"--model is {weights!r}, a preset; give --preset {weights}",
        )
        hint = _closest(weights, BUNDLED) or f"the bundled models are {', '.join(BUNDLED)}"
        raise RequestError(f"--model is {weights!r}, which is neither a file nor a bundled model; {hint}")
    return weights, dict(bundled.settings if bundled else preset.settings if preset else {})


def check_bundled(model: str, given: Mapping[str, Any]) -> None:
    """Check the flags of a bundled network, which its name determines completely.

    Raises:
        RequestError: a flag contradicts the name.
    """
    own: Mapping[str, Any] = BUNDLED[model].settings if model in BUNDLED else {}
    for name in UNTOLD:
        value = given.get(name)
        same = [each if name != "training_mode" else "consistency" in str(each) for each in (value, own.get(name))]
        require(
            name not in own or value is None or same[0] == same[1],
            f"--{name} is {value}, but the bundled model {model} has {own.get(name)}; leave it out, or give another "
            "--model",
        )


def _closest(name: str, names: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(names), cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else None
