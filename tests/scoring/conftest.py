"""Extractors and sets of pictures that the tests of scores share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_sampler.scoring import inception
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.extractors import open_extractor
from ray_sampler.scoring.options import FeatureOptions
from tests.scoring.random_inception import write_weights


@pytest.fixture(scope="session")
def inception_file(torchvision: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of the real architecture; the published ones where INCEPTION_WEIGHTS names their file."""
    if given := os.environ.get("INCEPTION_WEIGHTS"):
        return Path(given)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    write_weights(path)
    return path


@pytest.fixture(scope="session")
def random_inception(inception_file: Path) -> Extractor:
    """The extractor of those weights; the hash of random ones is not the published one's."""
    with pytest.MonkeyPatch.context() as patch:
        if "INCEPTION_WEIGHTS" not in os.environ:
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
