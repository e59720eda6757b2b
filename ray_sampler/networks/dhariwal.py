"""EDM's DhariwalUNet, which is the ADM network under other names.

Two things differ: it normalises in min(32, C // 4) groups, which are 32 from 128 channels up, and its null label is no
label, a zero vector. Its c_noise is that of its preconditioning, not the 250 ln(sigma) of consistency models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler.networks.adm_unet import GroupNorm, UNet
from ray_sampler.networks.arguments import Arguments, check_sizes
from ray_sampler.networks.edm import PREFIX, groups_of
from ray_sampler.networks.nvidia import Refused, SavedNetwork

HEAD_CHANNELS = 64
"""Channels of an attention head, at least: there are channels // 64 heads, wider ones where that is not exact."""

BLOCK = {
    "norm0": "in_layers.0",
    "conv0": "in_layers.2",
    "affine": "emb_layers.1",
    "norm1": "out_layers.0",
    "conv1": "out_layers.3",
    "skip": "skip_connection",
}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "proj_out"}


def dhariwal_to_adm(saved: SavedNetwork) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The flags of the ADM network that a snapshot's DhariwalUNet is, and its tensors under the names there.

    `label_emb` has a last row of zeros, for the null label `num_classes`: see `as_dhariwal`.

    Raises:
        Refused: it is not a DhariwalUNet, or its tensors are not those of its arguments.
    """
    arguments = Arguments(saved.arguments)
    arguments.choice("model_type", ("DhariwalUNet",))
    if arguments.factor("channel_mult_emb", 4) != 4:
        raise Arguments.refused("channel_mult_emb", saved.arguments["channel_mult_emb"], "4")
    channels = arguments.number("img_channels", 3)
    inputs, outputs = arguments.number("in_channels", channels), arguments.number("out_channels", channels)
    if outputs not in (inputs, 2 * inputs):
        raise Arguments.refused("out_channels", outputs, f"{inputs} or {2 * inputs}")
    size, blocks = arguments.number("img_resolution"), arguments.blocks(3)
    multipliers = arguments.numbers("channel_mult", (1, 2, 3, 4))
    attention = arguments.resolutions("attn_resolutions", (32, 16, 8))
    classes = arguments.number("label_dim", 0, least=0)
    width = arguments.number("model_channels", 192)
    widths = tuple(round(width * multiplier) for multiplier in multipliers)
    check_sizes(size, widths)
    if widths[-1] < HEAD_CHANNELS:
        raise Refused(
            f"its DhariwalUNet has {widths[-1]} channels in its middle; only {HEAD_CHANNELS} or more can be sampled"
        )
    # A level with fewer channels than a head has no attention, whatever the list of resolutions says.
    attention = tuple(size >> i for i, w in enumerate(widths) if size >> i in attention and w >= HEAD_CHANNELS)
    flags: dict[str, Any] = {
        "image_size": size,
        "num_channels": width,
        "num_res_blocks": blocks,
        "num_head_channels": HEAD_CHANNELS,
        "attention_resolutions": ",".join(map(str, attention)),
        "channel_mult": ",".join(f"{multiplier:g}" for multiplier in multipliers),
        "class_cond": classes > 0,
        "use_scale_shift_norm": True,
        "resblock_updown": True,
        "learn_sigma": outputs != inputs,
    }
    flags |= {"num_classes": classes} if classes else {}
    flags |= {"in_channels": inputs} if inputs != 3 else {}
    names = {
        f"{PREFIX}{theirs}": ours for theirs, ours in _names(size, len(multipliers), blocks, attention, classes > 0)
    }
    return flags, _renamed(saved.tensors, names)


def as_dhariwal(network: UNet) -> UNet:
    """An ADM network, without weights as yet, as EDM has it: in place."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.num_groups = groups_of(module.num_channels)
    if network.arch.class_cond:
        labels = network.label_emb
        network.label_emb = nn.Embedding(
            labels.num_embeddings + 1, labels.embedding_dim, device=labels.weight.device, dtype=labels.weight.dtype
        )
    return network


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for theirs, tensor in tensors.items():
        module, _, parameter = theirs.rpartition(".")
        unused = parameter == "resample_filter" or module == f"{PREFIX}map_augment"
        if unused or not theirs.startswith(PREFIX):
            continue
        if module not in names:
            raise Refused(f"its DhariwalUNet has a tensor {theirs[:100]}, which its arguments do not ask for")
        if module.endswith(".qkv"):
            tensor = _qkv(tensor, theirs)
        if names[module] == "label_emb":
            tensor = torch.cat([tensor.T, tensor.new_zeros(1, len(tensor))]).contiguous()
        renamed[f"{names[module]}.{parameter}"] = tensor
    return renamed


def _qkv(tensor: Tensor, name: str) -> Tensor:
    """Outputs ordered (heads, channels of a head, 3) -> (3, heads, channels of a head)."""
    heads = len(tensor) // 3 // HEAD_CHANNELS if tensor.dim() else 0
    if not heads or len(tensor) % (3 * heads):
        raise Refused(f"its DhariwalUNet has {name} of shape {list(tensor.shape)}, not in heads of {HEAD_CHANNELS}")
    return tensor.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2).contiguous()


def _names(
    resolution: int, levels: int, blocks: int, attention: tuple[int, ...], labelled: bool
) -> Iterator[tuple[str, str]]:
    """(EDM's name of a layer, ADM's), for all layers with parameters."""
    yield from (("map_layer0", "time_embed.0"), ("map_layer1", "time_embed.2"))
    yield from [("map_label", "label_emb")] * labelled
    sizes = [resolution >> level for level in range(levels)]
    yield f"enc.{resolution}x{resolution}_conv", "input_blocks.0.0"
    place = 1
    for size in sizes:
        for name in ["down"] * (size != resolution) + [f"block{i}" for i in range(blocks)]:
            attends = size in attention and name != "down"
            yield from _block(f"enc.{size}x{size}_{name}", f"input_blocks.{place}", attends)
            place += 1
    bottom = f"dec.{sizes[-1]}x{sizes[-1]}"
    yield from _block(f"{bottom}_in0", "middle_block", attends=True)
    yield from _block(f"{bottom}_in1", "middle_block", attends=False, first=2)
    for i, size in enumerate(reversed(sizes)):
        for j in range(blocks + 1):
            yield from _block(f"dec.{size}x{size}_block{j}", f"output_blocks.{i * (blocks + 1) + j}", size in attention)
        if size != resolution:
            last, above = (i + 1) * (blocks + 1) - 1, f"{2 * size}x{2 * size}"
            yield from _block(f"dec.{above}_up", f"output_blocks.{last}", attends=False, first=1 + (size in attention))
    yield from (("out_norm", "out.0"), ("out_conv", "out.2"))


def _block(theirs: str, ours: str, attends: bool, first: int = 0) -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{a}", f"{ours}.{first}.{b}") for a, b in BLOCK.items())
    if attends:
        yield from ((f"{theirs}.{a}", f"{ours}.{first + 1}.{b}") for a, b in ATTENTION.items())
