"""The families of NVIDIA's snapshots: `edm` (SongUNet, and DhariwalUNet, which is the ADM network) and `edm2`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError, printable, require
from ray_sampler.networks import adm, edm, edm2
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import GroupNorm, UNet
from ray_sampler.networks.edm import PREFIX, groups_of
from ray_sampler.networks.family import DTYPES, Family, NetworkSpec, Opened, Precision, Told, check_fit, without_memory
from ray_sampler.networks.nvidia import MOST_BLOCKS, Arguments, Refused, SavedNetwork, check_sizes, stripped
from ray_sampler.networks.weights import Checkpoint

SIGMA_RANGE = (0.002, 80.0)
"""What the publications sample, within what a network records."""
DAMAGED = "the file is not what its recorded arguments say"


@dataclass(frozen=True)
class Recorded:
    """Options that a file records, or that follow from its shapes."""

    network: Any
    """The network's own dataclass."""

    def identity(self) -> dict[str, Any]:
        values = asdict(self.network).items()
        return {
            name: ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value for name, value in values
        }


@dataclass(frozen=True)
class Dhariwal:
    """The flags of the ADM network that a DhariwalUNet is."""

    network: AdmOptions

    def identity(self) -> dict[str, Any]:
        return self.network.identity() | {"network": "DhariwalUNet"}


@contextmanager
def refusing(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a file's content is refused for into a wrong request that names the file."""
    try:
        yield
    except Refused as error:
        raise RequestError(f"--model is {checkpoint.shown}; {error}") from error


def main_network(checkpoint: Checkpoint) -> SavedNetwork | None:
    """The network of a snapshot that is sampled; None for a file of another kind."""
    return (checkpoint.saved or {}).get(checkpoint.key)


def is_edm(checkpoint: Checkpoint) -> bool:
    saved = main_network(checkpoint)
    return saved is not None and saved.arguments.get("model_type") in ("SongUNet", "DhariwalUNet")


def is_edm2(checkpoint: Checkpoint) -> bool:
    if (saved := main_network(checkpoint)) is not None:
        return saved.class_name == "Precond"
    names = {name.removeprefix(edm2.PREFIX) for name in checkpoint.tensors}
    return {"out_gain", "emb_fourier.freqs", "emb_noise.weight", "out_conv.weight"} <= names


def open_edm(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """A snapshot of NVlabs/edm.

    Raises:
        RequestError: it cannot be sampled, or a given setting contradicts what it records.
    """
    saved = main_network(checkpoint)
    assert saved is not None, "it was recognised"
    with refusing(checkpoint):
        kind = edm.preconditioning(saved)
        if kind == "iddpm":
            raise Refused("its network has the preconditioning of iDDPM, which is not supported; EDM's, VP and VE are")
        check_sigma_data(saved)
        if saved.arguments.get("model_type") == "DhariwalUNet":
            flags, tensors = dhariwal_to_adm(saved)
            options: Any = Dhariwal(AdmOptions(**flags))
            shape = (options.network.in_channels, options.network.image_size, options.network.image_size)
            classes = options.network.num_classes if options.network.class_cond else 0
        else:
            network = edm.options_from(saved)
            options, tensors = Recorded(network), stripped(saved.tensors, edm.PREFIX)
            shape = (network.in_channels, network.img_resolution, network.img_resolution)
            classes = network.label_dim
    low, high = (recorded(saved, name, default) for name, default in (("sigma_min", 0.0), ("sigma_max", math.inf)))
    spec = NetworkSpec(
        family="edm",
        options=options,
        shape=shape,
        kind=kind,
        kind_options={"shared_time": True} if kind == "edm" and not isinstance(options, Dhariwal) else {},
        num_classes=classes,
        null_label=classes or None,
        sigma_min=max(SIGMA_RANGE[0], low),
        sigma_max=min(SIGMA_RANGE[1], high),
        defaults={"clip_denoised": False, "rounding": "nearest", "state": "fp64", "steps": 18},
        flags=adm.flags_in(options.network, settings) if isinstance(options, Dhariwal) else {},
        script="edm",
    )
    told = told_by(options.network, kind) | {"label_dropout": recorded(saved, "label_dropout", 0.0)}
    with refusing(checkpoint):
        return checked(EDM, spec, tensors, saved, settings, given, told)


def open_edm2(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """A snapshot of NVlabs/edm2, or a state dict of its network.

    Raises:
        RequestError: it cannot be sampled, or a given setting contradicts what it records.
    """
    saved, encoder = main_network(checkpoint), (checkpoint.saved or {}).get("encoder")
    source = saved.tensors if saved else checkpoint.tensors
    with refusing(checkpoint):
        if saved:
            check_sigma_data(saved)
            options, latent = edm2.options_from(saved), edm2.latents(encoder)
        else:
            options = edm2.options_from_shapes(source, max(settings.get("num_head_channels") or 0, 0))
            latent = options.img_channels == 4
    spec = NetworkSpec(
        family="edm2",
        options=Recorded(options),
        shape=(options.img_channels, options.img_resolution, options.img_resolution),
        kind="edm",
        kind_options={"shared_time": True},
        num_classes=options.label_dim,
        null_label=options.label_dim or None,
        sigma_min=SIGMA_RANGE[0],
        sigma_max=SIGMA_RANGE[1],
        defaults={
            "clip_denoised": False,
            "rounding": "truncate" if latent else "nearest",
            "state": "fp32",
            "steps": 32,
        },
        latent="edm2" if latent else None,
        autoencoder=(8, None),  # Stable Diffusion's
        script="edm2",
    )
    return checked(EDM2, spec, stripped(source, edm2.PREFIX), saved, settings, given, told_by(options, "edm"), encoder)


def checked(
    family: Family,
    spec: NetworkSpec,
    tensors: dict[str, Tensor],
    saved: SavedNetwork | None,
    settings: Mapping[str, Any],
    given: frozenset[str],
    told: Mapping[str, Any],
    encoder: SavedNetwork | None = None,
) -> Opened:
    """What was opened, after a check against its own tensors and against what the user gave."""
    spec.check_given({name: settings[name] for name in given - {"weights_key"}}, told)
    check_fit(without_memory(lambda: family.build(spec, "fp32")), tensors, DAMAGED)
    parameters = saved.parameters if saved else sum(t.numel() for t in tensors.values() if t.dim() != 1)
    changed = [*(saved.changed if saved else ()), *(encoder.changed if encoder else ())]
    note = None
    if changed:
        note = (
            f"the code that wrote this file is not the published one: {', '.join(map(printable, changed))} "
            f"{'differs' if len(changed) == 1 else 'differ'}; it is sampled with the published arithmetic, so pictures "
            "may be wrong"
        )
    elif saved is None and not settings.get("num_head_channels") and any("attn_qkv" in name for name in tensors):
        note = (
            f"--num_head_channels {edm2.CHANNELS_PER_HEAD} is assumed, as in all published networks, since the weights "
            "do not determine it: if the network has another, its pictures are wrong; give --num_head_channels"
        )
    return Opened(spec, tensors, parameters, note)


def told_by(network: Any, kind: str) -> dict[str, Any]:
    """The settings of a file's network, by the names of ADM's flags; see `NetworkSpec.check_given`.

    A flag that is left out here cannot be used with this network.
    """
    mode = {"training_mode": Told(kind, lambda mode: kind == "edm" and "consistency" not in mode)}
    if isinstance(network, AdmOptions):
        return adm.told_by(network) | {"num_head_channels": HEAD_CHANNELS} | mode
    size, channels, attended = network.img_resolution, network.channels, network.attn_resolutions
    width = getattr(network, "model_channels", channels[0])
    heads: dict[str, Any] = {"num_head_channels": getattr(network, "channels_per_head", None)}
    if isinstance(network, edm.SongUNetOptions):  # which has one head, of all channels
        wide = {channels[-1], *(c for level, c in enumerate(channels) if size >> level in attended)}
        heads["num_head_channels"] = Told("-1", lambda n: n == -1 or {n} == wide)
        heads |= {"num_heads": 1, "num_heads_upsample": Told("1", lambda n: n in (-1, 1))}
    levels = adm.told_of_levels(width, channels, size, attended, [c / width for c in channels])
    switches = {"use_scale_shift_norm": False, "resblock_updown": True, "learn_sigma": False}
    return levels | {"num_res_blocks": network.num_blocks} | heads | switches | mode


def check_sigma_data(saved: SavedNetwork) -> None:
    """Raises Refused: the network was made for pictures of another deviation than all published ones."""
    value = saved.arguments.get("sigma_data", 0.5)
    if value != 0.5:
        raise Refused(f"its network has sigma_data {ascii(value)[:20]}; only 0.5 can be sampled")


def recorded(saved: SavedNetwork, name: str, default: float) -> float:
    """A number that a snapshot records."""
    value = saved.arguments.get(name, default)
    require(
        isinstance(value, (int, float)) and value >= 0, f"--model has {name} {ascii(value)[:40]}; it must be a number"
    )
    return float(value)


def build_edm(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """As the networks of EDM compute: the torso in `precision`, embedding and output in float32."""
    if isinstance(spec.options, Dhariwal):
        return adm.laid_out(as_dhariwal(UNet(spec.options.network)).convert_torso(DTYPES[precision]))
    return edm.SongUNet(spec.options.network).convert_torso(DTYPES[precision])


def build_edm2(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """As stored; a worker folds it, so that no more than the file is sent."""
    return edm2.Edm2UNet(spec.options.network)


def fold(module: nn.Module, precision: Precision) -> nn.Module:
    """Do EDM2's weight normalisation once and for all."""
    assert isinstance(module, edm2.Edm2UNet)
    return edm2.fold(module, DTYPES[precision])


EDM = Family("edm", is_edm, open_edm, build_edm)
EDM2 = Family("edm2", is_edm2, open_edm2, build_edm2, fold, as_stored=True)


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
    size, blocks = arguments.number("img_resolution"), arguments.number("num_blocks", 3, most=MOST_BLOCKS)
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
    """An ADM network, without weights as yet, as EDM has it: in place.

    It normalises in min(32, C // 4) groups, which are 32 from 128 channels up, and its null label is a zero vector.
    """
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
