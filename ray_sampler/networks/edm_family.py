"""The families of NVIDIA's snapshots: `edm` (SongUNet, and DhariwalUNet, which is the ADM network) and `edm2`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ray_sampler.errors import RequestError, printable, require
from ray_sampler.networks import adm, edm, edm2
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.dhariwal import HEAD_CHANNELS, as_dhariwal, dhariwal_to_adm
from ray_sampler.networks.family import DTYPES, Family, NetworkSpec, Opened, Precision, Told, check_fit, without_memory
from ray_sampler.networks.nvidia import Refused, SavedNetwork
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
            options, tensors = Recorded(network), edm.network_tensors(saved.tensors)
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
    return checked(EDM2, spec, edm2.network_tensors(source), saved, settings, given, told_by(options, "edm"), encoder)


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
    """The settings of a file's network, by the names of ADM's flags; a function decides whether a given value matches.

    A flag that is left out here cannot be used with this network.
    """
    adm_like = isinstance(network, AdmOptions)
    width = network.num_channels if adm_like else getattr(network, "model_channels", network.channels[0])
    channels = [round(m * width) for m in network.channel_multipliers] if adm_like else list(network.channels)
    sizes = [(network.image_size if adm_like else network.img_resolution) >> level for level in range(len(channels))]
    there = [network.attends_at(i) if adm_like else s in network.attn_resolutions for i, s in enumerate(sizes)]
    attention = [size for size, attends in zip(sizes, there, strict=True) if attends]
    heads: dict[str, Any] = {"num_head_channels": getattr(network, "channels_per_head", HEAD_CHANNELS)}
    if isinstance(network, edm.SongUNetOptions):  # which has one head, of all channels
        wide = {channels[-1], *(c for c, attends in zip(channels, there, strict=True) if attends)}
        heads["num_head_channels"] = Told("-1", lambda n: n == -1 or {n} == wide)
        heads |= {"num_heads": 1, "num_heads_upsample": Told("1", lambda n: n in (-1, 1))}
    return heads | {
        "num_channels": width,
        "num_res_blocks": network.num_res_blocks if adm_like else network.num_blocks,
        "channel_mult": Told(
            ",".join(f"{c / width:g}" for c in channels),
            lambda text: not text or [round(m * width) for m in numbers("channel_mult", text)] == channels,
        ),
        "attention_resolutions": Told(
            ",".join(map(str, attention)) or "none",
            lambda text: [s for s in sizes if s in numbers("attention_resolutions", text)] == attention,
        ),
        "use_scale_shift_norm": adm_like,
        "resblock_updown": True,
        "learn_sigma": adm_like and network.learn_sigma,
        "training_mode": Told(kind, lambda mode: kind == "edm" and "consistency" not in mode),
    }


def numbers(name: str, text: str) -> list[float]:
    """A list of numbers that was given as text. Raises RequestError: it is none."""
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RequestError(f"--{name} is {text!r}; it must be positive numbers with commas, like 1,2,2") from None


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
