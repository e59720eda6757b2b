"""The Inception network of FID: torch-fidelity's architecture, with the published weights."""

from __future__ import annotations

import importlib
import io
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.weights import Checkpoint, read_checkpoint
from ray_sampler.scoring.extractor import WEIGHTS_FLAG, Extractor, rgb

ADDRESS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"
"""How the SHA-256 of the published file begins, which pytorch-fid gives another name."""

FEATURES = 2048
SPATIAL = 7
"""Channels of the first branch of `Mixed_6d` that sFID takes, 17x17 each."""

BEFORE = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"),
)
"""The parts before `Mixed_6d`, in order."""


class Inception(nn.Module):
    """Pictures (B, H, W, C) uint8 -> the 2,048 features of FID, float32."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network(rgb(pictures))[0]
        return features


class SpatialInception(Inception):
    """Pictures (B, H, W, C) uint8 -> the 2,023 spatial features of sFID (Nash et al. 2021), 17x17x7 float32."""

    def forward(self, pictures: Tensor) -> Tensor:
        x = resized(rgb(pictures).float(), (299, 299), align_corners=False) / 128 - 1
        for name in BEFORE:
            x = getattr(self.network, name)(x)
        x = self.network.Mixed_6d.branch1x1(x)[:, :SPATIAL].permute(0, 2, 3, 1)
        return x.flatten(1)


def resized(*args: Any, **options: Any) -> Tensor:
    """TensorFlow 1's bilinear interpolation."""
    result: Tensor = fidelity("interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x(
        *args, **options
    )
    return result


def fidelity(module: str) -> Any:
    """A module of torch-fidelity. Raises RequestError: it is not installed, or does not fit this torch."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:  # torchvision, which it imports, of another build of torch
        raise RequestError(
            f"--features inception needs torch-fidelity, which cannot be imported ({' '.join(str(error).split())}); "
            "pip install 'ray-sampler[score]', with a torchvision that was built for the installed torch"
        ) from error


def open_inception(weights: str | None) -> Extractor:
    """The extractor of FID, KID, precision and recall, and the Inception Score.

    Args:
        weights: path or URL of the published file; it is fetched where None.

    Raises:
        RequestError: it cannot be read, or is another one; torch-fidelity is missing.
    """
    made = fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    checkpoint = read_checkpoint(weights or ADDRESS, None, WEIGHTS_FLAG, with_sha256=True)
    sha256 = checkpoint.sha256 or ""
    require(
        sha256.startswith(PUBLISHED),
        f"{WEIGHTS_FLAG} is {checkpoint.shown}, whose SHA-256 begins with {sha256[:8]}, the published Inception's with "
        f"{PUBLISHED}; give that file, or --features python:module:function for another network",
    )
    network = made("inception", [str(FEATURES)], feature_extractor_weights_path=as_saved(checkpoint))
    head = partial(logits, network.fc.weight.detach().numpy())
    resize = "bilinear as in TensorFlow 1, to 299x299"
    return Extractor("inception", sha256, Inception(network), FEATURES, resize, head)


def spatial_of(extractor: Extractor) -> Extractor:
    """The extractor of sFID, of the same network as that of FID."""
    network = SpatialInception(extractor.network.network)
    return replace(extractor, name="inception-spatial", network=network, dims=SPATIAL * 17 * 17, head=None)


def as_saved(checkpoint: Checkpoint) -> io.BytesIO:
    """The tensors as a file of torch.save: torch-fidelity would unpickle the user's own."""
    file = io.BytesIO()
    torch.save(checkpoint.tensors, file)
    file.seek(0)
    return file


def logits(weight: np.ndarray, features: np.ndarray) -> np.ndarray:
    """(n, 2048) -> (n, 1008), without the bias, as the Inception Score has it."""
    return features @ weight.T
