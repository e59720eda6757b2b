"""A script's arguments, and the network that they describe."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from ray_sampler.compat.cm.karras_diffusion import KarrasDenoiser
from ray_sampler.errors import require
from ray_sampler.flags import BOOLEANS
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet

NUM_CLASSES = 1000


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The arguments of `create_model_and_diffusion`, by name, at their defaults."""
    return {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "32,16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        "learn_sigma": False,
        "weight_schedule": "karras",
    }


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    weight_schedule: str,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
) -> tuple[UNet, KarrasDenoiser]:
    """A network with random weights, float32 on the CPU, and its preconditioning.

    use_fp16 changes nothing until `convert_to_fp16` is called; use_checkpoint, use_new_attention_order
    and weight_schedule are inert in sampling.

    Raises:
        RequestError: an argument is wrong, or learn_sigma, which no Karras sampler uses.
    """
    require(not learn_sigma, "learn_sigma=True is not supported: a Karras sampler uses no learned variance")
    arch = AdmOptions(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=num_res_blocks,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        num_head_channels=num_head_channels,
        attention_resolutions=attention_resolutions,
        channel_mult=channel_mult,
        class_cond=class_cond,
        num_classes=NUM_CLASSES,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        dropout=dropout,
    )
    arch.validate()
    diffusion = KarrasDenoiser(
        sigma_max=sigma_max, sigma_min=sigma_min, weight_schedule=weight_schedule, distillation=distillation
    )
    return UNet(arch), diffusion


def args_to_dict(args: object, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes `keys` of an arguments object, by name."""
    return {key: getattr(args, key) for key in keys}


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option --name for each entry, of its default's type; None means text."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 and no, false, f, n, 0, in any case."""
    if str(v).lower() not in BOOLEANS:
        raise argparse.ArgumentTypeError(f"{v!r} is not a boolean; write True or False")
    return BOOLEANS[str(v).lower()]
