"""Extractors and sets of pictures that the tests of scores share."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler.scoring import inception
from ray_sampler.scoring.extractors import Extractor, open_extractor
from ray_sampler.scoring.options import FeatureOptions


@pytest.fixture(scope="session")
def torchvision() -> Iterator[None]:
    """A torchvision that imports, though its compiled part, which no evaluator uses, may be for another build of torch.

    It then misses two operators that it describes; they are declared here, without anything that computes them.
    """
    with torch.library._scoped_library("torchvision", "FRAGMENT") as library:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
        yield


@pytest.fixture(scope="session")
def inception_file(torchvision: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the real architecture, as torch.save writes them; activations keep their scale with depth."""
    base: Any = importlib.import_module("torch_fidelity.feature_extractor_base").FeatureExtractorBase
    module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    network = module.FeatureExtractorInceptionV3.__new__(module.FeatureExtractorInceptionV3)
    base.__init__(network, "random", ["2048"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: network.state_dict())
        torch.manual_seed(0)
        network.__init__("random", ["2048"], feature_extractor_weights_path="none")
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor, generator=torch.Generator().manual_seed(len(name)))
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def random_inception(inception_file: Path) -> Extractor:
    """The extractor of those weights, whose hash is not the published one's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "PUBLISHED", "")
        return open_extractor(FeatureOptions(features="inception", features_weights=str(inception_file)))


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """(48, 32, 32, 3) uint8: smooth, and different from one another."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.uniform(-80, 335, (48, 3, 6, 6)))
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")
    return smooth.clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="session")
def digits() -> Extractor:
    return open_extractor(FeatureOptions(features="digits"))
