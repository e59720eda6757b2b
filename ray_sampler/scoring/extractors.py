"""The networks that make features of pictures, by name."""

from __future__ import annotations

from ray_sampler.scoring import digits_network, dinov2, inception, own
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.options import FUNCTION, FeatureOptions


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
        return own.open_own(name, weights, shape)
    if name == "digits":
        return digits_network.open_digits(weights)
    return dinov2.open_dinov2(weights) if name == "dinov2" else inception.open_inception(weights)
