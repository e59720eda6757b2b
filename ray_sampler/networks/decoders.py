"""Decoders of latents: the second half of an AutoencoderKL directory of diffusers, and the bundled digits' own.

diffusers is needed here alone, for the class of the network; the files are read as all checkpoints are.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError, printable, redact, require
from ray_sampler.networks.family import (
    DTYPES,
    Decodes,
    Family,
    Network,
    NetworkSpec,
    Opened,
    Precision,
    as_it_is,
    misfits,
    without_memory,
)
from ray_sampler.networks.sources import Folder, Source, open_source
from ray_sampler.networks.weights import Checkpoint, read_checkpoint, weights_hash

CONFIG = "config.json"
MAX_CONFIG = 2**20
CLASS = "AutoencoderKL"
WEIGHTS = re.compile(r"diffusion_pytorch_model(?:(\.\w+)?\.safetensors|\.safetensors\.index(\.\w+)?\.json)")
"""A file of weights or the index of several, perhaps of a variant such as fp16."""
HALF = ("decoder.", "post_quant_conv.")
"""How the names of the tensors begin that decode."""
RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The layers of attention as older files name them."""
DECIDING = (
    *("latent_channels", "out_channels", "block_out_channels", "up_block_types", "layers_per_block", "act_fn"),
    *("norm_num_groups", "mid_block_add_attention", "use_post_quant_conv", "scaling_factor", "shift_factor"),
)
"""What of a config decides the pictures."""


@dataclass(frozen=True)
class AutoencoderOptions:
    """An AutoencoderKL, as its config describes it."""

    config: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        return {name: self.config[name] for name in DECIDING if name in self.config}


class Decoder(nn.Module):
    """z (B, C, H, W) -> pictures (B, 3, f H, f W), as AutoencoderKL.decode without tiling or slicing.

    It is pickled as its config and tensors, so that a process to which it comes says by itself what it lacks.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        vae = autoencoder_class().from_config(dict(config))
        self.config = {**vae.config}
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        pictures: Tensor = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))
        return pictures

    def __reduce__(self) -> Any:
        return remade, (self.config, self.state_dict(keep_vars=True))


def remade(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Decoder:
    """A decoder that has travelled."""
    module = without_memory(lambda: Decoder(config))
    module.load_state_dict(tensors, assign=True)
    assert isinstance(module, Decoder)
    return module


def autoencoder_class() -> Any:
    """diffusers' class.

    Raises:
        RequestError: it is not installed, or cannot be imported.
    """
    try:
        with without_broken("torchvision"):
            return importlib.import_module("diffusers").AutoencoderKL
    except (ImportError, RuntimeError) as error:  # the second is diffusers' own, of a package that it imports
        said = str(error).strip().rpartition("\n")[2]
        raise RequestError(
            f"--decoder is the directory of an autoencoder, for which diffusers is needed, and that cannot be imported "
            f"({said}); pip install 'ray-sampler[diffusers]'"
        ) from error


@contextmanager
def without_broken(name: str) -> Iterator[None]:
    """Hide a package that does not import, as one that was built for another torch, from those that try."""
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):
        sys.modules[name] = None  # type: ignore[assignment]  # which Python takes for a package that is not there
        try:
            yield
        finally:
            del sys.modules[name]
    else:
        yield


def open_autoencoder(url: str) -> Network:
    """The decoder in an AutoencoderKL directory, at a path or any fsspec URL. Nothing in it is executed.

    Raises:
        RequestError: there is none, a part of it is missing, or it is of another kind.
    """
    shown = f"--decoder is {redact(url)}"
    with open_source(url, "--decoder") as folder:
        if not isinstance(folder, Folder):
            raise RequestError(f"{shown}, a file; give the directory of an autoencoder, with its {CONFIG}")
        config, file = read_config(folder, shown), weights_file(folder, shown)
    wanted = described(config, shown)
    checkpoint = read_checkpoint(folder.join(file), flag="--decoder")
    tensors = {renamed(name): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(HALF)}
    problems = misfits(wanted, tensors)
    require(not problems, f"{shown}; its weights do not fit its {CONFIG}: of its tensors, {', '.join(problems)}")
    scaling, shift = (float(wanted.config[name] or 0) for name in ("scaling_factor", "shift_factor"))
    channels, pictures = wanted.config["latent_channels"], wanted.config["out_channels"]
    factor = 2 ** (len(wanted.config["block_out_channels"]) - 1)
    return Network(
        spec=NetworkSpec(
            family="autoencoder",
            options=AutoencoderOptions(wanted.config),
            shape=(channels, 1, 1),
            kind="decoder",
            decodes=Decodes(channels, factor, pictures, scaling, shift),
        ),
        build=partial(build, wanted.config),
        prepare=as_it_is,
        tensors=tensors,
        weights=weights_hash(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        sha256=checkpoint.sha256,
    )


def read_config(folder: Folder, shown: str) -> dict[str, Any]:
    """The config of an AutoencoderKL. Raises RequestError: there is none, or it is of another class."""
    pipeline = "; it is that of a pipeline: give its folder vae" if "model_index.json" in folder.names else ""
    require(
        CONFIG in folder.names,
        f"{shown}, which has no {CONFIG}{pipeline or f'; give the directory of an {CLASS} of diffusers'}",
    )
    with open_source(folder.join(CONFIG), "--decoder") as source:
        assert isinstance(source, Source)
        try:
            config = json.loads(source.file.read(MAX_CONFIG))
        except (ValueError, RecursionError):
            config = None
    require(isinstance(config, dict), f"{shown}, whose {CONFIG} is damaged; fetch it again")
    kind = config.get("_class_name")
    require(kind == CLASS, f"{shown}, whose {CONFIG} is of class {kind!a:.60}; it must be {CLASS}")
    for name in ("latents_mean", "latents_std", "quantization_config"):
        require(
            config.get(name) is None,
            f"{shown}, whose {CONFIG} has {name}; only an {CLASS} with scaling_factor and shift_factor can be used",
        )
    return dict(config)


def weights_file(folder: Folder, shown: str) -> str:
    """The name of the weights, or of the index of several files; those of no variant come first.

    Raises:
        RequestError: there are none, or none that can be read without running code.
    """
    found = {name: match for name in folder.names if (match := WEIGHTS.fullmatch(name))}
    if not found:
        pickled = [name for name in folder.names if name.endswith((".bin", ".pt", ".ckpt"))]
        why = f"only {pickled[0]}, which may hold code; save it with safe_serialization=True" if pickled else "nothing"
        raise RequestError(f"{shown}, which must have diffusion_pytorch_model.safetensors, but has {why}")
    return min(found, key=lambda name: (any(found[name].groups()), name))


def described(config: dict[str, Any], shown: str) -> Decoder:
    """The network that a config describes, without memory. Raises RequestError: it describes none that can be used."""
    try:
        decoder = without_memory(lambda: Decoder(config))
        assert isinstance(decoder, Decoder)
    except RequestError:
        raise
    except Exception as error:  # whatever diffusers raises of values that it did not expect
        raise RequestError(
            f"{shown}, whose {CONFIG} describes no {CLASS} ({type(error).__name__}: {printable(error)})"
        ) from error
    scaling, shift, pictures = (decoder.config[name] for name in ("scaling_factor", "shift_factor", "out_channels"))
    sound = isinstance(scaling, int | float) and 0 < scaling < math.inf
    require(sound, f"{shown}, whose {CONFIG} has scaling_factor {scaling!a:.60}; it must be a number above 0")
    sound = shift is None or (isinstance(shift, int | float) and math.isfinite(shift))
    require(sound, f"{shown}, whose {CONFIG} has shift_factor {shift!a:.60}; it must be a number")
    require(pictures in (1, 3), f"{shown}, which makes pictures of {pictures} channels; they must have 1 or 3")
    return decoder


def renamed(name: str) -> str:
    """A tensor's name as diffusers has it now."""
    return re.sub(rf"(\.attentions\.\d+)\.({'|'.join(RENAMED)})\.", lambda m: f"{m[1]}.{RENAMED[m[2]]}.", name)


def build(config: Mapping[str, Any], precision: Precision) -> nn.Module:
    return without_memory(lambda: Decoder(config)).to(DTYPES[precision])


EDM2_LATENTS: dict[str, Any] = {
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0,
    "final_std": 0.5,
}
"""How latents of Stable Diffusion's autoencoder are scaled, by channel, for the networks of EDM2:
what its StabilityVAEEncoder has by default."""


class Rule(NamedTuple):
    """How a publication turns the solver's results into what its decoder takes, and that into pixels."""

    latents: Callable[[Tensor, Decodes], Tensor]
    """x (B, C, H, W) float32 -> z."""
    unit: bool
    """Whether the decoder's pictures are taken to be in [0, 1], and not in [-1, 1]."""
    channels: int | None = None
    """Of the only latents for which it is; None: of any."""


def sd_latents(x: Tensor, decodes: Decodes) -> Tensor:
    """As Stable Diffusion, DiT, SiT and REPA scale latents."""
    return x / decodes.scaling + decodes.shift


def edm2_latents(x: Tensor, decodes: Decodes) -> Tensor:
    """As EDM2 scales latents, to a deviation of 0.5 by channel; what the autoencoder's config says is not used."""
    mean, std = (torch.tensor(EDM2_LATENTS[name], device=x.device)[:, None, None] for name in ("raw_mean", "raw_std"))
    scale = EDM2_LATENTS["final_std"] / std
    return (x + mean * scale) / scale


RULES = {
    "sd": Rule(sd_latents, unit=False),
    "edm2": Rule(edm2_latents, unit=True, channels=len(EDM2_LATENTS["raw_mean"])),
}
"""By name: what `NetworkSpec.latent` is."""


LATENT_CHANNELS = 4
FACTOR = 4
"""Pixels in a row for each of a latent."""


class DigitsDecoder(nn.Module):
    """Latents of unit variance -> pictures of about [-1, 1] with three equal channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(LATENT_CHANNELS, 64, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(64, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(48, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        grey: Tensor = self.layers(latents)
        return grey.expand(-1, 3, -1, -1)


def is_digits(checkpoint: Checkpoint) -> bool:
    return checkpoint.tensors.keys() == without_memory(DigitsDecoder).state_dict().keys()


def open_digits(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """The bundled weights, which fit."""
    spec = NetworkSpec(
        family="digits-decoder",
        options=AutoencoderOptions({}),
        shape=(LATENT_CHANNELS, 1, 1),
        kind="decoder",
        decodes=Decodes(LATENT_CHANNELS, FACTOR, pictures=3),
    )
    return Opened(spec, checkpoint.tensors)


def build_digits(spec: NetworkSpec, precision: Precision) -> nn.Module:
    return DigitsDecoder().to(DTYPES[precision])


DIGITS_DECODER = Family("digits-decoder", is_digits, open_digits, build_digits)
