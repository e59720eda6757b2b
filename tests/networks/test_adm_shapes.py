"""The settings that follow from the shapes of an ADM state dict."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ray_sampler.networks.adm import adm_flags
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.presets import BUNDLED, PRESETS

TOLD = ("num_channels", "num_res_blocks", "use_scale_shift_norm", "class_cond", "num_classes", "learn_sigma")


MULTIPLIERS = ("0.5", "1", "2", "3", "4", "1.5", "0.666667")
GROUPS = 32
"""Of the normalisation, which the width of each level is a multiple of."""


def state_dict(arch: AdmOptions) -> dict[str, Tensor]:
    """The names and shapes of a network, without its values."""
    with torch.device("meta"):
        return UNet(arch).state_dict()


def published(settings: dict[str, Any]) -> AdmOptions:
    names = {field.name for field in fields(AdmOptions)}
    return AdmOptions(**{name: value for name, value in settings.items() if name in names})


@st.composite
def architectures(draw: st.DrawFn) -> AdmOptions:
    levels = draw(st.integers(1, 3))
    width = draw(st.sampled_from([32, 48, 64, 96]))
    usable = [each for each in MULTIPLIERS if int(float(each) * width) % GROUPS == 0]
    multipliers = draw(st.lists(st.sampled_from(usable), min_size=levels, max_size=levels))
    size = 2 ** (levels - 1) * draw(st.integers(1, 3))
    arch = AdmOptions(
        image_size=size,
        num_channels=width,
        num_res_blocks=draw(st.integers(1, 2)),
        num_heads=draw(st.sampled_from([1, 2])),
        num_head_channels=draw(st.sampled_from([-1, 32])),
        attention_resolutions=",".join(str(size // 2**level) for level in draw(st.sets(st.integers(0, levels - 1)))),
        channel_mult=",".join(multipliers),
        class_cond=draw(st.booleans()),
        num_classes=draw(st.integers(1, 20)),
        use_scale_shift_norm=draw(st.booleans()),
        resblock_updown=draw(st.booleans()),
        learn_sigma=draw(st.booleans()),
    )
    arch.validate()
    return arch


def check_told(arch: AdmOptions) -> None:
    told = adm_flags(state_dict(arch), null_label=bool(arch.label_dropout))
    assert told is not None
    effective = arch.identity()
    for name in TOLD:
        assert told.get(name) == effective.get(name), name
    assert told.get("resblock_updown", arch.resblock_updown) == arch.resblock_updown
    widths = [int(float(m) * arch.num_channels) for m in told["channel_mult"].split(",")]
    assert widths == [int(m * arch.num_channels) for m in arch.channel_multipliers]
    levels = range(len(arch.channel_multipliers))
    assert told["attention_factors"] == tuple(2**level for level in levels if arch.attends_at(level))
    assert (told["in_channels"], told["out_channels"]) == (arch.in_channels, arch.out_channels)


@settings(max_examples=30)
@given(arch=architectures())
def test_shapes_tell_the_architecture(arch: AdmOptions) -> None:
    check_told(arch)


PUBLISHED = [preset.settings for preset in PRESETS.values()] + [
    bundled.settings for bundled in BUNDLED.values() if "num_channels" in bundled.settings
]
ARCHITECTURES = sorted({published(dict(settings)) for settings in PUBLISHED}, key=str)


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: f"{arch.image_size}-{arch.num_channels}")
def test_shapes_tell_the_published_architectures(arch: AdmOptions) -> None:
    check_told(arch)
    told = adm_flags(state_dict(arch))
    assert told is not None
    assert told["channel_mult"] == arch.identity()["channel_mult"]


DIGITS = state_dict(published(dict(BUNDLED["digits"].settings)))


@pytest.mark.parametrize("channels", [(1, 1), (1, 2), (3, 6), (6, 6)])
def test_channels_in_and_out_are_told(channels: tuple[int, int]) -> None:
    weights = state_dict(published(dict(BUNDLED["digits"].settings)))
    weights["input_blocks.0.0.weight"] = torch.empty(32, channels[0], 3, 3, device="meta")
    weights["out.2.weight"] = torch.empty(channels[1], 32, 3, 3, device="meta")
    told = adm_flags(weights)
    assert told is not None
    assert (told["in_channels"], told["out_channels"]) == channels
    assert told["learn_sigma"] == (channels[1] == 2 * channels[0])


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"blocks.0.attn.qkv.weight": (3, 1)},
        {"time_embed.0.weight": (1,), "input_blocks.0.0.weight": (1,)},
        {"input_blocks.x.0.weight": (1, 1), "time_embed.0.weight": (4, 0), "input_blocks.0.0.weight": (1, 1)},
    ],
)
def test_another_network_gives_nothing(names: dict[str, tuple[int, ...]]) -> None:
    weights = {name: torch.empty(shape, device="meta") for name, shape in names.items()}
    assert adm_flags(weights) is None


@settings(max_examples=50)
@given(data=st.data())
def test_a_network_that_lost_a_tensor_gives_something_or_nothing(data: st.DataObject) -> None:
    weights = dict(DIGITS)
    del weights[data.draw(st.sampled_from(sorted(weights)))]
    told = adm_flags(weights)
    assert told is None or told["num_channels"] == 32
