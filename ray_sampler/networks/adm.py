"""The ADM family: the UNet of EDM and consistency-models checkpoints, described by flags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.family import DTYPES, Family, NetworkSpec, Opened, Precision, check_fit, without_memory
from ray_sampler.networks.weights import Checkpoint
from ray_sampler.options import pick

SHOWN = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight")
"""Names by which a checkpoint of this family is known."""


def recognises(checkpoint: Checkpoint) -> bool:
    return all(name in checkpoint.tensors for name in SHOWN)


def open_adm(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """The network that the flags describe, with the tensors of the checkpoint.

    Raises:
        RequestError: names or shapes are not those of the flags' network.
    """
    options = pick(AdmOptions, settings)
    options.validate()
    hints = told_otherwise(checkpoint.tensors, options)
    advice = f"the checkpoint asks for {' '.join(hints)}" if hints else "check the architecture flags, or give --preset"
    check_fit(without_memory(lambda: UNet(options)), checkpoint.tensors, advice)
    return Opened(spec_of(options, settings), dict(checkpoint.tensors))


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
        defaults={"clip_denoised": True, "rounding": "truncate", "state": "fp32"},
    )


def told_otherwise(state: Mapping[str, Tensor], options: AdmOptions) -> list[str]:
    """Flags, with values, that the checkpoint's own tensors show and `options` has otherwise."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shown: dict[str, Any] = {}
    if "input_blocks.0.0.weight" not in shapes or len(shapes.get("time_embed.0.weight", ())) != 2:
        return []  # of another family
    shown["num_channels"] = shapes["time_embed.0.weight"][1]
    classes = shapes.get("label_emb.weight")
    shown["class_cond"] = classes is not None
    if classes is not None:
        shown["num_classes"] = classes[0]
    embedding, convolution = (shapes.get(f"input_blocks.1.0.{name}.weight") for name in ("emb_layers.1", "in_layers.2"))
    if embedding and convolution:
        shown["use_scale_shift_norm"] = embedding[0] == 2 * convolution[0]
    taken, given = shapes["input_blocks.0.0.weight"], shapes.get("out.2.weight")
    if given and len(taken) == 4:
        shown["learn_sigma"] = given[0] == 2 * taken[1]
    if any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in shapes):
        shown["resblock_updown"] = False
    return [f"--{name} {value}" for name, value in shown.items() if value != getattr(options, name)]


def build(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """Torso convolutions in `precision`, all else float32; convolutions channels last."""
    module = UNet(spec.options).convert_torso(DTYPES[precision])
    for name, parameter in module.named_parameters():
        if parameter.dim() == 4:
            owner, _, leaf = name.rpartition(".")
            laid_out = parameter.contiguous(memory_format=torch.channels_last)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(laid_out, requires_grad=False))
    return module


ADM = Family("adm", recognises, open_adm, build)
