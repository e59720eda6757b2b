"""The ADM family: the UNet of EDM and consistency-models checkpoints, described by flags."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.adm_options import CHANNEL_MULTIPLIERS, AdmFlags, AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.family import (
    DTYPES,
    Family,
    NetworkSpec,
    Opened,
    Precision,
    Told,
    check_fit,
    contradictions,
    without_memory,
)
from ray_sampler.networks.weights import Checkpoint
from ray_sampler.options import flags_of, of

SHOWN = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight")
"""Names by which a checkpoint of this family is known."""

UNKNOWN_DROPOUT = 0.1
"""Used where the share is above 0 but unknown; samples do not depend on its value."""


PLACEHOLDERS = {"image_size": "SIZE", "num_head_channels": "CHANNELS"}
"""For values that the weights do not determine, in the command that `inspect` prints."""

FREE = ("num_heads", "num_heads_upsample", "num_head_channels", "training_mode")
"""Flags of which the weights say nothing."""

Shapes = Mapping[str, tuple[int, ...]]


def recognises(checkpoint: Checkpoint) -> bool:
    return all(name in checkpoint.tensors for name in SHOWN)


def open_adm(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """The network that the flags and the checkpoint's own tensors describe.

    The settings of the tensors are used where no given flag contradicts them.

    Raises:
        RequestError: flags contradict the tensors, or the tensors are those of no ADM network.
    """
    of(AdmOptions, settings).check()
    attention = checkpoint.tensors.get("middle_block.1.qkv.weight")
    require(
        attention is None or attention.dim() != 3,
        f"--model is {checkpoint.shown}; its attention is that of guided-diffusion, whose networks usually "
        "predict eps for a table of alphas, or velocity if trained by flow matching; give --model "
        "python:module:function, which returns it as a Model of that kind",
    )
    settings = {**settings, "label_dropout": label_dropout(checkpoint, settings, given)}
    told = adm_flags(checkpoint.tensors, null_label=settings["label_dropout"] > 0)
    options, overruled = of(AdmOptions, settings), ""
    if told is not None:
        file = described(told, settings, frozenset())
        file.check_image_size()
        known = told_by(file) | told_of_lists(file, told, sized=bool(settings.get("image_size")))
        known |= {name: settings[name] for name in FREE if name in settings}
        if file.class_cond or "class_cond" in given or not settings["label_dropout"]:
            known["label_dropout"] = settings["label_dropout"]
        if "class_cond" in given and not file.class_cond:
            known["num_classes"] = settings.get("num_classes")
        if "resblock_updown" not in told:
            known["resblock_updown"] = settings.get("resblock_updown")
        spec = spec_of(file, settings)
        spec.check_given({name: settings[name] for name in given - {"weights_key"}}, known)
        brought = {name: value for name, value in settings.items() if name not in given | {"label_dropout"}}
        overruled = ", ".join(contradictions(brought, spec.told(known))) if settings.get("preset") else ""
        options = described(told, settings, given)
    options.validate()
    check_fit(without_memory(lambda: UNet(options)), checkpoint.tensors, "it is damaged, or of another network")
    noted = f"--preset {settings.get('preset')} does not match --model, whose own values are taken: {overruled}"
    return Opened(
        spec_of(options, settings),
        dict(checkpoint.tensors),
        note="; ".join(filter(None, (overruled and noted, assumed(options, settings)))) or None,
        untold={name: PLACEHOLDERS[name] for name in untold(settings)},
    )


def label_dropout(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> float:
    """The share of labels that training dropped; what counts is whether it is above 0.

    The settings describe the network that they are given for. A guide is only expected to have the classes of the
    network that it guides: one more row in its label_emb is for the null label, whether that network has one or not.
    """
    dropout: float = settings.get("label_dropout") or 0.0
    table = checkpoint.tensors.get("label_emb.weight")
    if table is None or "num_classes" in given or "num_classes" not in settings:
        return dropout
    return (dropout or UNKNOWN_DROPOUT) if table.shape[:1] == (settings["num_classes"] + 1,) else 0.0


def untold(settings: Mapping[str, Any]) -> list[str]:
    """Flags that neither the weights nor the settings determine."""
    size = [] if settings.get("image_size") else ["image_size"]
    return size if settings.get("num_head_channels") or settings.get("num_heads") else [*size, "num_head_channels"]


def assumed(options: AdmOptions, settings: Mapping[str, Any]) -> str | None:
    """Which defaults are used where neither the weights nor the settings determine a value."""
    flags = ["num_heads" if name == "num_head_channels" else name for name in untold(settings)]
    if not flags:
        return None
    values = " and ".join(f"--{name} {getattr(options, name)}" for name in flags)
    return (
        f"{values} {'is' if len(flags) == 1 else 'are'} assumed; the weights do not determine them: if the network has "
        f"others, its pictures are noise; give --{' and --'.join(untold(settings))}"
    )


def described(told: Mapping[str, Any], settings: Mapping[str, Any], given: frozenset[str]) -> AdmOptions:
    """The options that follow from the tensors; of the flags, those that the user gave or that leave no trace in them.

    A given flag is kept as it is written, for example 1.0,2 for the multipliers 1,2.
    """
    options = of(AdmOptions, settings)
    names = {f.name for f in fields(AdmOptions)}
    merged = asdict(options) | {name: value for name, value in told.items() if name in names and name not in given}
    size = options.image_size
    if "attention_resolutions" not in given:
        factors = told["attention_factors"]
        merged["attention_resolutions"] = ",".join(str(size // factor) for factor in factors if size >= factor)
    return AdmOptions(**merged)


def adm_flags(tensors: Mapping[str, Tensor], null_label: bool = False) -> dict[str, Any] | None:
    """The settings that follow from the state dict of an ADM network, by flag name; None for another kind of network.

    Args:
        tensors: the state dict.
        null_label: whether the last row of label_emb is not a class.

    Returns:
        num_channels, channel_mult, num_res_blocks, resblock_updown (where there is more than one level),
        use_scale_shift_norm, class_cond, num_classes (if class_cond), learn_sigma, in_channels, out_channels;
        and attention_factors, a tuple of the downsampling factors at which attention sits.
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


def told_by(options: AdmOptions) -> dict[str, Any]:
    """What a file says of its network, by flag name, its lists as EDM reads them; see `NetworkSpec.check_given`."""
    size, width = options.image_size, options.num_channels
    multipliers = CHANNEL_MULTIPLIERS.get(size, ())
    attended = [size >> level for level in range(len(options.channel_multipliers)) if options.attends_at(level)]
    channels = [round(multiplier * width) for multiplier in options.channel_multipliers]
    names = ("num_res_blocks", "use_scale_shift_norm", "resblock_updown", "learn_sigma")
    return told_of_levels(width, channels, size, attended, multipliers) | {n: getattr(options, n) for n in names}


def told_of_lists(file: AdmOptions, told: Mapping[str, Any], sized: bool) -> dict[str, Any]:
    """What an ADM file says of widths and attention: widths are rounded down, and so are attention's factors.

    Args:
        told: of its shapes; see `adm_flags`.
        sized: whether image_size was given, by a preset or the user.
    """
    width, size, factors = file.num_channels, file.image_size, told["attention_factors"]
    usual = CHANNEL_MULTIPLIERS.get(size, ())
    channels = [int(multiplier * width) for multiplier in file.channel_multipliers]
    levels = {2**level for level in range(len(channels))}
    attention = ",".join(str(size // f) if sized else f"image_size/{f}".removesuffix("/1") for f in factors) or "none"
    return {
        "channel_mult": Told(
            told["channel_mult"],
            lambda text: [int(m * width) for m in numbers("channel_mult", text) or usual] == channels,
        ),
        "attention_resolutions": Told(
            attention if sized or not factors else f"{attention} (--image_size is {size} unless given)",
            lambda text: levels & {*replace(file, attention_resolutions=text).attention_factors} == {*factors},
        ),
    }


def told_of_levels(
    width: int, channels: Sequence[int], resolution: int, attended: Collection[int], usual: Sequence[float]
) -> dict[str, Any]:
    """What the levels of a UNet say, by flag name.

    Args:
        attended: resolutions that have attention.
        usual: the multipliers that an empty text means.
    """
    sizes = [resolution >> level for level in range(len(channels))]
    attention = [size for size in sizes if size in attended]
    return {
        "num_channels": width,
        "channel_mult": Told(
            ",".join(f"{c / width:g}" for c in channels),
            lambda text: [round(m * width) for m in numbers("channel_mult", text) or usual] == list(channels),
        ),
        "attention_resolutions": Told(
            ",".join(map(str, attention)) or "none",
            lambda text: [s for s in sizes if s in numbers("attention_resolutions", text)] == attention,
        ),
    }


def numbers(name: str, text: str) -> list[float]:
    """A list of numbers that was given as text. Raises RequestError: it is none."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RequestError(f"--{name} is {text!r}; it must be positive numbers with commas, like 1,2,2") from None


def spec_of(options: AdmOptions, settings: Mapping[str, Any]) -> NetworkSpec:
    """The description of a network from its flags."""
    consistency = "consistency" in (settings.get("training_mode") or "edm")
    size = options.image_size
    return NetworkSpec(
        family="adm",
        options=options,
        shape=(options.in_channels, size, size),
        kind="consistency" if consistency else "edm",
        kind_options={"c_noise": "250log"},
        num_classes=options.num_classes if options.class_cond else 0,
        null_label=options.num_classes if options.class_cond and options.label_dropout else None,
        defaults=AdmFlags.family_defaults,
        flags=flags_in(options, settings),
        unlabelled_hint=", or give --class_cond True",
    )


def flags_in(options: AdmOptions, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture by flag name."""
    mode = {"training_mode": settings.get("training_mode") or "edm"}
    return {name: getattr(options, name) for name in flags_of(AdmFlags)} | mode


def build(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """Torso convolutions in `precision`, all else float32; convolutions channels last."""
    return laid_out(UNet(spec.options).convert_torso(DTYPES[precision]))


def laid_out(module: UNet) -> UNet:
    """The network with its convolutions' weights channels last."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 4:
            owner, _, leaf = name.rpartition(".")
            channels_last = parameter.contiguous(memory_format=torch.channels_last)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(channels_last, requires_grad=False))
    return module


ADM = Family("adm", recognises, open_adm, build)
