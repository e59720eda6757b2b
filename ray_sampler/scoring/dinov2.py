"""DINOv2 (Oquab et al. 2023), of which FD_DINOv2 takes the class token, from a file of its authors' layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.family import misfits
from ray_sampler.networks.weights import read_checkpoint
from ray_sampler.scoring.extractor import WEIGHTS_FLAG, Extractor, rgb

PATCH, GRID, HEAD = 14, 16, 64
"""Pixels of a patch, patches along a side of a picture of 224x224, and width of an attention head."""
OFFSET = 0.1
"""By which the authors' code makes the grid larger where it interpolates the table of positions."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """A block of a vision transformer whose branches are scaled: tokens (B, N, D) -> (B, N, D)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dims, eps=1e-6), nn.LayerNorm(dims, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dims, 3 * dims), "proj": nn.Linear(dims, dims)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dims, 4 * dims), "fc2": nn.Linear(4 * dims, dims)})
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": nn.Parameter(torch.ones(dims))}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1["gamma"] * self.attn["proj"](mixed)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DinoV2(nn.Module):
    """Pictures (B, H, W, C) uint8 -> the normalised class token (B, D) float32."""

    def __init__(self, dims: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dims))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + GRID**2, dims))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dims, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block(dims) for _ in range(depth))
        self.norm = nn.LayerNorm(dims, eps=1e-6)

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.interpolate(rgb(pictures).float(), (GRID * PATCH,) * 2, mode="bicubic", antialias=True)
        mean, deviation = (x.new_tensor(each)[:, None, None] for each in (MEAN, DEVIATION))
        x = self.patch_embed["proj"]((x / 255 - mean) / deviation).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        normalised: Tensor = self.norm(x[:, 0])
        return normalised


def open_dinov2(weights: str | None) -> Extractor:
    """The extractor of a file such as dinov2_vitl14_pretrain.pth, without registers; its shapes say which size it is.

    Raises:
        RequestError: there is no such file, or it is of another layout.
    """
    if weights is None:
        raise RequestError(f"--features dinov2 needs its weights; give {WEIGHTS_FLAG} dinov2_vitl14_pretrain.pth")
    checkpoint = read_checkpoint(weights, None, WEIGHTS_FLAG, with_sha256=True)
    tensors = {name: tensor.float() for name, tensor in checkpoint.tensors.items() if name != "mask_token"}
    dims = tensors["norm.weight"].shape[0] if "norm.weight" in tensors else 0
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    network = DinoV2(max(HEAD, dims // HEAD * HEAD), depth)
    if (table := tensors.get("pos_embed")) is not None and table.ndim == 3:
        tensors["pos_embed"] = at_size(table)
    problems = misfits(network, tensors)
    require(
        not problems,
        f"{WEIGHTS_FLAG} is {checkpoint.shown}, which is not laid out as dinov2_vitl14_pretrain.pth is: "
        f"of its tensors, {', '.join(problems)}",
    )
    network.load_state_dict(tensors)
    network.requires_grad_(False).eval()
    return Extractor("dinov2", checkpoint.sha256 or "", network, dims, "bicubic with antialiasing, to 224x224")


def at_size(table: Tensor) -> Tensor:
    """A table of positions (1, 1 + n^2, D), interpolated to pictures of 224x224 as the authors' code does it."""
    side = int((table.shape[1] - 1) ** 0.5)
    patches = table[:, 1:].unflatten(1, (side, -1)).permute(0, 3, 1, 2)
    factor = (GRID + OFFSET) / side
    patches = F.interpolate(patches, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)
