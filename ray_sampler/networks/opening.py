"""The door to networks: a model's name becomes an opened network of the family that recognises it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from importlib.resources import as_file, files
from typing import Any

from ray_sampler.errors import RequestError, redact, require
from ray_sampler.networks.adm import ADM
from ray_sampler.networks.choose import listed
from ray_sampler.networks.custom import open_custom
from ray_sampler.networks.decoders import DIGITS_DECODER
from ray_sampler.networks.dit import DIT
from ray_sampler.networks.edm_family import EDM, EDM2
from ray_sampler.networks.family import PREFIX, Family, Network, without_memory
from ray_sampler.networks.weights import Checkpoint, read_checkpoint, weights_hash

FAMILIES: dict[str, Family] = {family.name: family for family in (ADM, EDM, EDM2, DIT, DIGITS_DECODER)}
"""By name, in the order in which they are asked; another family is one name more here."""

BUNDLED_FILES = ("digits", "digits-latent", "digits-decoder", "digits-v1", "digits-cd")
"""Networks whose weights are in the package: the names of their files in networks/digits, without suffix."""

NAMED = 3
"""How many tensors an error names."""


def open_network(
    model: Any, settings: Mapping[str, Any], given: frozenset[str] = frozenset(), flag: str = "--model"
) -> Network:
    """Read a model's weights, once, and find out what they are.

    Args:
        model: a bundled model's name, a path or URL, python:module:function, a function or a Model.
        settings: by flag name, of the user, a preset and a bundled model.
        given: names of the settings that the user gave.
        flag: that named the model, for messages.

    Raises:
        RequestError: there is no such file, it is not a checkpoint of a known family, or the settings contradict it.
    """
    try:
        return _open(model, settings, given, flag)
    except RequestError as error:
        named, said = str(error).startswith("--model "), str(error)
        raise RequestError(flag + said.removeprefix("--model") if named else said) from error


def _open(model: Any, settings: Mapping[str, Any], given: frozenset[str], flag: str) -> Network:
    """As `open_network`; what is wrong is said of --model."""
    check_passed(model, settings, given, flag)
    if not isinstance(model, str) or model.startswith(PREFIX):
        return open_custom(model, settings, given)
    checkpoint = read(model, settings.get("weights_key"), flag)
    family = family_of(checkpoint)
    opened = family.open(checkpoint, settings, given)
    return Network(
        spec=opened.spec,
        build=partial(built, family, opened.spec),
        prepare=family.prepare,
        as_stored=family.as_stored,
        tensors=opened.tensors,
        weights=weights_hash(opened.tensors),
        parameters=sum(t.numel() for t in opened.tensors.values()) if opened.parameters is None else opened.parameters,
        key=checkpoint.key,
        note="; ".join(note for note in (checkpoint.note, opened.note) if note) or None,
        sha256=checkpoint.sha256,
        untold=opened.untold,
    )


def check_passed(model: Any, settings: Mapping[str, Any], given: frozenset[str], flag: str) -> None:
    """Check the argument of a user's function, and the tag that identifies it in the fingerprint.

    Raises:
        RequestError: the model is not such a function, or there is no such file.
    """
    weights = settings.get("weights")
    passed = {
        "weights" if flag == "--model" else "guide_weights": weights,
        "tag": settings["tag"] if "tag" in given else None,
    }
    for name, value in passed.items():
        require(
            value is None or (model.startswith(PREFIX) if isinstance(model, str) else name == "tag" or callable(model)),
            f"--{name} is {redact(value)}, which only a function, {flag} python:module:function, can use; leave it out",
        )
    require(
        weights is None or "://" in weights or os.path.exists(os.path.expanduser(weights)),
        f"--{next(iter(passed))} is {weights}; there is no such file",
    )


def built(family: Family, spec: Any, precision: Any) -> Any:
    return without_memory(lambda: family.build(spec, precision))


def read(model: str, key: str | None, flag: str) -> Checkpoint:
    """The checkpoint of a bundled model's name, or of a path or URL."""
    if model not in BUNDLED_FILES:
        return read_checkpoint(model, key, flag)
    require(
        key is None, f"--weights_key is {key!r}, but the bundled model {model} has one set of weights; leave it out"
    )
    with as_file(files("ray_sampler.networks") / "digits" / f"{model}.safetensors") as path:
        return read_checkpoint(str(path), None, flag)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint.

    Raises:
        RequestError: it is of none.
    """
    for family in FAMILIES.values():
        if family.recognises(checkpoint):
            return family
    if checkpoint.saved:
        saved = checkpoint.saved[checkpoint.key]
        kind = ascii(saved.arguments.get("model_type") or saved.class_name)[:60]
        raise RequestError(
            f"--model is {checkpoint.shown}; under {listed(checkpoint.key)} it has a network of class {kind}, which is "
            "neither of NVlabs/edm nor of NVlabs/edm2; for a network of your own give --model python:module:function"
        )
    names = list(checkpoint.tensors)
    raise RequestError(
        f"--model is {checkpoint.shown}; its tensors ({', '.join(names[:NAMED])}, ...) are of none of the families "
        f"{', '.join(FAMILIES)}; for a network of your own give --model python:module:function"
    )
