"""The settings that follow from the shapes of an ADM state dict, and the advice that leads to a run in one step."""

from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_shapes import adm_flags, explain_misfit
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
    assert explain_misfit(state_dict(arch), asdict(arch)) == ""


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


def follow(sentence: str, arch: AdmOptions) -> AdmOptions:
    """`arch` with the flags that the advice gives a value for."""
    changed: dict[str, Any] = {}
    for name, text in re.findall(r"--(\w+) (\S+) \(not ", sentence):
        kind = type(getattr(arch, name))
        changed[name] = text == "True" if kind is bool else kind(text)
    for name, text in re.findall(r"--(\w+) that divides [^(]*such as (\d+)", sentence):
        changed[name] = int(text)
    return replace(arch, **changed)


@settings(max_examples=30)
@given(arch=architectures(), other=architectures())
def test_advice_leads_to_a_network_that_fits_in_one_step(arch: AdmOptions, other: AdmOptions) -> None:
    asked = replace(other, image_size=arch.image_size, num_heads=1)
    weights = state_dict(arch)
    followed = follow(explain_misfit(weights, asdict(asked)), asked)
    followed.validate()
    fitted = state_dict(followed)
    assert {name: tensor.shape for name, tensor in fitted.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }


def test_advice_names_each_wrong_flag_with_the_value_of_the_file_and_nothing_else() -> None:
    arch = published(dict(BUNDLED["digits"].settings))
    weights = state_dict(arch)
    asked = replace(arch, num_channels=64, num_res_blocks=2, channel_mult="", image_size=64)
    said = explain_misfit(weights, asdict(asked))
    assert "--num_channels 32 (not 64)" in said
    assert "--num_res_blocks 1 (not 2)" in said
    assert "--channel_mult 1,2,2 (not empty)" in said
    assert "--attention_resolutions 16 (not 8)" in said
    assert "class_cond" not in said
    assert explain_misfit(weights, {"num_channels": 32}) == ""
    assert explain_misfit(weights, asdict(replace(arch, image_size=34))).endswith("multiple of 4 (not 34)")


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
    assert explain_misfit(weights, {"num_channels": 3}) == ""


@settings(max_examples=50)
@given(data=st.data())
def test_a_network_that_lost_a_tensor_gives_something_or_nothing(data: st.DataObject) -> None:
    weights = dict(DIGITS)
    del weights[data.draw(st.sampled_from(sorted(weights)))]
    told = adm_flags(weights)
    assert told is None or told["num_channels"] == 32
