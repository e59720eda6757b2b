"""The networks that make features of pictures: the bundled one, a user's own, and the door to all by name."""

from __future__ import annotations

import hashlib
import importlib
from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from ray_sampler.errors import RequestError, printable, redact, require
from ray_sampler.networks.family import beside_user
from ray_sampler.networks.user_code import brief, companions
from ray_sampler.networks.weights import weights_hash
from ray_sampler.scoring.dinov2 import open_dinov2
from ray_sampler.scoring.extractor import WEIGHTS_FLAG, Extractor
from ray_sampler.scoring.inception import open_inception
from ray_sampler.scoring.options import FUNCTION, FeatureOptions

FOLDER = "digits"
"""Of its weights, and of the features of held-out digits."""
FEATURES, CLASSES, SIZE = 64, 10, 32


def open_extractor(options: FeatureOptions, shape: tuple[int, ...] = (64, 64, 3)) -> Extractor:
    """The extractor that a request asks for.

    Args:
        shape: (H, W, C) of the pictures, with which a function's network is tried.

    Raises:
        RequestError: its weights cannot be read or are others; a package is missing; a user's function raises, or
            returns something else.
    """
    name, weights = options.extractor, options.features_weights
    if name.startswith(FUNCTION):
        return open_own(name, weights, shape)
    if name == "digits":
        return open_digits(weights)
    return open_dinov2(weights) if name == "dinov2" else open_inception(weights)


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


class Own(nn.Module):
    """A user's network, which gets a copy of the pictures, in three channels: these pixels are also written."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        features: Tensor = self.network(pictures.expand(-1, -1, -1, 3).clone())
        return features


def open_own(name: str, weights: str | None, shape: tuple[int, ...]) -> Extractor:
    """The extractor that a user's function returns, called once with the path of its weights or None.

    Raises:
        RequestError: there is no such function, it raises, or its result does not map pictures to float32 (B, D).
    """
    shown = f"--features is {printable(name)}"
    module_name, _, function_name = name.removeprefix(FUNCTION).partition(":")
    try:
        with beside_user(), torch.inference_mode():
            module = importlib.import_module(module_name)
            network = getattr(module, function_name)(weights)
            require(
                isinstance(network, nn.Module),
                f"{shown}; the function returned a {type(network).__name__}; it must return a torch.nn.Module",
            )
            own = Own(network.cpu()).requires_grad_(False).eval()
            made = own(torch.zeros((2, *shape), dtype=torch.uint8))
    except (Exception, SystemExit) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{shown}; it raised {brief(error)}") from error
    said = f"{made.dtype} {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    right = isinstance(made, Tensor) and made.dtype == torch.float32 and made.ndim == 2 and len(made) == 2
    require(
        right and made.numel() > 0 and not made.is_meta,
        f"{shown}; for pictures {[2, *shape[:2], 3]} it returned {said.removeprefix('torch.')}; it must return "
        "float32 [2, D]",
    )
    tensors = {key: tensor for key, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}
    return Extractor(name, weights_hash(tensors), own, made.shape[1], "its own", by_value=companions(module))
