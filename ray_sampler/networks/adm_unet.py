"""The UNet of ADM (Dhariwal & Nichol 2021), as EDM and consistency checkpoints use it.

Module names are a contract: the state dict has the keys and shapes of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.networks.adm_options import AdmOptions

GROUPS = 32
MAX_PERIOD = 10_000.0
ONEDNN = torch.backends.mkldnn.is_available()


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding: (B,) float times -> (B, dim) float32, cosines first, then sines."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(MAX_PERIOD) * exponents)
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def inferring_on_cpu(x: Tensor) -> bool:
    """Whether what replaces torch's kernels may compute `x`: eagerly, on a CPU and without gradients."""
    return x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class GroupNorm(nn.GroupNorm):
    """32 groups, computed in float32 whatever the input's type, which the output keeps.

    On a CPU the sums of each channel are taken over whole pixels, in the order in which they lie in memory: torch's own
    kernel goes from group to group, which are only two or three channels wide in a small network. The variance is
    that kernel's as well: mean of squares less square of the mean.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(GROUPS, channels), channels)

    def forward(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> norm(input), times 1 + scale and plus shift if those are given, (B, C) each."""
        x = input.float()
        if not inferring_on_cpu(x):
            x = super().forward(x).to(input.dtype)
            if scale is None or shift is None:
                return x
            return torch.addcmul(shift[..., None, None], x, 1 + scale[..., None, None])
        sums = torch.stack([x.sum((2, 3)), x.square().sum((2, 3))])
        count = x[0].numel() // self.num_groups
        mean, square = sums.unflatten(2, (self.num_groups, -1)).sum(3, keepdim=True).div_(count)
        deviation = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(self.eps).rsqrt_()
        factor = self.weight.view(self.num_groups, -1) * deviation
        offset = torch.addcmul(self.bias.view(self.num_groups, -1), factor, mean, value=-1)
        factor, offset = factor.flatten(1), offset.flatten(1)
        if scale is not None and shift is not None:
            scale = 1 + scale.float()
            factor, offset = factor * scale, torch.addcmul(shift.float(), scale, offset)
        return torch.addcmul(offset[..., None, None], x, factor[..., None, None]).to(input.dtype)


class Convolution(nn.Conv2d):
    """A convolution that always takes oneDNN's kernel for float32 on a CPU.

    Where one thread computes a batch of less than 16, torch chooses a gather and a matrix product, half as fast.
    """

    def forward(self, input: Tensor, doubled: bool = False) -> Tensor:
        """(B, C, H, W) -> the convolution of it, or if `doubled` of its nearest-neighbour doubling."""
        if not (ONEDNN and input.dtype == torch.float32 and inferring_on_cpu(input)):
            return super().forward(double(input) if doubled else input)
        return self._of_doubled(input) if doubled else self._onednn(input, self.weight)

    def _onednn(self, input: Tensor, weight: Tensor) -> Tensor:
        assert not isinstance(self.padding, str)
        return torch.mkldnn_convolution(input, weight, self.bias, self.padding, self.stride, self.dilation, self.groups)

    def _of_doubled(self, input: Tensor) -> Tensor:
        """A 3x3 convolution of the doubled input, without it.

        A row of the output sees two rows of the input, one of them twice, and so do the columns: four 2x2
        convolutions, one for each parity of row and column, give it with 16 products where 36 would be needed.
        """
        b, _, h, w = input.shape
        taps = input.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # (parity, tap, of the three)
        weights = torch.einsum("pai,qbj,kcij->pqkcab", taps, taps, self.weight)
        layout = torch.channels_last
        output = torch.empty((b, self.out_channels, 2 * h, 2 * w), memory_format=layout)
        for p, q in product(range(2), repeat=2):
            seen = self._onednn(input, weights[p, q].contiguous(memory_format=layout))
            output[:, :, p::2, q::2] = seen[:, :, p : p + h, q : q + w]
        return output


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, doubled=True)


class Downsample(nn.Module):
    """A 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = Convolution(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


Resample = Callable[[Tensor], Tensor]


class ResBlock(nn.Module):
    """Residual block, conditioned on an embedding of (B, embedding_channels).

    `resample` (double or halve), if given, acts on both branches: on the residual one after the
    first normalisation and SiLU and before its convolution.
    """

    def __init__(self, channels: int, out_channels: int, arch: AdmOptions, resample: Resample | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.scale_shift = arch.use_scale_shift_norm
        self.in_layers = nn.Sequential(
            GroupNorm(channels), nn.SiLU(inplace=True), Convolution(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(arch.embedding_channels, out_channels * (2 if self.scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNorm(out_channels),
            nn.SiLU(inplace=True),
            nn.Dropout(arch.dropout),
            zeroed(Convolution(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else Convolution(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm_in, silu_in, conv_in = self.in_layers
        h = silu_in(norm_in(x))
        if self.resample is halve:
            h = halve(h)
        h = conv_in(h, doubled=self.resample is double)
        shift = self.emb_layers(emb).to(h.dtype)
        norm_out, *activate_and_convolve = self.out_layers
        h = norm_out(h, *shift.chunk(2, dim=1)) if self.scale_shift else norm_out(h + shift[:, :, None, None])
        for layer in activate_and_convolve:
            h = layer(h)
        return h.add_(self.skip_connection(self.resample(x) if self.resample else x))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, residual. The channels of qkv are ordered (3, heads, head_dim)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = Convolution(channels, channels * 3, 1)
        self.proj_out = zeroed(Convolution(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v)
        a = a.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)
        return self.proj_out(a).add_(x)


class Block(nn.Sequential):
    """Layers in a row, of which the residual blocks take the embedding as well."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(nn.Module):
    """F(x, time, y): (B, C, H, W) float32, (B,) times, (B,) int64 labels or None -> (B, C, H, W) float32.

    The output is float32. Where the network has a variance half (learn_sigma), that is computed and dropped.
    """

    def __init__(self, arch: AdmOptions) -> None:
        super().__init__()
        self.arch = arch
        self.dtype = torch.float32
        width, multipliers = arch.num_channels, arch.channel_multipliers
        self.time_embed = nn.Sequential(
            nn.Linear(width, arch.embedding_channels),
            nn.SiLU(),
            nn.Linear(arch.embedding_channels, arch.embedding_channels),
        )
        if arch.class_cond:
            self.label_emb = nn.Embedding(arch.num_labels, arch.embedding_channels)

        def attention(channels: int, heads: int) -> AttentionBlock:
            return AttentionBlock(channels, arch.heads_at(channels, heads))

        first = channels = int(multipliers[0] * width)
        self.input_blocks = nn.ModuleList([Block(Convolution(arch.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(arch.num_res_blocks):
                layers: list[nn.Module] = [ResBlock(channels, channels := int(multiplier * width), arch)]
                if arch.attends_at(level):
                    layers.append(attention(channels, arch.num_heads))
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level != len(multipliers) - 1:
                down = ResBlock(channels, channels, arch, halve) if arch.resblock_updown else Downsample(channels)
                self.input_blocks.append(Block(down))
                skips.append(channels)

        self.middle_block = Block(
            ResBlock(channels, channels, arch),
            attention(channels, arch.num_heads),
            ResBlock(channels, channels, arch),
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for i in range(arch.num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), channels := int(multiplier * width), arch)]
                if arch.attends_at(level):
                    layers.append(attention(channels, arch.heads_upsample))
                if level and i == arch.num_res_blocks:
                    layers.append(
                        ResBlock(channels, channels, arch, double) if arch.resblock_updown else Upsample(channels)
                    )
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            GroupNorm(channels), nn.SiLU(inplace=True), zeroed(Convolution(first, arch.out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.arch.num_channels))
        if (y is not None) != self.arch.class_cond:
            raise ValueError("labels y are needed if and only if the model is class-conditional")
        if y is not None:
            emb = emb + self.label_emb(y)
        h = x.to(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self.out(h.to(x.dtype))[:, : self.arch.in_channels]

    def convert_torso(self, dtype: torch.dtype) -> UNet:
        """Compute the convolutions between the embeddings and the output in `dtype`; the rest stays float32."""
        for torso in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in torso.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(dtype)
        self.dtype = dtype
        return self

    def convert_to_fp16(self) -> None:
        self.convert_torso(torch.float16)

    def convert_to_fp32(self) -> None:
        self.convert_torso(torch.float32)


def zeroed(conv: nn.Conv2d) -> nn.Conv2d:
    """`conv` with all parameters 0: each residual branch of a new network begins as the identity."""
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv
