"""The UNet of EDM2 (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models").

All its weights are normalised: what a layer multiplies with is w / (eps + |w| / sqrt(n)) for each output, times a gain
over sqrt(n). In sampling that is a constant, so `fold` computes it once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.networks.decoders import EDM2_LATENTS
from ray_sampler.networks.layers import BOX, attend, double, halve
from ray_sampler.networks.nvidia import MOST_BLOCKS, Arguments, Refused, SavedNetwork, check_sizes

EPS = 1e-4
SILU_GAIN = 0.596
"""Standard deviation of silu(x) for normal x."""
PREFIX = "unet."
CHANNELS_PER_HEAD = 64


@dataclass(frozen=True, kw_only=True)
class Edm2Options:
    """The shape of the network."""

    img_resolution: int
    img_channels: int
    label_dim: int
    """Classes; 0 for an unconditional network."""
    channels: tuple[int, ...]
    """Of each level, from the full resolution down."""
    noise_channels: int
    emb_channels: int
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    channels_per_head: int = CHANNELS_PER_HEAD
    """At least: there are channels // this heads, wider ones where that is not exact; with none, no attention."""
    resample_filter: tuple[float, ...] = BOX
    label_balance: float = 0.5
    concat_balance: float = 0.5
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float = 256.0


def options_from(saved: SavedNetwork) -> Edm2Options:
    """What a snapshot's network was made with.

    Raises:
        Refused: it is not an EDM2 network, or has an invalid argument.
    """
    arguments = Arguments(saved.arguments)
    width = arguments.number("model_channels")
    channels = tuple(round(width * multiplier) for multiplier in arguments.numbers("channel_mult", (1, 2, 3, 4)))
    noise, emb = (arguments.factor(name, None) for name in ("channel_mult_noise", "channel_mult_emb"))
    options = Edm2Options(
        img_resolution=arguments.number("img_resolution"),
        img_channels=arguments.number("img_channels"),
        label_dim=arguments.number("label_dim", 0, least=0),
        channels=channels,
        noise_channels=channels[0] if noise is None else round(width * noise),
        emb_channels=max(channels) if emb is None else round(width * emb),
        num_blocks=arguments.number("num_blocks", 3, most=MOST_BLOCKS),
        attn_resolutions=arguments.resolutions("attn_resolutions", (16, 8)),
        channels_per_head=arguments.number("channels_per_head", CHANNELS_PER_HEAD),
        resample_filter=arguments.numbers("resample_filter", BOX, even=True),
        **{name: arguments.fraction(name, getattr(Edm2Options, name)) for name in _BALANCES},
        clip_act=math.inf if saved.arguments.get("clip_act", 0) is None else arguments.factor("clip_act", 256.0),
    )
    _check(options)
    return options


_BALANCES = ("label_balance", "concat_balance", "res_balance", "attn_balance")


def options_from_shapes(tensors: Mapping[str, Tensor], channels_per_head: int = 0) -> Edm2Options:
    """The options that follow from the shapes of a state dict (names with or without `unet.`); the others
    are as published: the filter [1, 1], the balances and, unless given above 0, 64 channels in an attention head.

    Raises:
        Refused: these are not the tensors of an EDM2 network.
    """
    shapes = {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in tensors.items()}
    per_head = channels_per_head or CHANNELS_PER_HEAD
    try:
        firsts = [name for name in shapes if re.fullmatch(r"enc\.\d+x\d+_conv\.weight", name)]
        resolution = int(firsts[0].split(".")[1].partition("x")[0])
        found = [re.fullmatch(r"enc\.(\d+)x\d+_block(\d+)\.conv_res1\.weight", name) for name in shapes]
        blocks = [(int(match[1]), int(match[2])) for match in found if match]
        levels = sorted({size for size, _ in blocks}, reverse=True)
        options = Edm2Options(
            img_resolution=resolution,
            img_channels=shapes["out_conv.weight"][0],
            label_dim=shapes["emb_label.weight"][1] if "emb_label.weight" in shapes else 0,
            channels=tuple(shapes[f"enc.{size}x{size}_block0.conv_res1.weight"][0] for size in levels),
            noise_channels=shapes["emb_fourier.freqs"][0],
            emb_channels=shapes["emb_noise.weight"][0],
            num_blocks=1 + max(number for _, number in blocks),
            attn_resolutions=tuple(s for s in levels if f"enc.{s}x{s}_block0.attn_qkv.weight" in shapes),
            channels_per_head=per_head,
        )
        if options.num_blocks > min(len(blocks), MOST_BLOCKS):
            raise LookupError("a block without those before it")
    except (LookupError, ValueError) as error:
        raise Refused("its tensors are not those of an EDM2 network") from error
    widths = [shape[0] for name, shape in shapes.items() if name.endswith("attn_proj.weight")]
    if widths and min(widths) < per_head:
        raise Refused(
            f"its attention has {min(widths)} channels, fewer than the {per_head} of a head that are assumed "
            "unless --num_head_channels says how many they are; give --num_head_channels"
        )
    _check(options)
    return options


def _check(options: Edm2Options) -> None:
    check_sizes(options.img_resolution, options.channels, options.noise_channels, options.emb_channels)
    bottom = options.img_resolution >> len(options.channels) - 1
    for level, channels in enumerate(options.channels):
        attends = options.img_resolution >> level in (*options.attn_resolutions, bottom)
        heads = channels // options.channels_per_head
        if attends and heads and channels % heads:
            raise Refused(f"its network has {channels} channels in heads of {options.channels_per_head}")


def latents(encoder: SavedNetwork | None) -> bool:
    """Whether x is a latent of a VAE, and not pixels, as the encoder recorded beside the network ("encoder") shows.

    Raises:
        Refused: an encoder of another kind.
    """
    if encoder is None or encoder.class_name == "StandardRGBEncoder":
        return False
    if encoder.class_name == "StabilityVAEEncoder":
        for name, published in EDM2_LATENTS.items():
            given = encoder.arguments.get(name, published)
            if (list(given) if isinstance(given, tuple) else given) != published:
                raise Refused(f"its latents were scaled with {name} {ascii(given)[:60]}; only {published} is known")
        return True
    raise Refused(f"its pictures are encoded by {encoder.class_name[:60]!a}, which is not known")


def normalize(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x / (eps + root mean square of x over `dims`), which is computed in float32."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / torch.add(EPS, norm, alpha=math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    return F.silu(x) / SILU_GAIN


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a.lerp(b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    count_a, count_b = a.shape[1], b.shape[1]
    scale = math.sqrt((count_a + count_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(count_a)), b * (scale * t / math.sqrt(count_b))], dim=1)


def layout_of(x: Tensor) -> torch.memory_format:
    """Of convolutions. On a CPU it is the published network's: another one sums in another order, and solvers with
    guidance and churn make 1e-4 of that."""
    return torch.channels_last if x.is_cuda and x.dim() == 4 else torch.contiguous_format


class Fourier(nn.Module):
    """(B,) -> (B, channels) float32: sqrt(2) cos(x freqs + phases)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels))
        self.register_buffer("phases", torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(x.float(), self.freqs.float()) + self.phases.float()
        return math.sqrt(2) * angles.cos()


class Layer(nn.Module):
    """A linear layer (no `kernel`) or a convolution of constant padding, without a bias."""

    def __init__(self, inputs: int, outputs: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.folded = False

    def effective(self, gain: Tensor | float = 1.0) -> Tensor:
        """The weight that is multiplied with, float32.

        The gain is divided in the dtype in which it is stored, and widened after that: so do the published networks.
        """
        scale = gain / math.sqrt(self.weight[0].numel())
        return normalize(self.weight.float(), tuple(range(1, self.weight.dim()))) * scale

    def fold(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> None:
        self.weight = nn.Parameter(self.weight.detach().contiguous(), requires_grad=False)
        effective = self.effective(gain)
        weight = torch.empty(effective.shape, dtype=dtype, device=effective.device)  # 1x1 kernels keep odd strides else
        self.weight.data = weight.copy_(effective).contiguous(memory_format=layout_of(weight))
        self.folded = True

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.weight if self.folded else self.effective(gain).to(x.dtype)
        return F.linear(x, weight) if weight.dim() == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """A residual block of the encoder or the decoder, conditioned on an embedding, with attention if so told."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        options: Edm2Options,
        flavor: Literal["enc", "dec"],
        resample: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
    ) -> None:
        super().__init__()
        self.options = options
        self.flavor = flavor
        self.resample = resample
        self.heads = outputs // options.channels_per_head if attention else 0
        self.emb_gain = nn.Parameter(torch.empty(()))
        self.conv_res0 = Layer(outputs if flavor == "enc" else inputs, outputs, 3, 3)
        self.emb_linear = Layer(options.emb_channels, outputs)
        self.conv_res1 = Layer(outputs, outputs, 3, 3)
        self.conv_skip = Layer(inputs, outputs, 1, 1) if inputs != outputs else None
        self.attn_qkv = Layer(outputs, outputs * 3, 1, 1) if self.heads else None
        self.attn_proj = Layer(outputs, outputs, 1, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, inputs, H, W), and (B, emb_channels) float32."""
        if self.resample != "keep":
            x = (halve if self.resample == "down" else double)(x, self.options.resample_filter)
        if self.flavor == "enc":
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = normalize(x, (1,))
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain) + 1
        y = self.conv_res1(mp_silu(y * scale[:, :, None, None].to(y.dtype)))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.options.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = mp_sum(x, self.attn_proj(self.attended(self.attn_qkv(x))), self.options.attn_balance)
        return x.clamp(-self.options.clip_act, self.options.clip_act)

    def attended(self, qkv: Tensor) -> Tensor:
        """Cosine attention. The channels of qkv are ordered (heads, channels of a head, 3)."""
        b, channels, h, w = qkv.shape
        q, k, v = normalize(qkv.reshape(b, self.heads, -1, 3, h * w), (2,)).unbind(3)
        return attend(q, k, v).reshape(b, channels // 3, h, w)

    def fold(self, dtype: torch.dtype) -> None:
        self.emb_linear.fold(torch.float32, self.emb_gain)
        for layer in (self.conv_res0, self.conv_res1, self.conv_skip, self.attn_qkv, self.attn_proj):
            if layer is not None:
                layer.fold(dtype)


class Edm2UNet(nn.Module):
    """F(x, c_noise, y): (B, C, H, W) float32, (B,) or (1,) float32, (B,) int64 or None -> (B, C, H, W) float32.

    Label `label_dim`, and None, is the null label. The state dict has the names of the published files without `unet.`
    (see `nvidia.stripped`); its tensors may be kept as they are stored, float16 or float32, until `fold`.
    """

    def __init__(self, options: Edm2Options) -> None:
        super().__init__()
        self.options = options
        self.dtype = torch.float32
        self.out_gain = nn.Parameter(torch.empty(()))
        self.emb_fourier = Fourier(options.noise_channels)
        self.emb_noise = Layer(options.noise_channels, options.emb_channels)
        self.emb_label = Layer(options.label_dim, options.emb_channels) if options.label_dim else None
        self.enc, outputs = _encoder(options)
        self.dec = _decoder(options, outputs)
        self.out_conv = Layer(options.channels[0], options.img_channels, 3, 3)

    def embedding(self, c_noise: Tensor, y: Tensor | None) -> Tensor:
        """(B, emb_channels) float32; (1, emb_channels) where neither argument has more rows."""
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            classes = torch.arange(self.options.label_dim, device=emb.device)
            label = torch.zeros_like(classes[None]) if y is None else y[:, None] == classes
            scaled = label.to(emb.dtype) * math.sqrt(self.options.label_dim)
            emb = mp_sum(emb, self.emb_label(scaled), self.options.label_balance)
        return mp_silu(emb)

    def forward(self, x: Tensor, c_noise: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embedding(c_noise, y)
        h = x.to(self.dtype)
        h = torch.cat([h, torch.ones_like(h[:, :1])], dim=1).contiguous(memory_format=layout_of(h))
        skips = []
        for block in self.enc.values():
            h = block(h, emb) if isinstance(block, Block) else block(h)
            skips.append(h)
        for name, block in self.dec.items():
            if "block" in name:
                h = mp_cat(h, skips.pop(), self.options.concat_balance)
            h = block(h, emb)
        return self.out_conv(h, self.out_gain).float()


def _encoder(options: Edm2Options) -> tuple[nn.ModuleDict, list[int]]:
    """The encoder by name, and the channels of each output of it."""
    blocks: dict[str, nn.Module] = {}
    before = options.channels[0]
    outputs = []
    for level, channels in enumerate(options.channels):
        size = options.img_resolution >> level
        if level == 0:
            blocks[f"{size}x{size}_conv"] = Layer(options.img_channels + 1, before, 3, 3)
        else:
            blocks[f"{size}x{size}_down"] = Block(before, before, options, "enc", "down")
        outputs.append(before)
        for i in range(options.num_blocks):
            attention = size in options.attn_resolutions
            blocks[f"{size}x{size}_block{i}"] = Block(before, channels, options, "enc", attention=attention)
            before = channels
            outputs.append(before)
    return nn.ModuleDict(blocks), outputs


def _decoder(options: Edm2Options, skips: list[int]) -> nn.ModuleDict:
    """The decoder by name. The first of its blocks always attends."""
    blocks: dict[str, nn.Module] = {}
    before = options.channels[-1]
    for level, channels in reversed(list(enumerate(options.channels))):
        size = options.img_resolution >> level
        if level == len(options.channels) - 1:
            blocks[f"{size}x{size}_in0"] = Block(before, before, options, "dec", attention=True)
            blocks[f"{size}x{size}_in1"] = Block(before, before, options, "dec")
        else:
            blocks[f"{size}x{size}_up"] = Block(before, before, options, "dec", "up")
        for i in range(options.num_blocks + 1):
            attention = size in options.attn_resolutions
            inputs = before + skips.pop()
            blocks[f"{size}x{size}_block{i}"] = Block(inputs, channels, options, "dec", attention=attention)
            before = channels
    return nn.ModuleDict(blocks)


@torch.no_grad()
def fold(network: Edm2UNet, dtype: torch.dtype) -> Edm2UNet:
    """Replace the stored weights of `network` by those that it multiplies with, in place and layer by layer.

    Args:
        network: with its weights loaded as stored, on any device.
        dtype: of the torso; the embedding stays float32, as published.

    Returns:
        `network`, for inference alone.
    """
    if network.emb_noise.folded:
        raise ValueError("the network is folded already")
    network.emb_noise.fold(torch.float32)
    if network.emb_label is not None:
        network.emb_label.fold(torch.float32)
    for block in (*network.enc.values(), *network.dec.values()):
        assert isinstance(block, (Block, Layer))
        block.fold(dtype)
    network.out_conv.fold(dtype, network.out_gain)
    network.dtype = dtype
    return network.requires_grad_(False).eval()
