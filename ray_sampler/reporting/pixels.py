"""Pixel statistics of a run, collected as the images pass by, and what in them is suspicious."""

from __future__ import annotations

from typing import Any

import numpy as np
from isal import isal_zlib
from PIL import Image

HISTOGRAM_BINS = 32
SATURATED_SHARE = 0.99
"""Share of an image's values at 0 or 255 from which the image counts as saturated. High, for the black background
of drawings is not a fault."""
SUSPICIOUS_SHARE = 0.01
"""Share of constant, saturated or duplicate images from which the report warns."""


class PixelStatistics:
    """Histogram, mean and deviation of each channel, and counts of constant, saturated and duplicate images.

    Everything is an exact integer count. Of each image 64 bits are remembered, a CRC-32 and an Adler-32, so whoever has
    very many gives it some of them only.
    """

    def __init__(self) -> None:
        self.images = 0
        self.constant = 0
        self.saturated = 0
        self.counts = np.zeros((0, 256), np.int64)
        """By channel; of no channel until images were added."""
        self._hashes: set[int] = set()

    def add(self, images: np.ndarray) -> None:
        """Count `images`, uint8 (n, H, W, C) of 1 or 3 channels."""
        n, channels = len(images), images.shape[-1]
        if n == 0:
            return
        values = np.ascontiguousarray(images).reshape(n, -1)
        mode = "RGB" if channels == 3 else "L"
        picture = Image.frombuffer(mode, (values.size // channels, 1), values, "raw", mode, 0, 1)
        counts = np.array(picture.histogram()).reshape(channels, 256)
        self.counts = self.counts + counts if self.images else counts
        self.images += n
        self.constant += int((images == images[:, :1, :1]).all((1, 2, 3)).sum())
        extreme = np.count_nonzero((values == 0) | (values == 255), axis=1)
        self.saturated += int((extreme >= SATURATED_SHARE * values.shape[1]).sum())
        self._hashes.update(isal_zlib.crc32(image) << 32 | isal_zlib.adler32(image) for image in values)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values; the statistics of at least one image.

        mean and std are of pixel values 0 to 255, by channel; histogram counts values in 32 equal bins, by channel;
        fractions are of the images.
        """
        levels = np.arange(256)
        totals = self.counts.sum(1)
        mean = (self.counts * levels).sum(1) / totals
        variance = (self.counts * (levels - mean[:, None]) ** 2).sum(1) / totals
        result: dict[str, Any] = {
            "images": self.images,
            "mean": [round(float(m), 4) for m in mean],
            "std": [round(float(s), 4) for s in np.sqrt(variance)],
            "histogram": self.counts.reshape(len(self.counts), HISTOGRAM_BINS, -1).sum(2).tolist(),
            "constant_fraction": self.constant / self.images,
            "saturated_fraction": self.saturated / self.images,
            "duplicate_fraction": (self.images - len(self._hashes)) / self.images,
            "duplicates_exact": True,
        }
        return result | {"warnings": warnings(result)}


def warnings(statistics: dict[str, Any]) -> list[str]:
    """What in the figures of `PixelStatistics.as_json` suggests broken output, one sentence each."""
    causes = (
        ("constant_fraction", "are a single colour", "check the checkpoint and its architecture flags"),
        ("saturated_fraction", "are almost only black and white values", "check --precision and the sigma range"),
        ("duplicate_fraction", "repeat another one", "check the labels and the sampler"),
    )
    return [
        f"{100 * statistics[key]:.3g}% of the images {what}; {remedy}."
        for key, what, remedy in causes
        if statistics[key] >= SUSPICIOUS_SHARE
    ]
