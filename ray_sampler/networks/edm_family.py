"""The families of NVIDIA's snapshots: `edm` (SongUNet, and DhariwalUNet, which is the ADM network) and `edm2`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from ray_sampler.errors import RequestError, require
from ray_sampler.networks import adm, edm, edm2
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_shapes import explain_misfit
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.dhariwal import as_dhariwal, dhariwal_to_adm
from ray_sampler.networks.family import DTYPES, Family, NetworkSpec, Opened, Precision, check_fit, without_memory
from ray_sampler.networks.nvidia import Refused, SavedNetwork
from ray_sampler.networks.weights import Checkpoint

SIGMA_RANGE = (0.002, 80.0)
"""What the publications sample, within what a network records."""
DAMAGED = "the file is not what its recorded arguments say"


@dataclass(frozen=True)
class Recorded:
    """Options that a file records, or its shapes tell."""

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
            asked = {name: settings[name] for name in given if name not in ("class_cond", "num_classes")}
            if contradiction := explain_misfit(tensors, asked):  # whose labels have a row for the null label
                raise Refused(contradiction)
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
    with refusing(checkpoint):
        return checked(EDM, spec, tensors, saved.parameters, settings, given)


def open_edm2(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """A snapshot of NVlabs/edm2, or a state dict of its network.

    Raises:
        RequestError: it cannot be sampled, or a given setting contradicts what it records.
    """
    saved = main_network(checkpoint)
    source = saved.tensors if saved else checkpoint.tensors
    with refusing(checkpoint):
        if saved:
            check_sigma_data(saved)
            options, latent = edm2.options_from(saved), edm2.latents((checkpoint.saved or {}).get("encoder"))
        else:
            options = edm2.options_from_shapes(source)
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
        defaults={"clip_denoised": False, "rounding": "nearest", "state": "fp32", "steps": 32},
        latent="edm2" if latent else None,
        script="edm2",
    )
    tensors = edm2.network_tensors(source)
    parameters = saved.parameters if saved else sum(t.numel() for t in tensors.values() if t.dim() != 1)
    return checked(EDM2, spec, tensors, parameters, settings, given)


def checked(
    family: Family,
    spec: NetworkSpec,
    tensors: dict[str, Tensor],
    parameters: int,
    settings: Mapping[str, Any],
    given: frozenset[str],
) -> Opened:
    """What was opened, after a check against its own tensors and against what the user gave."""
    values = {name: settings[name] for name in given}
    spec.check_given(values)
    check_recorded(spec, values)
    check_fit(without_memory(lambda: family.build(spec, "fp32")), tensors, DAMAGED)
    return Opened(spec, tensors, parameters)


def check_recorded(spec: NetworkSpec, given: Mapping[str, Any]) -> None:
    """Check what the user gave of the preconditioning and the levels against what a file records.

    Raises:
        RequestError: it contradicts that; names both values.
    """
    told: dict[str, str] = {}
    if "consistency" in (given.get("training_mode") or ""):
        told["training_mode"] = "edm"
    if not isinstance(spec.options, Dhariwal):  # whose flags its tensors were compared with
        network = spec.options.network
        width = getattr(network, "model_channels", network.channels[0])
        sizes = [network.img_resolution >> level for level in range(len(network.channels))]
        attention = [size for size in sizes if size in network.attn_resolutions]
        if given.get("num_channels") not in (None, width):
            told["num_channels"] = str(width)
        asked = numbers(given, "channel_mult")
        if asked and [round(width * multiplier) for multiplier in asked] != list(network.channels):
            told["channel_mult"] = ",".join(f"{channels / width:g}" for channels in network.channels)
        asked = numbers(given, "attention_resolutions")
        if asked is not None and [size for size in sizes if size in asked] != attention:
            told["attention_resolutions"] = ",".join(map(str, attention)) or "none"
    for name, value in told.items():
        require(False, f"--{name} is {given[name]}, but the file says {value}; leave it out or give another --model")


def numbers(given: Mapping[str, Any], name: str) -> list[float] | None:
    """A list of numbers that was given as text. Raises RequestError: it is none."""
    text = given.get(name)
    try:
        return None if text is None else [float(part) for part in text.split(",") if part]
    except ValueError:
        raise RequestError(f"--{name} is {text!r}; it must be positive numbers with commas, as in 1,2,2") from None


def check_sigma_data(saved: SavedNetwork) -> None:
    """Raises Refused: the network was made for pictures of another deviation than all published ones."""
    value = saved.arguments.get("sigma_data", 0.5)
    if value != 0.5:
        raise Refused(f"its network has sigma_data {ascii(value)[:20]}; only 0.5 can be sampled")


def recorded(saved: SavedNetwork, name: str, default: float) -> float:
    """A number that a snapshot records."""
    value = saved.arguments.get(name, default)
    require(isinstance(value, (int, float)) and value >= 0, f"--model records {name} as {ascii(value)[:40]}, no level")
    return float(value)


def build_edm(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """As the networks of EDM compute: the torso in `precision`, embedding and output in float32."""
    if isinstance(spec.options, Dhariwal):
        return adm.laid_out(as_dhariwal(UNet(spec.options.network)).convert_torso(DTYPES[precision]))
    return edm.SongUNet(spec.options.network).convert_torso(DTYPES[precision])


def build_edm2(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """As stored; a worker folds it, so that what travels is no larger than the file."""
    return edm2.Edm2UNet(spec.options.network)


def fold(module: nn.Module, precision: Precision) -> nn.Module:
    """Do EDM2's weight normalisation once and for all."""
    assert isinstance(module, edm2.Edm2UNet)
    return edm2.fold(module, DTYPES[precision])


EDM = Family("edm", is_edm, open_edm, build_edm)
EDM2 = Family("edm2", is_edm2, open_edm2, build_edm2, fold, as_stored=True)
