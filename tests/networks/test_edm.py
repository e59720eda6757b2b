"""SongUNet computes what the published one computes, for both of its kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ray_sampler.errors import RequestError
from ray_sampler.networks import edm
from ray_sampler.networks.edm import SongUNet, SongUNetOptions
from ray_sampler.networks.nvidia import Refused, SavedNetwork
from ray_sampler.networks.opening import open_network
from tests.networks.nvidia_files import dumped, module, snapshot
from tests.networks.reference import denoised, network, numbers, saved

REFERENCES = ("edm_ddpmpp16", "edm_ncsnpp8")

VP: dict[str, Any] = {"embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard"}
VP |= {"channel_mult_noise": 1, "resample_filter": [1, 1], "model_channels": 128, "augment_dim": 9}
VE = VP | {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2}
VE |= {"resample_filter": [1, 3, 3, 1]}
CIFAR = {"img_resolution": 32, "img_channels": 3, "channel_mult": [2, 2, 2], "model_type": "SongUNet"}
FFHQ = CIFAR | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}


def options(**arguments: Any) -> SongUNetOptions:
    return edm.options_from(SavedNetwork("EDMPrecond", arguments, {}))


def on_meta(made: SongUNetOptions) -> SongUNet:
    with torch.device("meta"):
        return SongUNet(made)


@pytest.mark.parametrize("name", REFERENCES)
def test_denoises_as_the_published_network(name):
    expected, made = numbers(name, "forward"), network(name)
    for key, y in (("D", expected["labels"]), ("D_zero_label", None)):
        found = denoised(made, expected["x"], expected["sigma"], y)
        assert (found - expected[key]).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("arguments", "count", "tensors"),
    [
        (CIFAR | VP | {"label_dim": 10}, 55_735_299, 427),
        (CIFAR | VP | {"label_dim": 0}, 55_733_891, None),
        (CIFAR | VE | {"label_dim": 0}, 56_397_827, None),
        (FFHQ | VP | {"label_dim": 0}, 61_805_571, None),
    ],
    ids=["cifar cond vp", "cifar uncond vp", "cifar uncond ve", "ffhq vp"],
)
def test_has_the_parameters_of_the_published_networks(arguments, count, tensors):
    made = on_meta(options(**arguments))
    assert sum(parameter.numel() for parameter in made.parameters()) == count
    if tensors:
        filters = [m for m in made.modules() if isinstance(m, edm.Convolution) and m.resample != "keep"]
        assert len(made.state_dict()) + len(filters) == tensors


@pytest.mark.parametrize("name", REFERENCES)
def test_the_null_label_is_the_zero_vector(name):
    expected, made = numbers(name, "forward"), network(name)
    null = torch.full((4,), made.options.label_dim)
    found = denoised(made, expected["x"], expected["sigma"], null)
    assert (found - expected["D_zero_label"]).abs().max() < 5e-6
    assert (found - expected["D"]).abs().max() > 1e-4


@pytest.mark.parametrize("name", REFERENCES)
def test_the_torso_alone_changes_its_precision(name):
    expected, made = numbers(name, "forward"), network(name)
    assert isinstance(made, SongUNet)
    made.convert_torso(torch.bfloat16)
    dtypes = {key: parameter.dtype for key, parameter in made.named_parameters()}
    halved = {key for key, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert {key for key in halved if "map" in key or "norm" in key or "affine" in key or "aux_conv" in key} == set()
    assert {key for key in dtypes if "conv0" in key or "qkv" in key or "skip" in key} <= halved
    found = denoised(made, expected["x"], expected["sigma"], expected["labels"])
    assert found.dtype == torch.float32
    assert 0 < (found - expected["D"]).abs().max() < 0.05


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 3, 3, 2, 1]])
@pytest.mark.parametrize("encoder", ["standard", "residual"])
def test_runs_with_every_filter_and_encoder(taps, encoder):
    made = SongUNet(
        options(
            img_resolution=8,
            img_channels=1,
            model_channels=8,
            channel_mult=[1, 3],
            num_blocks=2,
            attn_resolutions=[],
            resample_filter=taps,
            encoder_type=encoder,
        )
    ).eval()
    out = denoised(made, torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), None)
    assert out.shape == (2, 1, 8, 8)
    assert out.isfinite().all()


def test_the_file_names_its_preconditioning():
    kinds = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
    for class_name, kind in kinds.items():
        assert edm.preconditioning(SavedNetwork(class_name, {}, {})) == kind
    assert edm.preconditioning(saved("edm_ncsnpp8")) == "edm"
    with pytest.raises(
        Refused, match=r"preconditioned by 'Mine'; only EDMPrecond, Precond, VPPrecond, VEPrecond can be"
    ):
        edm.preconditioning(SavedNetwork("Mine", {}, {}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "OtherUNet"),
        ("encoder_type", "skip"),
        ("decoder_type", "skip"),
        ("embedding_type", "other"),
        ("img_resolution", 36),
        ("resample_filter", [1, 2, 1]),
        ("num_blocks", 0),
        ("out_channels", 6),
    ],
)
def test_what_no_published_network_has_is_refused(name, value):
    with pytest.raises(Refused):
        options(**(FFHQ | {name: value}))


@pytest.mark.parametrize("channels", [132, 48])
def test_channels_that_cannot_be_normalised_are_refused(channels, tmp_path):
    arguments = {"model_type": "SongUNet", "img_resolution": 16, "model_channels": channels, "channel_mult": [1, 2]}
    (tmp_path / "net.pkl").write_bytes(snapshot("EDMPrecond", {"model.x": torch.ones(1)}, arguments))
    with pytest.raises(RequestError, match=r"normalises \d+ channels, which cannot be split into 32 groups"):
        open_network(str(tmp_path / "net.pkl"), {})


def test_a_snapshot_of_another_network_is_named(tmp_path):
    networks = {name: module("Generator", {"synthesis.weight": torch.ones(1)}) for name in ("G", "G_ema")}
    (tmp_path / "net.pkl").write_bytes(dumped(networks))
    with pytest.raises(RequestError, match="under 'G_ema' it has a network of class 'Generator', which is neither of"):
        open_network(str(tmp_path / "net.pkl"), {"weights_key": "G_ema"})
