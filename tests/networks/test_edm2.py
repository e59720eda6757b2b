"""EDM2's UNet computes what the published one computes, and is folded without a change."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from ray_sampler.networks import edm2
from ray_sampler.networks.edm2 import Edm2Options, Edm2UNet
from ray_sampler.networks.nvidia import Refused, SavedNetwork
from tests.networks.reference import denoised, network, numbers, saved

REFERENCES = ("edm2_16", "edm2_half16")


def published(width: int, channels: int = 4, resolution: int = 64, classes: int = 1000) -> Edm2Options:
    return edm2.options_from(
        SavedNetwork(
            "Precond",
            {
                "img_resolution": resolution,
                "img_channels": channels,
                "label_dim": classes,
                "model_channels": width,
            },
            {},
        )
    )


def on_meta(options: Edm2Options) -> Edm2UNet:
    with torch.device("meta"):
        return Edm2UNet(options)


def randomised(options: Edm2Options, dtype: torch.dtype = torch.float32, seed: int = 0) -> Edm2UNet:
    """A network whose stored tensors are all random, as a snapshot may hold them."""
    stream = torch.Generator().manual_seed(seed)
    empty = on_meta(options)
    tensors = {name: torch.randn(t.shape, generator=stream).to(dtype) for name, t in empty.state_dict().items()}
    empty.load_state_dict(tensors, assign=True)
    return empty.eval()


SMALL = Edm2Options(
    img_resolution=16,
    img_channels=3,
    label_dim=7,
    channels=(16, 32),
    noise_channels=16,
    emb_channels=32,
    num_blocks=1,
    attn_resolutions=(8,),
    channels_per_head=16,
)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("fold", [False, True])
def test_denoises_as_the_published_network(name, fold):
    expected, made = numbers(name, "forward"), network(name, fold=fold)
    for key, y in (("D", expected.get("labels")), ("D_zero_label", None)):
        if key in expected:
            found = denoised(made, expected["x_scaled"], expected["sigma"], y)
            assert (found - expected[key]).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("width", "channels", "count"),
    [
        (64, 4, 31_309_029),
        (128, 4, 124_713_253),
        (192, 4, 280_212_837),
        (256, 4, 497_807_781),
        (320, 4, 777_498_085),
        (384, 4, 1_119_283_749),
        (448, 4, 1_523_164_773),
        (192, 3, 280_209_381),
        (384, 3, 1_119_276_837),
    ],
)
def test_has_the_parameters_of_the_published_sizes(width, channels, count):
    logvar = 128  # of the estimate of the loss, which sampling leaves out
    began = time.process_time()
    made = on_meta(published(width, channels))
    assert time.process_time() - began < 2
    assert sum(parameter.numel() for parameter in made.parameters()) + logvar == count
    assert len(made.state_dict()) + 3 == 203


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("taps", [(1.0, 1.0), (1.0, 3.0, 3.0, 1.0)])
def test_folding_changes_nothing(stored, taps):
    options = replace(SMALL, resample_filter=taps)
    x, sigma, y = torch.randn(4, 3, 16, 16), torch.tensor([0.002, 0.5, 3.0, 80.0]), torch.tensor([0, 3, 6, 7])
    plain = denoised(randomised(options, stored), x, sigma, y)
    folded = denoised(edm2.fold(randomised(options, stored), torch.float32), x, sigma, y)
    assert (plain - folded).abs().max() < 1e-5
    assert plain.abs().max() > 0.1


def test_folds_to_a_dtype_and_keeps_the_embedding_in_float32():
    folded = edm2.fold(randomised(SMALL, torch.float16), torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in folded.named_parameters() if name.endswith("weight")}
    for name, dtype in dtypes.items():
        assert dtype == (torch.float32 if "emb_" in name else torch.bfloat16)
    x, sigma, y = torch.randn(4, 3, 16, 16), torch.tensor([0.002, 0.5, 3.0, 80.0]), torch.tensor([0, 3, 6, 7])
    exact = denoised(randomised(SMALL, torch.float16), x, sigma, y)
    found = denoised(folded, x, sigma, y)
    assert found.dtype == torch.float32
    assert 0 < (exact - found).abs().max() < 0.1
    with pytest.raises(ValueError, match="folded already"):
        edm2.fold(folded, torch.float32)


def test_channels_that_are_no_multiple_of_a_head_make_wider_heads_or_none():
    """16 channels a head: 40 are two heads of 20, and 8 have no attention."""
    options = replace(SMALL, channels=(8, 40), attn_resolutions=(16, 8))
    edm2._check(options)
    made = randomised(options)
    assert not [name for name in made.state_dict() if "16x16" in name and "attn" in name]
    block, qkv = made.dec["8x8_in0"], torch.randn(2, 120, 8, 8)
    assert isinstance(block, edm2.Block)
    parts = qkv.double().reshape(2, 2, 20, 3, 64)
    parts = parts / (1e-4 + parts.square().mean(2, keepdim=True).sqrt())
    q, k, v = parts.unbind(3)
    weights = (torch.einsum("bhcq,bhck->bhqk", q, k) / 20**0.5).softmax(3)
    expected = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(2, 40, 8, 8)
    assert (block.attended(qkv) - expected).abs().max() < 1e-5
    with pytest.raises(Refused, match="56 channels in heads of 16"):  # three heads
        edm2._check(replace(options, channels=(8, 56)))


def test_the_layout_of_what_comes_in_makes_no_difference():
    plain, turned = randomised(SMALL, torch.float16), randomised(SMALL, torch.float16)
    for parameter in turned.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    x, sigma, y = torch.randn(4, 3, 16, 16), torch.tensor([0.002, 0.5, 3.0, 80.0]), torch.tensor([0, 3, 6, 7])
    expected = denoised(edm2.fold(plain, torch.float32), x, sigma, y)
    found = denoised(edm2.fold(turned, torch.float32), x.contiguous(memory_format=torch.channels_last), sigma, y)
    assert torch.equal(found, expected)


def test_the_gain_is_divided_in_the_dtype_in_which_it_is_stored():
    gain = torch.tensor(0.7311, dtype=torch.float16)
    layer = edm2.Layer(12, 5)
    layer.weight = torch.nn.Parameter(torch.randn(5, 12, dtype=torch.float16))
    w = layer.weight.detach().double()
    norm = w / (1e-4 + w.norm(dim=1, keepdim=True) / 12**0.5)
    expected = norm * (gain / 12**0.5).double()  # rounded to float16
    assert (layer.effective(gain).double() - expected).abs().max() < 1e-6
    assert (norm * (gain.double() / 12**0.5) - expected).abs().max() > 1e-5


def test_the_null_label_is_not_a_class():
    made = edm2.fold(randomised(SMALL), torch.float32)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 3.0])
    null = denoised(made, x, sigma, torch.tensor([7, 7]))
    assert torch.equal(null, denoised(made, x, sigma, None))
    assert (null - denoised(made, x, sigma, torch.tensor([0, 6]))).abs().max() > 1e-3


def test_one_level_may_serve_a_whole_batch():
    made = edm2.fold(randomised(SMALL), torch.float32)
    x, y = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 7])
    one = denoised(made, x, torch.tensor([0.5]), y)
    assert (one - denoised(made, x, torch.tensor([0.5] * 3), y)).abs().max() < 1e-5


@pytest.mark.parametrize("name", REFERENCES)
def test_shapes_tell_what_the_arguments_tell(name):
    stored = saved(name)
    recorded = edm2.options_from(stored)
    bare = {key.removeprefix("unet."): tensor for key, tensor in stored.tensors.items()}
    for tensors in (stored.tensors, bare):
        shown = edm2.options_from_shapes(tensors, channels_per_head=32)
        assert replace(shown, resample_filter=recorded.resample_filter) == recorded


def test_shapes_tell_the_published_sizes():
    options = published(192)
    assert edm2.options_from_shapes(on_meta(options).state_dict()) == options
    assert edm2.options_from_shapes(on_meta(published(128, classes=0)).state_dict()) == published(128, classes=0)
    with pytest.raises(Refused, match="not those of an EDM2 network"):
        edm2.options_from_shapes({"input_blocks.0.0.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("img_resolution", 12),
        ("img_resolution", None),
        ("img_resolution", 2**40),
        ("model_channels", "192"),
        ("model_channels", -1),
        ("channel_mult", []),
        ("channel_mult", [1, float("nan")]),
        ("channel_mult", list(range(1, 100))),
        ("num_blocks", 10**600),
        ("res_balance", 3),
        ("clip_act", -1),
        ("resample_filter", [0, 0]),
        ("attn_resolutions", ["8"]),
        ("channel_mult_emb", float("inf")),
    ],
)
def test_arguments_that_make_no_sense_are_refused(name, value):
    arguments = {"img_resolution": 16, "img_channels": 3, "label_dim": 0, "model_channels": 64, name: value}
    with pytest.raises(Refused) as caught:
        edm2.options_from(SavedNetwork("Precond", arguments, {}))
    assert len(str(caught.value)) < 200


def test_the_encoder_separates_latents_from_pixels():
    assert not edm2.latents(None)
    assert not edm2.latents(SavedNetwork("StandardRGBEncoder", {}, {}))
    assert edm2.latents(SavedNetwork("StabilityVAEEncoder", {"vae_name": "stabilityai/sd-vae-ft-mse"}, {}))
    published = {"raw_std": (4.17, 4.62, 3.71, 3.28), "final_std": 0.5}
    assert edm2.latents(SavedNetwork("StabilityVAEEncoder", published, {}))
    for changed in ({"final_std": 1}, {"raw_mean": [0, 0, 0, 0]}):
        with pytest.raises(Refused, match=f"scaled with {next(iter(changed))}"):
            edm2.latents(SavedNetwork("StabilityVAEEncoder", published | changed, {}))
    with pytest.raises(Refused, match="OtherEncoder"):
        edm2.latents(SavedNetwork("OtherEncoder", {}, {}))
