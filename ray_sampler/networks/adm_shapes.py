"""The architecture of an ADM network, from the names and shapes of its state dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ray_sampler.networks.adm_options import CHANNEL_MULTIPLIERS

HEAD_CHANNELS = 64
"""Of a head in the published networks."""

PLAIN = ("num_channels", "num_res_blocks", "use_scale_shift_norm", "resblock_updown", "learn_sigma", "class_cond")
"""Flags whose values are compared as they are."""

Shapes = Mapping[str, tuple[int, ...]]


def adm_flags(tensors: Mapping[str, Tensor], null_label: bool = False) -> dict[str, Any] | None:
    """The settings that follow from the state dict of an ADM network, by flag name; None for another kind of network.

    Args:
        tensors: the state dict.
        null_label: whether the last row of label_emb is not a class.

    Returns:
        num_channels, channel_mult, num_res_blocks, resblock_updown (where there is more than one level),
        use_scale_shift_norm, class_cond, num_classes (if class_cond), learn_sigma, in_channels, out_channels;
        attention_factors, a tuple of the downsampling factors at which attention sits; and attention_channels, the
        widths that are split into heads.
        image_size and the number of heads leave no trace in the weights.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        return _flags(shapes, null_label)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):  # a name or a dimension that an ADM network has
        return None


def _flags(shapes: Shapes, null_label: bool) -> dict[str, Any]:
    width = shapes["time_embed.0.weight"][1]
    first, in_channels = shapes["input_blocks.0.0.weight"][:2]
    out_channels = shapes["out.2.weight"][0]
    blocks = _blocks(shapes, "input_blocks")
    ups = _resampling(shapes, "output_blocks")
    levels = len(ups) + 1
    if blocks != _blocks(shapes, "output_blocks") or blocks % levels or shapes["middle_block.1.qkv.weight"][1] < 1:
        raise ValueError("input and output have the same blocks, as many on each level")
    res_blocks = blocks // levels - 1
    each = range(0, blocks, res_blocks + 1)  # each level ends with its resampling block, or the input
    channels = [shapes[f"input_blocks.{start + 1}.0.in_layers.2.weight"][0] for start in each]
    attends = [f"input_blocks.{start + 1}.1.qkv.weight" in shapes for start in each]
    embedding = shapes["middle_block.0.emb_layers.1.weight"][0]
    flags: dict[str, Any] = {
        "num_channels": width,
        "channel_mult": ",".join(_multiplier(c, width) for c in channels),
        "num_res_blocks": res_blocks,
        "use_scale_shift_norm": embedding == 2 * channels[-1],
        "class_cond": "label_emb.weight" in shapes,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "learn_sigma": out_channels == 2 * in_channels,
        "attention_factors": tuple(2**level for level, there in enumerate(attends) if there),
        "attention_channels": tuple(sorted({channels[-1], *(c for c, a in zip(channels, attends, strict=True) if a)})),
    }
    if ups:
        flags["resblock_updown"] = ups[0]
    if flags["class_cond"]:
        flags["num_classes"] = shapes["label_emb.weight"][0] - null_label
    if first != channels[0] or res_blocks < 1:
        raise ValueError("the input convolution is as wide as the first level")
    return flags


def _blocks(shapes: Shapes, part: str) -> int:
    """How many blocks the input or output has."""
    return 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith(f"{part}."))


def _resampling(shapes: Shapes, part: str) -> list[bool]:
    """For each upsampling layer of the output, whether it is a residual block. It comes last in its block."""
    ups = []
    for block in range(_blocks(shapes, part)):
        for place in (1, 2):
            if f"{part}.{block}.{place}.in_layers.2.weight" in shapes:
                ups.append(True)
            elif f"{part}.{block}.{place}.conv.weight" in shapes:
                ups.append(False)
    return ups


def _multiplier(channels: int, width: int) -> str:
    """The shortest text that gives these numbers of channels, which are rounded down."""
    ratio = channels / width
    for text in (f"{ratio:g}", repr(ratio), repr(math.nextafter(ratio, math.inf))):
        if int(float(text) * width) == channels:
            return text
    raise ValueError("no multiplier")


def explain_misfit(tensors: Mapping[str, Tensor], flags: Mapping[str, Any]) -> str:
    """The sentence that lists each flag which contradicts an ADM state dict, with the file's value; "" if none does.

    Args:
        tensors: a state dict.
        flags: values by flag name, as of an `AdmOptions`; a flag that is not in it contradicts nothing.
    """
    told = adm_flags(tensors, null_label=bool(flags.get("label_dropout")))
    if told is None:
        return ""
    size = flags.get("image_size")
    wrong: list[tuple[str, Any, Any]] = [
        (name, told[name], flags[name])
        for name in (
            "num_channels",
            "num_res_blocks",
            "use_scale_shift_norm",
            "resblock_updown",
            "learn_sigma",
            "class_cond",
        )
        if name in told and name in flags and flags[name] != told[name]
    ]
    if told["class_cond"] and flags.get("num_classes", told["num_classes"]) != told["num_classes"]:
        wrong.append(("num_classes", told["num_classes"], flags["num_classes"]))
    wrong += _multipliers(told, flags)
    largest = 2 ** told["channel_mult"].count(",")
    said = [f"--{name} {value} (not {'empty' if given == '' else given})" for name, value, given in wrong]
    if size and size % largest:
        said.append(f"--image_size of a multiple of {largest} (not {size})")
    else:
        said += _attention(told, flags)
    said += _heads(told, flags)
    return f"the weights need {_listed(said)}" if said else ""


def _multipliers(told: Mapping[str, Any], flags: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """channel_mult, if it gives other widths with the file's num_channels."""
    given, width = flags.get("channel_mult"), told["num_channels"]
    if given is None:
        return []
    asked = [float(m) for m in given.split(",")] if given else CHANNEL_MULTIPLIERS.get(flags.get("image_size", 0), ())
    wanted = [int(float(m) * width) for m in told["channel_mult"].split(",")]
    return [] if [int(m * width) for m in asked] == wanted else [("channel_mult", told["channel_mult"], given)]


def _attention(told: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    given, size, factors = flags.get("attention_resolutions"), flags.get("image_size"), told["attention_factors"]
    if given is None:
        return []
    levels = [2**level for level in range(told["channel_mult"].count(",") + 1)]
    if size is None:
        parts = ",".join(f"image_size/{factor}" for factor in factors)
        return [f"--attention_resolutions of {parts or 'none'}"] if factors else []
    asked = {size // int(resolution) for resolution in given.split(",") if resolution}
    if tuple(level for level in levels if level in asked) == factors:
        return []
    # A resolution above the picture's is at no level.
    wanted = ",".join(str(size // factor) for factor in factors) or str(2 * size)
    return [f"--attention_resolutions {wanted} (not {given or 'empty'})"]


def _heads(told: Mapping[str, Any], flags: Mapping[str, Any]) -> list[str]:
    """The head flags, where they do not divide the file's widths. The weights do not determine the heads."""
    widths = told["attention_channels"]
    shared = math.gcd(*widths)
    size, heads = flags.get("num_head_channels", -1), flags.get("num_heads", 1)
    listed = ",".join(map(str, widths))
    if size != -1 and shared % size:
        usual = math.gcd(shared, HEAD_CHANNELS)
        return [f"--num_head_channels that divides {listed}, such as {usual} (not {size})"]
    if size == -1 and shared % heads:
        return [f"--num_heads that divides {listed} (not {heads})"]
    return []


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
