"""The ADM family: the UNet of EDM and consistency-models checkpoints, described by flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from ray_sampler.errors import require
from ray_sampler.networks.adm_options import AdmFlags, AdmOptions
from ray_sampler.networks.adm_shapes import adm_flags, explain_misfit
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.dit_options import DitFlags
from ray_sampler.networks.family import DTYPES, Family, NetworkSpec, Opened, Precision, check_fit, without_memory
from ray_sampler.networks.weights import Checkpoint
from ray_sampler.options import flags_of, of

SHOWN = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight")
"""Names by which a checkpoint of this family is known."""

UNKNOWN_DROPOUT = 0.1
"""Used where the share is above 0 but unknown; samples do not depend on its value."""


PLACEHOLDERS = {"image_size": "SIZE", "num_head_channels": "CHANNELS"}
"""For values that the weights do not determine, in the command that `inspect` prints."""


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
    if told is None:
        options = of(AdmOptions, settings)
    else:
        flags = {name: settings[name] for name in given | {"label_dropout"} if name in settings}
        contradiction = explain_misfit(checkpoint.tensors, flags)
        require(not contradiction, f"--model is {checkpoint.shown}; {contradiction}")
        options = described(told, settings, given)
    options.validate()
    for name in ("num_classes", "label_dropout"):
        require(
            options.class_cond or name not in given or not settings[name] or "class_cond" in given,
            f"--{name} is {settings.get(name)}, which an unconditional network cannot use; leave it out",
        )
    for name in flags_of(DitFlags):
        require(name not in given, f"--{name} is {settings.get(name)}, which this network cannot use; leave it out")
    advice = (told and explain_misfit(checkpoint.tensors, asdict(options))) or "it is damaged, or of another network"
    check_fit(without_memory(lambda: UNet(options)), checkpoint.tensors, advice)
    return Opened(
        spec_of(options, settings),
        dict(checkpoint.tensors),
        note="; ".join(filter(None, (overruled(checkpoint, settings, given), assumed(options, settings)))) or None,
        untold={name: PLACEHOLDERS[name] for name in untold(settings)},
    )


def overruled(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> str | None:
    """What a preset says that the file contradicts: the file decides, and the preset may be that of another file."""
    brought = {name: value for name, value in settings.items() if name not in given | {"label_dropout"}}
    misfit = explain_misfit(checkpoint.tensors, brought) if settings.get("preset") else ""
    return (
        f"--preset {settings['preset']} does not match --model, whose own values are taken; {misfit}"
        if misfit
        else None
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
