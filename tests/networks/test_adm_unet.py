"""The network has the published checkpoints' tensors and computes what the original computes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ray_sampler.networks.adm_unet import Convolution, GroupNorm, UNet
from ray_sampler.published import ADM, BUNDLED, PRESETS
from tests.networks.golden import golden_flags, golden_folder, golden_state, options_of

ORIGINAL_DEFAULTS: dict[str, Any] = {
    "num_channels": 128,
    "num_res_blocks": 2,
    "attention_resolutions": "32,16,8",
    "channel_mult": "",
    "class_cond": False,
    "num_classes": 1000,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
}
MULTIPLIERS_BY_SIZE = {256: [1, 1, 2, 2, 4, 4], 64: [1, 2, 3, 4]}

Shapes = dict[str, tuple[int, ...]]


class Tensors:
    """The state dict that a network must have, written down layer by layer from its flags alone."""

    def __init__(self, flags: dict[str, Any]) -> None:
        self.flags = ORIGINAL_DEFAULTS | flags
        self.width = self.flags["num_channels"]
        self.shapes: Shapes = {}

    def affine(self, name: str, *weight: int) -> None:
        self.shapes |= {f"{name}.weight": weight, f"{name}.bias": weight[:1]}

    def resnet(self, name: str, before: int, after: int) -> None:
        self.affine(f"{name}.in_layers.0", before)
        self.affine(f"{name}.in_layers.2", after, before, 3, 3)
        self.affine(f"{name}.emb_layers.1", after * (1 + self.flags["use_scale_shift_norm"]), 4 * self.width)
        self.affine(f"{name}.out_layers.0", after)
        self.affine(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            self.affine(f"{name}.skip_connection", after, before, 1, 1)

    def attention(self, name: str, channels: int) -> None:
        self.affine(f"{name}.norm", channels)
        self.affine(f"{name}.qkv", 3 * channels, channels, 1, 1)
        self.affine(f"{name}.proj_out", channels, channels, 1, 1)

    def resampling(self, name: str, channels: int, convolution: str) -> None:
        if self.flags["resblock_updown"]:
            self.resnet(name, channels, channels)
        else:
            self.affine(f"{name}.{convolution}", channels, channels, 3, 3)

    def all(self) -> Shapes:
        size, blocks = self.flags["image_size"], self.flags["num_res_blocks"]
        listed = self.flags["channel_mult"]
        factors = [int(m) for m in listed.split(",")] if listed else MULTIPLIERS_BY_SIZE[size]
        widths = [self.width * m for m in factors]
        attending = {int(r) for r in self.flags["attention_resolutions"].split(",")}
        last = len(widths) - 1

        self.affine("time_embed.0", 4 * self.width, self.width)
        self.affine("time_embed.2", 4 * self.width, 4 * self.width)
        if self.flags["class_cond"]:
            self.shapes["label_emb.weight"] = (
                self.flags["num_classes"] + ("label_dropout" in self.flags),
                4 * self.width,
            )

        outputs = [widths[0]]  # channels after each input block
        self.affine("input_blocks.0.0", widths[0], 3, 3, 3)
        for level, channels in enumerate(widths):
            for _ in range(blocks):
                at = f"input_blocks.{len(outputs)}"
                self.resnet(f"{at}.0", outputs[-1], channels)
                if size >> level in attending:
                    self.attention(f"{at}.1", channels)
                outputs.append(channels)
            if level < last:
                self.resampling(f"input_blocks.{len(outputs)}.0", channels, "op")
                outputs.append(channels)

        self.resnet("middle_block.0", widths[-1], widths[-1])
        self.attention("middle_block.1", widths[-1])
        self.resnet("middle_block.2", widths[-1], widths[-1])

        current = widths[-1]
        for number, skip in enumerate(reversed(outputs)):
            level = last - number // (blocks + 1)
            self.resnet(f"output_blocks.{number}.0", current + skip, current := widths[level])
            place = 1
            if size >> level in attending:
                self.attention(f"output_blocks.{number}.1", current)
                place = 2
            if level > 0 and number % (blocks + 1) == blocks:
                self.resampling(f"output_blocks.{number}.{place}", current, "conv")

        self.affine("out.0", current)
        self.affine("out.2", 3, current, 3, 3)
        return self.shapes


def shapes_of(flags: dict[str, Any]) -> Shapes:
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in UNet(options_of(flags)).state_dict().items()}


@pytest.mark.parametrize("name", ADM)
def test_every_key_and_shape_of_a_published_architecture(name: str) -> None:
    preset = ADM[name]
    expected = Tensors(dict(preset.settings)).all()
    assert shapes_of(dict(preset.settings)) == expected
    assert sum(map(prod, expected.values())) == preset.parameters


@pytest.mark.parametrize("name", [name for name, model in BUNDLED.items() if "num_channels" in model.settings])
def test_every_key_and_shape_of_a_bundled_architecture(name: str) -> None:
    expected = Tensors(dict(BUNDLED[name].settings)).all()
    assert shapes_of(dict(BUNDLED[name].settings)) == expected
    assert sum(map(prod, expected.values())) == BUNDLED[name].parameters


@pytest.mark.parametrize(
    "change",
    [
        {"resblock_updown": False},
        {"use_scale_shift_norm": False},
        {"class_cond": False},
        {"num_res_blocks": 3},
        {"channel_mult": "2,1,3", "attention_resolutions": "32"},
    ],
    ids=str,
)
def test_every_key_and_shape_follows_its_flag(change: dict[str, Any]) -> None:
    flags = dict(BUNDLED["digits"].settings) | change
    assert shapes_of(flags) == Tensors(flags).all()


def test_the_derivation_is_that_of_a_real_state_dict() -> None:
    state = golden_state()
    expected = Tensors(golden_flags()).all()
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    assert shapes_of(golden_flags()) == expected


def test_published_sizes() -> None:
    imagenet = Tensors(dict(PRESETS["edm-imagenet64"].settings)).all()
    assert sum(map(prod, imagenet.values())) == 295_899_267
    assert imagenet["label_emb.weight"] == (1000, 768)
    assert imagenet["output_blocks.0.0.in_layers.0.weight"] == (768 + 768,)
    bedroom = Tensors(dict(PRESETS["edm-bedroom256"].settings)).all()
    assert sum(map(prod, bedroom.values())) == 526_304_771
    assert "label_emb.weight" not in bedroom


@pytest.fixture(scope="module")
def golden_network() -> UNet:
    network = UNet(options_of(golden_flags()))
    network.load_state_dict(golden_state())
    return network.eval()


def test_forward_is_the_originals_within_1e_4(golden_network: UNet) -> None:
    case = {name: torch.from_numpy(array) for name, array in np.load(golden_folder() / "forward.npz").items()}
    with torch.no_grad():
        out = golden_network(case["x"], case["t"], case["y"])
    assert (out - case["out"]).abs().max() < 1e-4


def test_half_precision_covers_the_convolutions_of_the_torso_only() -> None:
    network = UNet(options_of(dict(BUNDLED["digits"].settings)))
    network.convert_to_fp16()
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)):
            torso = name.startswith(("input_blocks", "middle_block", "output_blocks"))
            half = torso and isinstance(module, nn.Conv2d)
            assert module.weight.dtype == (torch.float16 if half else torch.float32), name
    network.convert_to_fp32()
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_is_close_and_its_output_float32(golden_network: UNet, dtype: torch.dtype) -> None:
    case = {name: torch.from_numpy(array) for name, array in np.load(golden_folder() / "forward.npz").items()}
    network = UNet(golden_network.arch)
    network.load_state_dict(golden_network.state_dict())
    network.convert_torso(dtype).eval()
    with torch.no_grad():
        out = network(case["x"], case["t"], case["y"])
    assert out.dtype == torch.float32
    assert (out - case["out"]).abs().max() < 0.1 * case["out"].abs().max()


def test_labels_are_needed_exactly_when_class_conditional(golden_network: UNet) -> None:
    x, t = torch.zeros(1, 3, 32, 32), torch.zeros(1)
    with pytest.raises(ValueError, match="class-conditional"):
        golden_network(x, t)


@pytest.mark.parametrize("shape", [(3, 32, 5, 5), (2, 96, 16, 16), (2, 64, 33, 32), (1, 256, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_normalisation_is_torchs_in_double_precision(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype, bound: float
) -> None:
    random = torch.Generator().manual_seed(0)
    norm = GroupNorm(shape[1])
    for parameter in norm.parameters():
        parameter.data = torch.randn(shape[1], generator=random)
    offsets = 3 * torch.randn(shape[1], 1, 1, generator=random)
    x = (torch.randn(shape, generator=random) + offsets).to(dtype).contiguous(memory_format=layout)
    scale, shift = torch.randn(2, *shape[:2], generator=random).to(dtype)
    exact = nn.functional.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    modulated = exact * (1 + scale.double()[..., None, None]) + shift.double()[..., None, None]
    with torch.inference_mode():
        plain, given = norm(x), norm(x, scale, shift)
    with_gradients = norm(x, scale, shift)  # by torch's kernel
    for result, expected in ((plain, exact), (given, modulated), (with_gradients, modulated)):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=layout)
        assert (result.double() - expected).abs().max() < bound * (1 + expected.abs().max())


@pytest.mark.parametrize("shape", [(3, 8, 5, 7), (1, 64, 8, 8), (2, 3, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_of_the_doubled_input_needs_no_doubled_input(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    random = torch.Generator().manual_seed(0)
    convolution = Convolution(shape[1], 16, 3, padding=1)
    for parameter in convolution.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random).contiguous()
    x = torch.randn(shape, generator=random).contiguous(memory_format=layout)
    exact = convolution.double()(x.double(), doubled=True).detach()
    assert exact.shape == (shape[0], 16, 2 * shape[2], 2 * shape[3])
    with torch.inference_mode():
        result = convolution.float()(x, doubled=True)
    assert (result - exact).abs().max() < 1e-5 * exact.abs().max()
