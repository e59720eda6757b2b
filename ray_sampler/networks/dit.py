"""The family `dit`: the transformer of DiT (Peebles & Xie 2023), SiT (Ma et al. 2024) and REPA (Yu et al. 2025).

Their networks are the same, and their shapes determine everything except the attention heads. The prediction leaves no
trace in the weights, except for the projectors that REPA trains beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.families import DitFlags
from ray_sampler.networks.family import (
    DTYPES,
    Family,
    NetworkSpec,
    Opened,
    Precision,
    Told,
    check_fit,
    without_memory,
)
from ray_sampler.networks.weights import Checkpoint

PUBLISHED_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
"""Attention heads by width and depth, of the sizes S, B, L and XL."""

PROJECTORS = "projectors."
"""Begins the names of what REPA trains to match another network's features. Sampling does not use it."""

NORM_EPS = 1e-6
MAX_PERIOD = 10_000.0
PIXELS, SCALING = 8, 0.18215
"""Width in pixels of one place of a latent, and the scaling of latents, in the published models."""

SHOWN = ("pos_embed", "x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight")
"""Names by which a checkpoint of this family is known."""
TABLE = "y_embedder.embedding_table.weight"

MISSING = {
    "prediction": ("PREDICTION", "--prediction eps for DiT, velocity for SiT and REPA"),
    "data_at": ("T", "--data_at 1 for SiT, 0 for REPA"),
    "num_heads": ("HEADS", "--num_heads as the network was trained with"),
}
"""Flags that may have to be given: a placeholder for the value, and what to give."""

OTHER = (
    "it is another transformer than those of DiT, SiT and REPA; give --model python:module:function, which returns it "
    "as a Model"
)


@dataclass(frozen=True, kw_only=True)
class DitOptions:
    """The shape of the network."""

    input_size: int
    """Width and height of x."""
    patch_size: int
    in_channels: int
    out_channels: int
    """in_channels, or twice as many where a variance is learned."""
    width: int
    depth: int
    mlp_width: int
    frequencies: int
    """Cosines and sines of t that are embedded, together."""
    label_rows: int
    """Of the label table; 0 where there is none."""
    head_channels: int | None
    """Of a query and a key where they are normalised; None where they are not."""
    num_heads: int | None = None
    """None where it is unknown."""
    num_classes: int = 0

    def identity(self) -> dict[str, Any]:
        """What decides the network's function beside its weights, whose names and shapes say the rest."""
        return {"num_heads": self.num_heads} | ({"num_classes": self.num_classes} if self.num_classes else {})


def recognises(checkpoint: Checkpoint) -> bool:
    return all(name in checkpoint.tensors for name in SHOWN)


def options_from(tensors: Mapping[str, Tensor]) -> DitOptions:
    """The options that follow from a state dict: all but classes, and heads where these leave no trace.

    Raises:
        LookupError, ValueError: these are not the tensors of this family.
    """
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    learned = len(tensors["final_layer.linear.weight"]) == 2 * channels * patch**2
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    norm = tensors.get("blocks.0.attn.q_norm.weight")
    if depth > len(tensors):
        raise LookupError("a block without those before it")
    return DitOptions(
        input_size=math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels * (2 if learned else 1),
        width=width,
        depth=depth,
        mlp_width=len(tensors["blocks.0.mlp.fc1.weight"]),
        frequencies=tensors["t_embedder.mlp.0.weight"].shape[1],
        label_rows=len(tensors[TABLE]) if TABLE in tensors else 0,
        head_channels=None if norm is None else len(norm),
        num_heads=PUBLISHED_HEADS.get((width, depth)) if norm is None else width // len(norm),
    )


def open_dit(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    """A state dict of DiT, SiT or REPA.

    The last row of the label table is the null label, unless `num_classes` is the number of all rows.

    Raises:
        RequestError: it is another network, or a given setting contradicts it.
    """
    tensors = {name: t for name, t in checkpoint.tensors.items() if not name.startswith(PROJECTORS)}
    try:
        options = options_from(tensors)
    except (LookupError, ValueError) as error:
        raise RequestError(f"--model is {checkpoint.shown}; {OTHER}") from error
    known = known_of(options, settings, projected=len(tensors) < len(checkpoint.tensors))
    heads, rows = known["num_heads"], options.label_rows
    require(
        not heads or options.width % heads == 0,
        f"--num_heads is {heads}; it must divide the width of the network, {options.width}",
    )
    classes = rows if settings.get("num_classes") == rows else max(rows - 1, 0)
    options = replace(options, num_heads=heads, num_classes=classes)
    untold = [name for name, value in known.items() if value is None]
    spec = spec_of(options, known, lacking(untold))
    size, latent = options.input_size, options.input_size * PIXELS
    told = known | {
        "learn_sigma": options.out_channels > options.in_channels,
        "image_size": Told(f"{size}", lambda given: given == size or (spec.latent is not None and given == latent)),
    }
    spec.check_given({name: settings[name] for name in given - {"weights_key"}}, told)
    check_fit(without_memory(lambda: Transformer(options)), tensors, OTHER)
    return Opened(
        spec,
        tensors,
        parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        note=spec.lacks or None,
        untold={name: MISSING[name][0] for name in untold},
    )


def known_of(options: DitOptions, settings: Mapping[str, Any], projected: bool) -> dict[str, Any]:
    """What the network predicts, and its heads, by flag name: as the file tells, else as set; None: neither does.

    Args:
        projected: whether the file has projectors of REPA.
    """
    told = {"prediction": "velocity", "data_at": 0} if projected else {}
    known = {name: told.get(name, settings.get(name)) for name in ("prediction", "data_at")}
    if known["prediction"] == "eps" or known == {"prediction": None, "data_at": None}:
        del known["data_at"]
    return known | {"num_heads": options.num_heads or settings.get("num_heads")}


def lacking(untold: list[str]) -> str:
    """What to give before the network can be sampled; empty where that is nothing."""
    if not untold:
        return ""
    flags = " and ".join(f"--{name}" for name in untold)
    remedies = ", and ".join(MISSING[name][1] for name in untold)
    return f"{flags} {'is' if len(untold) == 1 else 'are'} missing, and not in the weights; give {remedies}"


def spec_of(options: DitOptions, known: Mapping[str, Any], lacks: str) -> NetworkSpec:
    """The description of a network of which `known` is told."""
    velocity = known["prediction"] == "velocity"
    null = options.label_rows - 1
    return NetworkSpec(
        family="dit",
        options=options,
        shape=(options.in_channels, options.input_size, options.input_size),
        kind=known["prediction"],
        kind_options={"data_at": known["data_at"]} if velocity else {},
        num_classes=options.num_classes,
        null_label=null if options.num_classes == null > 0 else None,
        sigma_min=None,
        sigma_max=None,
        defaults={**DitFlags.family_defaults, "rounding": "truncate" if known.get("data_at") == 0 else "nearest"},
        flags=known,
        latent=None if options.in_channels in (1, 3) else "sd",
        autoencoder=(PIXELS, SCALING),
        lacks=lacks,
    )


class Attention(nn.Module):
    """Self-attention of tokens (B, T, width). The channels of qkv are ordered (3, heads, channels of a head)."""

    def __init__(self, options: DitOptions) -> None:
        super().__init__()
        self.heads = options.num_heads or 1
        self.qkv = nn.Linear(options.width, 3 * options.width)
        normalised = options.head_channels is not None
        self.q_norm, self.k_norm = (
            nn.LayerNorm(options.head_channels) if normalised else nn.Identity() for _ in range(2)
        )
        self.proj = nn.Linear(options.width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        """In and out in any dtype; computed in that of the weights."""
        qkv = self.qkv(x.to(self.qkv.weight.dtype))
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, options: DitOptions) -> None:
        super().__init__()
        self.fc1 = nn.Linear(options.width, options.mlp_width)
        self.fc2 = nn.Linear(options.mlp_width, options.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x.to(self.fc1.weight.dtype)), approximate="tanh"))


class Modulated(nn.Module):
    """What the condition shifts, scales and gates: `count` vectors of it for each sample.

    Its layers come after the others, as in the published networks: averages may be stored without names.
    """

    def __init__(self, width: int, count: int, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.count = count
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(c)[:, None].chunk(self.count, dim=2)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(Modulated):
    """Attention and a multilayer perceptron on a residual stream in float32, both modulated by the condition."""

    attn: Attention
    mlp: Mlp

    def __init__(self, options: DitOptions) -> None:
        super().__init__(options.width, 6, attn=Attention(options), mlp=Mlp(options))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(c)
        x = x + gate * self.attn(modulated(x, shift, scale))
        return x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))


class FinalLayer(Modulated):
    linear: nn.Linear

    def __init__(self, options: DitOptions) -> None:
        super().__init__(
            options.width, 2, linear=nn.Linear(options.width, options.patch_size**2 * options.out_channels)
        )

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.modulation(c)))


class Transformer(nn.Module):
    """F(x, t, y): (B, C, H, W) float32, (B,) float32, (B,) int64 or None -> (B, C or 2 C, H, W) float32.

    Without y it takes the last row of the label table, the null label. The state dict has the published names.
    """

    def __init__(self, options: DitOptions) -> None:
        super().__init__()
        self.options = options
        width, patch = options.width, options.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, (options.input_size // patch) ** 2, width))
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(options.in_channels, width, patch, patch)})
        layers = nn.Linear(options.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(options.label_rows, width)} if options.label_rows else {}
        )
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.final_layer = FinalLayer(options)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        options, patch = self.options, self.options.patch_size
        side = options.input_size // patch
        c = self.t_embedder["mlp"](waves(t, options.frequencies))
        if options.label_rows:
            null = torch.full_like(t, options.label_rows - 1, dtype=torch.long)
            c = c + self.y_embedder["embedding_table"](null if y is None else y)
        h = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        patches = self.final_layer(h, c).unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def waves(t: Tensor, count: int) -> Tensor:
    """Cosines, then sines, of t (B,) at falling frequencies: (B, count) float32."""
    half = count // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, device=t.device))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def build(spec: NetworkSpec, precision: Precision) -> nn.Module:
    """Attention and perceptrons in `precision`; embeddings, modulation, norms and output in float32."""
    network = Transformer(spec.options)
    for block in network.blocks:
        block.attn.to(DTYPES[precision])
        block.mlp.to(DTYPES[precision])
    return network


DIT = Family("dit", recognises, open_dit, build)
