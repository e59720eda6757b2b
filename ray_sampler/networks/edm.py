"""The networks of EDM (Karras et al. 2022): SongUNet, that is DDPM++ and NCSN++ of Song et al. 2021.

The third one, DhariwalUNet, is the ADM network under other names: see dhariwal.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.networks import adm_unet as adm
from ray_sampler.networks.layers import BOX, attend, double, halve, padding_of
from ray_sampler.networks.nvidia import MOST_BLOCKS, Arguments, Refused, SavedNetwork, check_sizes

PREFIX = "model."
EPS = 1e-6
MAX_PERIOD = 10_000.0

Preconditioning = Literal["edm", "vp", "ve", "iddpm"]
Resample = Literal["keep", "up", "down"]
Embedding = Literal["positional", "fourier"]
Encoder = Literal["standard", "residual"]
EMBEDDINGS: tuple[Embedding, ...] = ("positional", "fourier")
ENCODERS: tuple[Encoder, ...] = ("standard", "residual")

PRECONDITIONINGS: dict[str, Preconditioning] = {
    "EDMPrecond": "edm",
    "Precond": "edm",
    "VPPrecond": "vp",
    "VEPrecond": "ve",
    "iDDPMPrecond": "iddpm",
}


@dataclass(frozen=True, kw_only=True)
class SongUNetOptions:
    """The shape of the network. The defaults are EDM's."""

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    """Classes; 0 for an unconditional network."""
    augment_dim: int = 0
    """Of the augmentation label, which is left out in sampling."""
    model_channels: int = 128
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    channel_mult_emb: float = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    embedding_type: Embedding = "positional"
    channel_mult_noise: float = 1
    encoder_type: Encoder = "standard"
    resample_filter: tuple[float, ...] = BOX

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level, from the full resolution down."""
        return tuple(round(self.model_channels * multiplier) for multiplier in self.channel_mult)

    @property
    def emb_channels(self) -> int:
        return round(self.model_channels * self.channel_mult_emb)

    @property
    def noise_channels(self) -> int:
        return round(self.model_channels * self.channel_mult_noise)


def preconditioning(saved: SavedNetwork) -> Preconditioning:
    """How the class of the object around a network makes a denoiser of it.

    Raises:
        Refused: it is none of the published ones.
    """
    if saved.class_name not in PRECONDITIONINGS:
        known = ", ".join(name for name, kind in PRECONDITIONINGS.items() if kind != "iddpm")
        raise Refused(f"its network is preconditioned by {saved.class_name[:60]!a}; only {known} can be sampled")
    return PRECONDITIONINGS[saved.class_name]


def options_from(saved: SavedNetwork) -> SongUNetOptions:
    """What a snapshot's network was made with.

    Raises:
        Refused: it is not a SongUNet, or has an invalid argument or one that no published network has.
    """
    arguments = Arguments(saved.arguments)
    arguments.choice("model_type", ("SongUNet",))
    arguments.choice("decoder_type", ("standard",))
    channels = arguments.number("img_channels", 3)
    inputs, outputs = arguments.number("in_channels", channels), arguments.number("out_channels", channels)
    if outputs != inputs:
        raise Arguments.refused("out_channels", outputs, f"{inputs}, as many as it takes in,")
    options = SongUNetOptions(
        img_resolution=arguments.number("img_resolution"),
        in_channels=inputs,
        out_channels=outputs,
        label_dim=arguments.number("label_dim", 0, least=0),
        augment_dim=arguments.number("augment_dim", 0, least=0),
        model_channels=arguments.number("model_channels", 128),
        channel_mult=arguments.numbers("channel_mult", (1, 2, 2, 2)),
        channel_mult_emb=arguments.factor("channel_mult_emb", 4),
        num_blocks=arguments.number("num_blocks", 4, most=MOST_BLOCKS),
        attn_resolutions=arguments.resolutions("attn_resolutions", (16,)),
        embedding_type=arguments.choice("embedding_type", EMBEDDINGS),
        channel_mult_noise=arguments.factor("channel_mult_noise", 1),
        encoder_type=arguments.choice("encoder_type", ENCODERS),
        resample_filter=arguments.numbers("resample_filter", BOX, even=True),
    )
    check_sizes(options.img_resolution, options.channels, options.noise_channels // 2, options.emb_channels)
    return options


def groups_of(channels: int) -> int:
    """The number of groups in which EDM's networks normalise these channels."""
    return max(min(32, channels // 4), 1)


class Norm(nn.GroupNorm):
    """Group normalisation, computed in float32 whatever the input's type, which the output keeps."""

    def __init__(self, channels: int) -> None:
        groups = groups_of(channels)
        if channels % groups:
            raise Refused(f"its network normalises {channels} channels, which cannot be split into {groups} groups")
        super().__init__(groups, channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


class Convolution(adm.Convolution):
    """A convolution of constant size that resamples its input first."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, resample: Resample = "keep", taps: tuple[float, ...] = BOX
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.resample = resample
        self.taps = taps

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        if self.resample != "keep":
            input = (double if self.resample == "up" else halve)(input, self.taps)
        return super().forward(input, doubled)


class AuxiliaryConvolution(Convolution):
    """A convolution of the residual encoder: it is wider padded, then halved without padding, then shifted.

    Padding each by itself gives other values at the edges.
    """

    def __init__(self, inputs: int, outputs: int, taps: tuple[float, ...]) -> None:
        super().__init__(inputs, outputs, 3, "down", taps)

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        assert self.bias is not None
        h = F.conv2d(input, self.weight, padding=1 + padding_of(self.taps))
        return halve(h, self.taps, padding=0) + self.bias[:, None, None]


class Block(nn.Module):
    """A residual block, conditioned on an embedding, with attention in one head if so told."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        options: SongUNetOptions,
        resample: Resample = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        taps = options.resample_filter
        self.in_channels = inputs
        self.norm0 = Norm(inputs)
        self.conv0 = Convolution(inputs, outputs, 3, resample, taps)
        self.affine = nn.Linear(options.emb_channels, outputs)
        self.norm1 = Norm(outputs)
        self.conv1 = Convolution(outputs, outputs, 3)
        same = inputs == outputs and resample == "keep"
        self.skip = None if same else Convolution(inputs, outputs, 1, resample, taps)
        self.norm2 = Norm(outputs) if attention else None
        self.qkv = Convolution(outputs, outputs * 3, 1) if attention else None
        self.proj = Convolution(outputs, outputs, 1) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, inputs, H, W), and (B, emb_channels) float32."""
        h = self.conv0(F.silu(self.norm0(x)))
        h = h + self.affine(emb)[:, :, None, None].to(h.dtype)
        h = self.conv1(F.silu(self.norm1(h)))
        x = (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        if self.norm2 is not None and self.qkv is not None and self.proj is not None:
            x = (self.proj(attended(self.qkv(self.norm2(x)))) + x) * math.sqrt(0.5)
        return x


def attended(qkv: Tensor) -> Tensor:
    """Attention in one head. The channels of qkv are ordered (channels, 3)."""
    b, channels, h, w = qkv.shape
    q, k, v = qkv.reshape(b, 1, channels // 3, 3, h * w).unbind(3)
    return attend(q, k, v).reshape(b, channels // 3, h, w)


class FourierNoise(nn.Module):
    """(B,) -> (B, channels): cosines and sines of random frequencies, which are part of the file."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x, 2 * math.pi * self.freqs.float())
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def positional(x: Tensor, channels: int) -> Tensor:
    """(B,) -> (B, channels): sines and cosines of frequencies from 1 to 1 / MAX_PERIOD, both included."""
    half = channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=x.device) / max(half - 1, 1)
    angles = torch.outer(x, MAX_PERIOD**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class SongUNet(nn.Module):
    """F(x, c_noise, y): (B, in_channels, H, W) float32, (B,) or (1,) float32, (B,) int64 or None
    -> (B, out_channels, H, W) float32.

    Label `label_dim`, and None, is the null label. The state dict has the names of the published files without `model.`
    and without the filters (see `nvidia.stripped`).
    """

    def __init__(self, options: SongUNetOptions) -> None:
        super().__init__()
        self.options = options
        self.dtype = torch.float32
        noise, emb = options.noise_channels, options.emb_channels
        if options.embedding_type == "fourier":
            self.map_noise = FourierNoise(noise)
        self.map_label = nn.Linear(options.label_dim, noise) if options.label_dim else None
        self.map_augment = nn.Linear(options.augment_dim, noise, bias=False) if options.augment_dim else None
        self.map_layer0 = nn.Linear(noise, emb)
        self.map_layer1 = nn.Linear(emb, emb)
        self.enc = nn.ModuleDict(dict(_encoder(options)))
        self.dec = nn.ModuleDict(dict(_decoder(options)))

    def embedding(self, c_noise: Tensor, y: Tensor | None) -> Tensor:
        """(B, emb_channels) float32; (1, emb_channels) where neither argument has more rows."""
        fourier = self.options.embedding_type == "fourier"
        emb = self.map_noise(c_noise) if fourier else positional(c_noise, self.options.noise_channels)
        if self.map_label is not None:
            classes = torch.arange(self.options.label_dim, device=emb.device)
            label = torch.zeros_like(classes[None]) if y is None else y[:, None] == classes
            emb = emb + self.map_label(label.to(emb.dtype) * math.sqrt(self.options.label_dim))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embedding(c_noise.float(), y)
        h = aux = x.to(self.dtype)
        skips: list[Tensor] = []
        for block in self.enc.values():
            if isinstance(block, AuxiliaryConvolution):
                h = aux = skips[-1] = (h + block(aux)) * math.sqrt(0.5)
            else:
                h = block(h, emb) if isinstance(block, Block) else block(h)
                skips.append(h)
        for block in self.dec.values():
            if not isinstance(block, Block):
                continue
            if h.shape[1] != block.in_channels:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
        norm, convolution = list(self.dec.values())[-2:]
        return convolution(F.silu(norm(h.float())))

    def convert_torso(self, dtype: torch.dtype) -> SongUNet:
        """Compute the convolutions between the embedding and the output in `dtype`; the rest stays float32."""
        for block in (*self.enc.values(), *list(self.dec.values())[:-1]):
            for module in block.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(dtype)
        self.dtype = dtype
        return self


def _encoder(options: SongUNetOptions) -> Iterator[tuple[str, nn.Module]]:
    before, aux = options.model_channels, options.in_channels
    for level, channels in enumerate(options.channels):
        size = f"{options.img_resolution >> level}x{options.img_resolution >> level}"
        if level == 0:
            yield f"{size}_conv", Convolution(options.in_channels, before, 3)
        else:
            yield f"{size}_down", Block(before, before, options, "down")
            if options.encoder_type == "residual":
                yield f"{size}_aux_residual", AuxiliaryConvolution(aux, before, options.resample_filter)
                aux = before
        for i in range(options.num_blocks):
            attention = options.img_resolution >> level in options.attn_resolutions
            yield f"{size}_block{i}", Block(before, channels, options, attention=attention)
            before = channels


def _decoder(options: SongUNetOptions) -> Iterator[tuple[str, nn.Module]]:
    """The decoder by name. The first of its blocks always attends; of a level's, the last does."""
    skips = [options.model_channels]
    for level, channels in enumerate(options.channels):
        skips += skips[-1:] * (level > 0) + [channels] * options.num_blocks
    before = options.channels[-1]
    for level, channels in reversed(list(enumerate(options.channels))):
        size = f"{options.img_resolution >> level}x{options.img_resolution >> level}"
        if level == len(options.channels) - 1:
            yield f"{size}_in0", Block(before, before, options, attention=True)
            yield f"{size}_in1", Block(before, before, options)
        else:
            yield f"{size}_up", Block(before, before, options, "up")
        for i in range(options.num_blocks + 1):
            attention = i == options.num_blocks and options.img_resolution >> level in options.attn_resolutions
            yield f"{size}_block{i}", Block(before + skips.pop(), channels, options, attention=attention)
            before = channels
    yield f"{size}_aux_norm", Norm(before)
    yield f"{size}_aux_conv", Convolution(before, options.out_channels, 3)
