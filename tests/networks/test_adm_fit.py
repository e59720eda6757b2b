"""A checkpoint becomes the ADM network that its flags describe, or is refused with what would fit."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_sampler.cluster.shipping import load, ship
from ray_sampler.errors import RequestError
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.family import Network, Precision
from ray_sampler.networks.opening import open_network
from tests.loading import loaded

ARCH = AdmOptions(
    image_size=16,
    num_channels=32,
    num_res_blocks=1,
    channel_mult="1,2",
    attention_resolutions="8",
    num_head_channels=32,
    class_cond=True,
    num_classes=10,
    resblock_updown=True,
)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights, none of them 0."""
    torch.manual_seed(0)
    return {name: torch.randn_like(tensor) * 0.1 for name, tensor in UNet(ARCH).state_dict().items()}


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Opens the network of a state dict with the flags of `ARCH`, or others, all of them given."""

    def open_(state: dict[str, Tensor], arch: AdmOptions = ARCH) -> Network:
        save_file(state, tmp_path / "w.safetensors")
        flags = asdict(arch)
        return open_network(str(tmp_path / "w.safetensors"), flags, frozenset(flags))

    return open_


def test_a_network_of_guided_diffusion_is_told_by_its_attention(state: dict[str, Tensor], opened: Any) -> None:
    """Its kernels have one dimension less; it predicts noise, so that the pictures would be wrong."""
    theirs = {
        name: t.squeeze(3) if name.endswith(("qkv.weight", "proj_out.weight")) else t for name, t in state.items()
    }
    with pytest.raises(RequestError, match=r"that of guided-diffusion, .* predict eps for .* --model python:"):
        opened(theirs)


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("class_cond", False, "True"),
        ("num_classes", 1000, "10"),
        ("num_channels", 64, "32"),
        ("num_res_blocks", 2, "1"),
        ("use_scale_shift_norm", False, "True"),
        ("attention_resolutions", "16", "8"),
        ("resblock_updown", False, "True"),
        ("learn_sigma", True, "False"),
        ("channel_mult", "1,2,2", "1,2"),
        ("channel_mult", "", "1,2"),
        ("attention_resolutions", "", "8"),
    ],
)
def test_a_given_flag_that_contradicts_the_weights_is_refused_with_both_values(
    flag: str, value: Any, told: str, state: dict[str, Tensor], opened: Any
) -> None:
    shown = "empty" if value == "" else value
    with pytest.raises(RequestError, match=f"^--{flag} is {shown}, but the file says {told}; leave it out"):
        opened(state, replace(ARCH, **{flag: value}))


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        ({"image_size": 48, "channel_mult": "1,1,1", "attention_resolutions": "32,16,8"}, {}),
        (
            {"image_size": 48, "channel_mult": "1,1,1", "attention_resolutions": "32,16,8"},
            {"channel_mult": "1.0,1,1.02"},
        ),
        ({"image_size": 40, "channel_mult": "1,1", "attention_resolutions": "32,16"}, {}),
        (
            {"image_size": 40, "channel_mult": "1,1", "attention_resolutions": "32,16"},
            {"attention_resolutions": "20,40"},
        ),
        ({"num_channels": 96, "channel_mult": "1,1.34"}, {}),
    ],
)
def test_flags_that_repeat_the_weights_are_accepted(
    flags: dict[str, Any], again: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(UNet(replace(ARCH, **flags)).state_dict(), tmp_path / "w.pt")
    given = {"image_size": ARCH.image_size, "num_head_channels": ARCH.num_head_channels} | flags | again
    options = open_network(str(tmp_path / "w.pt"), given, frozenset(given)).spec.options
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"attention_resolutions": "16"},
            "--attention_resolutions is 16, but the file says image_size/2 (--image_size is 64 unless given); leave it",
        ),
        (
            {"image_size": 15, "attention_resolutions": "8"},
            "--image_size is 15; with 2 channel multipliers it must be a multiple of 2",
        ),
        (
            {"image_size": 16, "num_head_channels": 48},
            "--num_head_channels is 48; it must divide the channels that attention has, 64, such as 64",
        ),
        ({"num_heads": 6}, "--num_heads is 6; it must divide the channels that attention has, 64, such as 2"),
        ({"num_heads_upsample": 3}, "--num_heads_upsample is 3; it must divide the channels that attention has, 64"),
    ],
)
def test_what_is_wrong_is_said_of_the_flag_that_was_given(
    given: dict[str, Any], said: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match=f"^{re.escape(said)}"):
        open_network(str(tmp_path / "w.safetensors"), given, frozenset(given))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention_resolutions", "x"),
        ("attention_resolutions", "16,0"),
        ("attention_resolutions", "1.5"),
        ("channel_mult", " "),
        ("channel_mult", "1,nan"),
        ("channel_mult", "1e308"),
        ("num_head_channels", 0),
        ("num_heads", 0),
    ],
)
def test_a_flag_that_no_weights_could_fit_is_refused_by_itself(
    name: str, value: Any, state: dict[str, Tensor], opened: Any
) -> None:
    with pytest.raises(RequestError, match=f"^--{name} is {re.escape(repr(value))}; it must be "):
        opened(state, replace(ARCH, **{name: value}))


def test_what_the_weights_tell_need_not_be_given(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "w.safetensors")
    network = open_network(str(tmp_path / "w.safetensors"), {"image_size": 16, "num_head_channels": 32})
    assert network.spec.options.identity() == ARCH.identity()


@pytest.mark.parametrize(("channels", "variance"), [(1, False), (1, True), (3, True), (4, False)])
def test_channels_are_those_of_the_weights(channels: int, variance: bool, tmp_path: Path) -> None:
    arch = replace(ARCH, in_channels=channels, learn_sigma=variance)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(tensor) * 0.1 for name, tensor in UNet(arch).state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    network = open_network(str(tmp_path / "w.safetensors"), {"image_size": 16, "num_head_channels": 32})
    assert network.spec.shape == (channels, 16, 16)
    out = loaded(network)(torch.zeros(2, channels, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert out.shape == (2, channels, 16, 16)


def test_missing_unexpected_and_misshapen_tensors_are_named(state: dict[str, Tensor], opened: Any) -> None:
    changed = {name: tensor for name, tensor in state.items() if name != "out.2.bias"}
    changed |= {"extra": torch.zeros(1), "out.0.bias": torch.zeros(7)}
    with pytest.raises(RequestError, match=r"missing \(out\.2\.bias\).*unexpected \(extra\).*out\.0\.bias \[7\]"):
        opened(changed)


def test_weights_that_are_no_floating_point_numbers_are_refused(state: dict[str, Tensor], opened: Any) -> None:
    with pytest.raises(RequestError, match="int64"):
        opened(state | {"out.2.bias": torch.zeros(3, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_torso_convolutions_are_cast_and_all_else_is_float32(
    precision: Precision, dtype: torch.dtype, state: dict[str, Tensor], opened: Any
) -> None:
    stored = {name: tensor.half() for name, tensor in state.items()}
    network = loaded(opened(stored), precision)
    tensors = network.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        torso = name.startswith(("input_blocks", "middle_block", "output_blocks"))
        convolution = state[name.replace("bias", "weight")].dim() == 4
        assert tensor.dtype == (dtype if torso and convolution else torch.float32), name
        assert torch.equal(tensor, stored[name].to(tensor.dtype))


def test_a_worker_on_a_cpu_takes_weights_where_they_lie_and_writes_to_none(
    state: dict[str, Tensor], opened: Any, local_ray: None
) -> None:
    shipped = ship(opened(state), "fp32")
    one, other = (load(shipped, torch.device("cpu")) for _ in range(2))
    for name, tensor in one.state_dict().items():
        assert tensor.data_ptr() == other.state_dict()[name].data_ptr(), f"{name} was copied"
    reference = UNet(ARCH).eval()
    reference.load_state_dict(state)
    arguments = (torch.randn(2, 3, 16, 16), torch.tensor([1.0, 100.0]), torch.tensor([0, 9]))
    with torch.no_grad():
        torch.testing.assert_close(one(*arguments), reference(*arguments), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_a_network_is_ready_to_sample(state: dict[str, Tensor], opened: Any, local_ray: None) -> None:
    network = load(ship(opened(state), "bf16"), torch.device("cpu"))
    assert not network.training
    assert not any(p.requires_grad or p.is_meta for p in network.parameters())
    assert network.dtype == torch.bfloat16
    convolution = network.get_parameter("input_blocks.1.0.in_layers.2.weight")
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert network(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "assumed"),
    [
        ({}, "--image_size 64 and --num_heads 4 are assumed"),
        ({"image_size": 16}, "--num_heads 4 is assumed"),
        ({"num_head_channels": 32}, "--image_size 64 is assumed"),
        ({"image_size": 16, "num_heads": 1}, None),
    ],
)
def test_defaults_that_the_weights_cannot_confirm_are_told(
    settings: dict[str, Any], assumed: str | None, state: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    note = open_network(str(tmp_path / "w.safetensors"), settings, frozenset(settings)).note
    assert (note or "").startswith(assumed or "")
    assert (note is None) == (assumed is None)


def test_a_preset_of_another_file_does_not_contradict_and_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(UNet(ARCH).state_dict(), path)
    settings = {"preset": "edm-bedroom256", "num_channels": 4 * ARCH.num_channels, "image_size": ARCH.image_size}
    network = open_network(str(path), settings, frozenset({"preset"}))
    assert network.spec.options.num_channels == ARCH.num_channels
    assert "--preset edm-bedroom256 does not match --model" in str(network.note)
    contradiction = f"--num_channels is {4 * ARCH.num_channels}, but the file says {ARCH.num_channels}"
    assert contradiction in str(network.note)
    with pytest.raises(RequestError, match=f"^{contradiction}"):
        open_network(str(path), settings, frozenset({"preset", "num_channels"}))
