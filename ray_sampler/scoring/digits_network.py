"""The bundled extractor of handwritten digits: a small classifier, whose last hidden layer is the features."""

from __future__ import annotations

import hashlib
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from ray_sampler.errors import redact, require
from ray_sampler.scoring.extractor import WEIGHTS_FLAG, Extractor

FOLDER = "digits"
"""Of its weights, and of the features of held-out digits."""
FEATURES, CLASSES, SIZE = 64, 10, 32


class DigitsNetwork(nn.Module):
    """Pictures (B, H, W, C) uint8 -> features (B, 64) float32, of the mean of their channels at 32x32 pixels.

    `features` takes (B, 1, 32, 32) float32 in [-1, 1], and `head` makes logits (B, 10) of its result.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out_channels in ((1, 16), (16, 32), (32, 64)):
            convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(n, 64) float32 -> (n, 10)."""
        return self.head(torch.from_numpy(features)).numpy()

    def forward(self, pictures: Tensor) -> Tensor:
        x = pictures.float().mean(-1)[:, None] / 127.5 - 1
        if x.shape[-2:] != (SIZE, SIZE):
            x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", antialias=True)
        return self.features(x)


def bundled(name: str) -> bytes:
    """A file of the package: digits.safetensors, or held_out.npz."""
    return (files("ray_sampler.scoring") / FOLDER / name).read_bytes()


def open_digits(weights: str | None = None) -> Extractor:
    """The bundled extractor. Raises RequestError: weights are given."""
    require(
        weights is None,
        f"{WEIGHTS_FLAG} is {redact(weights)}, and digits brings its own weights; leave one of them out",
    )
    data = bundled("digits.safetensors")
    network = DigitsNetwork()
    network.load_state_dict(load(data))
    network.requires_grad_(False).eval()
    return Extractor(
        "digits",
        hashlib.sha256(data).hexdigest(),
        network,
        FEATURES,
        "bilinear with antialiasing, to 32x32",
        network.logits,
    )
