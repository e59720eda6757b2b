"""EDM's DhariwalUNet, read as the ADM network, computes what its own definition says."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.edm_family import as_dhariwal, dhariwal_to_adm
from ray_sampler.networks.nvidia import Refused, SavedNetwork
from ray_sampler.networks.opening import open_network
from tests.loading import loaded
from tests.networks.nvidia_files import snapshot

State = dict[str, Tensor]


class Dhariwal:
    """An independent DhariwalUNet in float64, which makes random tensors under EDM's names as it first needs them."""

    def __init__(self, width: int, multipliers: list[int], blocks: int, attention: list[int], size: int, classes: int):
        self.width, self.multipliers, self.blocks = width, multipliers, blocks
        self.attention, self.size, self.classes = attention, size, classes
        self.stream = torch.Generator().manual_seed(width)
        self.tensors: State = {}

    def get(self, name: str, *shape: int) -> Tensor:
        name = f"model.{name}"
        if name not in self.tensors:
            scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.3
            self.tensors[name] = torch.randn(shape, generator=self.stream, dtype=torch.float64) * scale
        return self.tensors[name]

    def affine(self, name: str, *shape: int) -> tuple[Tensor, Tensor]:
        return self.get(f"{name}.weight", *shape), self.get(f"{name}.bias", shape[0])

    def conv(self, x: Tensor, name: str, outputs: int, kernel: int) -> Tensor:
        return F.conv2d(x, *self.affine(name, outputs, x.shape[1], kernel, kernel), padding=kernel // 2)

    def norm(self, x: Tensor, name: str) -> Tensor:
        channels = x.shape[1]
        return F.group_norm(x, min(32, channels // 4), *self.affine(name, channels), eps=1e-5)

    def block(self, x: Tensor, emb: Tensor, name: str, outputs: int, attends: bool, resample: str = "") -> Tensor:
        def resampled(h: Tensor) -> Tensor:
            if resample == "down":
                return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else h

        h = self.conv(resampled(F.silu(self.norm(x, f"{name}.norm0"))), f"{name}.conv0", outputs, 3)
        scale, shift = F.linear(emb, *self.affine(f"{name}.affine", 2 * outputs, emb.shape[1])).chunk(2, 1)
        h = self.norm(h, f"{name}.norm1") * (1 + scale[..., None, None]) + shift[..., None, None]
        h = self.conv(F.silu(h), f"{name}.conv1", outputs, 3)
        x = resampled(x)
        x = h + (x if x.shape[1] == outputs else self.conv(x, f"{name}.skip", outputs, 1))
        heads = outputs // 64
        if attends and heads:
            b, c, height, width = x.shape
            qkv = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv", 3 * c, 1)
            q, k, v = qkv.reshape(b, heads, c // heads, 3, height * width).unbind(3)
            a = torch.einsum("bhcq,bhck->bhqk", q, k).div(math.sqrt(c // heads)).softmax(3)
            x = x + self.conv(torch.einsum("bhqk,bhck->bhcq", a, v).reshape(b, c, height, width), f"{name}.proj", c, 1)
        return x

    def __call__(self, x: Tensor, c_noise: Tensor, y: Tensor) -> Tensor:
        emb_width = 4 * self.width
        angles = torch.outer(c_noise, 10_000.0 ** (-torch.arange(self.width // 2) / (self.width // 2)))
        emb = torch.cat([angles.cos(), angles.sin()], 1)
        emb = F.silu(F.linear(emb, *self.affine("map_layer0", emb_width, self.width)))
        emb = F.linear(emb, *self.affine("map_layer1", emb_width, emb_width))
        if self.classes:
            one_hot = F.one_hot(y, self.classes + 1)[:, : self.classes].double()
            emb = emb + F.linear(one_hot, self.get("map_label.weight", emb_width, self.classes))
        emb, skips = F.silu(emb), []
        channels = 0
        for level, multiplier in enumerate(self.multipliers):
            size = self.size >> level
            if level == 0:
                x = self.conv(x, f"enc.{size}x{size}_conv", self.width * multiplier, 3)
            else:
                x = self.block(x, emb, f"enc.{size}x{size}_down", channels, False, "down")
            channels = self.width * multiplier
            skips.append(x)
            for i in range(self.blocks):
                x = self.block(x, emb, f"enc.{size}x{size}_block{i}", channels, size in self.attention)
                skips.append(x)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            size = self.size >> level
            if level == len(self.multipliers) - 1:
                x = self.block(x, emb, f"dec.{size}x{size}_in0", channels, True)
                x = self.block(x, emb, f"dec.{size}x{size}_in1", channels, False)
            else:
                x = self.block(x, emb, f"dec.{size}x{size}_up", channels, False, "up")
            channels = self.width * multiplier
            for i in range(self.blocks + 1):
                x = torch.cat([x, skips.pop()], 1)
                x = self.block(x, emb, f"dec.{size}x{size}_block{i}", channels, size in self.attention)
        return self.conv(F.silu(self.norm(x, "out_norm")), "out_conv", 3, 3)

    def saved(self) -> SavedNetwork:
        """A snapshot, with the buffers and the layer that sampling leaves out."""
        arguments: dict[str, Any] = {
            "model_type": "DhariwalUNet",
            "img_resolution": self.size,
            "img_channels": 3,
            "label_dim": self.classes,
            "model_channels": self.width,
            "channel_mult": self.multipliers,
            "num_blocks": self.blocks,
            "attn_resolutions": self.attention,
        }
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        tensors["model.enc.8x8_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        tensors["model.map_augment.weight"] = torch.ones(self.width, 9)
        return SavedNetwork("EDMPrecond", arguments, tensors)


def architecture(flags: dict[str, Any]) -> AdmOptions:
    return AdmOptions(**{f.name: flags[f.name] for f in fields(AdmOptions) if f.name in flags})


@pytest.mark.parametrize(
    ("width", "multipliers", "blocks", "attention"),
    [
        (64, [1, 2, 3], 1, [8]),
        (64, [1, 3], 2, [8]),
        (128, [1, 2], 1, [8]),
        (16, [4, 8], 1, [8]),
        (96, [1, 3], 1, [16, 8]),  # one head of 96 channels, and four of 72
        (32, [1, 2], 1, [16, 8]),  # less than a head at 16 pixels, and so no attention
    ],
)
@pytest.mark.parametrize("classes", [0, 5])
@torch.no_grad()
def test_computes_what_the_definition_says(width, multipliers, blocks, attention, classes):
    definition = Dhariwal(width, multipliers, blocks, attention, 16, classes)
    x, c_noise, y = torch.randn(3, 3, 16, 16), torch.tensor([-1.5, 0.2, 1.1]), torch.tensor([0, 4, 5])
    expected = definition(x.double(), c_noise.double(), y)
    flags, tensors = dhariwal_to_adm(definition.saved())
    with torch.device("meta"):
        made = as_dhariwal(UNet(architecture(flags)))
    made.load_state_dict(tensors, assign=True)
    found = made.eval()(x, c_noise, y if classes else None)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-4


@torch.no_grad()
def test_attention_at_a_resolution_that_no_level_has_is_nowhere(tmp_path):
    definition = Dhariwal(64, [1, 2], 1, [16, 0], 24, 0)
    x, c_noise = torch.randn(2, 3, 24, 24), torch.tensor([-1.5, 0.2])
    expected = definition(x.double(), c_noise.double(), torch.zeros(2, dtype=torch.int64))
    saved = definition.saved()
    (tmp_path / "net.pkl").write_bytes(snapshot("EDMPrecond", saved.tensors, saved.arguments))
    assert (loaded(open_network(str(tmp_path / "net.pkl"), {}))(x, c_noise) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_a_file_of_it_is_opened_with_everything_that_it_records(tmp_path):
    definition = Dhariwal(16, [4, 8], 1, [8], 16, 5)
    x, c_noise, y = torch.randn(3, 3, 16, 16), torch.tensor([-1.5, 0.2, 1.1]), torch.tensor([0, 4, 5])
    expected = definition(x.double(), c_noise.double(), y)
    saved = definition.saved()
    (tmp_path / "net.pkl").write_bytes(snapshot("EDMPrecond", saved.tensors, saved.arguments))
    network = open_network(str(tmp_path / "net.pkl"), {})
    spec = network.spec
    assert (spec.family, spec.shape, spec.num_classes, spec.null_label) == ("edm", (3, 16, 16), 5, 5)
    assert (loaded(network)(x, c_noise, y) - expected).abs().max() < 1e-4


def test_the_published_network_has_the_parameters_and_flags_of_adm():
    arguments = {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet"}
    flags, _ = dhariwal_to_adm(SavedNetwork("EDMPrecond", arguments, {}))
    assert flags["attention_resolutions"] == "32,16,8"
    architecture(flags).validate()
    with torch.device("meta"):
        made = UNet(architecture(flags))
    assert sum(parameter.numel() for parameter in made.parameters()) == 295_899_267
    assert as_dhariwal(made).label_emb.weight.shape == (1001, 768)


def test_names_that_the_arguments_do_not_ask_for_are_refused():
    arguments = {"img_resolution": 16, "model_type": "DhariwalUNet", "channel_mult": [1, 2], "num_blocks": 1}
    for name in ("model.enc.16x16_block7.conv0.weight", "model.other"):
        with pytest.raises(Refused, match=name):
            dhariwal_to_adm(SavedNetwork("EDMPrecond", arguments, {name: torch.ones(2)}))
    with pytest.raises(Refused, match="has 32 channels in its middle; only 64 or more"):
        dhariwal_to_adm(SavedNetwork("EDMPrecond", arguments | {"model_channels": 16}, {}))
    with pytest.raises(Refused, match="model_type 'SongUNet'"):
        dhariwal_to_adm(SavedNetwork("EDMPrecond", arguments | {"model_type": "SongUNet"}, {}))
