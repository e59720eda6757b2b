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
DUPLICATE_HASHES = 65_536
"""Distinct images that are remembered, at most: about 10 MB."""
SUSPICIOUS_SHARE = 0.01
"""Share of constant, saturated or duplicate images from which the report warns."""

_BLOCK_VALUES = 2**20


class PixelStatistics:
    """Histogram, mean and deviation of each channel, and counts of constant, saturated and duplicate images.

    Everything is an exact integer count, so that statistics of parts add up to those of the whole in any order.
    Memory is bounded: of the images' 64-bit hashes, a CRC-32 and an Adler-32, those below a threshold are kept, and
    the threshold is halved whenever more than `DUPLICATE_HASHES` would be. Duplicates are thus counted exactly up to
    that many distinct images, and estimated from a uniform sample of the distinct images beyond. Those within one call
    of `add` are always counted exactly.
    """

    def __init__(self) -> None:
        self.images = 0
        self.constant = 0
        self.saturated = 0
        self.duplicates_nearby = 0
        self.counts = np.zeros((0, 256), np.int64)
        """By channel; of no channel until images were added."""
        self._copies: dict[int, int] = {}
        self._hash_bits = 64

    def add(self, images: np.ndarray) -> None:
        """Count `images`, uint8 (n, H, W, C) of 1 or 3 channels."""
        n, channels = len(images), images.shape[-1]
        if n == 0:
            return
        self._widen(channels)
        mode = "RGB" if channels == 3 else "L"
        values = np.ascontiguousarray(images).reshape(n, -1)
        block = max(_BLOCK_VALUES // values.shape[1], 1)
        # Few images have equal corners, so few are looked at in whole.
        alike = images[(images[:, 0, 0] == images[:, -1, -1]).all(1)]
        self.constant += int((alike == alike[:, :1, :1]).all((1, 2, 3)).sum())
        for start in range(0, n, block):
            part = values[start : start + block]
            picture = Image.frombuffer(mode, (part.size // channels, 1), part, "raw", mode, 0, 1)
            self.counts += np.array(picture.histogram()).reshape(channels, 256)
            self.saturated += int(saturated(part).sum())
        hashes = [isal_zlib.crc32(image) << 32 | isal_zlib.adler32(image) for image in values]
        self.images += n
        self.duplicates_nearby += n - len(set(hashes))
        for value in hashes:
            self._remember(value, 1)

    def merge(self, other: PixelStatistics) -> None:
        """Count what `other` counted, too."""
        self.images += other.images
        self.constant += other.constant
        self.saturated += other.saturated
        self.duplicates_nearby += other.duplicates_nearby
        if other.images:
            self._widen(len(other.counts))
            self.counts += other.counts
        self._shrink(other._hash_bits)
        for value, copies in other._copies.items():
            self._remember(value, copies)

    @property
    def duplicates_exact(self) -> bool:
        """Whether every image was compared with every other."""
        return self._hash_bits == 64

    @property
    def duplicate_fraction(self) -> float:
        """Share of the images that repeat an earlier one; a lower bound or an estimate unless `duplicates_exact`."""
        seen = sum(self._copies.values())
        sampled = (seen - len(self._copies)) / seen if seen else 0.0
        return sampled if self.duplicates_exact else max(sampled, self.duplicates_nearby / max(self.images, 1))

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
            "duplicate_fraction": self.duplicate_fraction,
            "duplicates_exact": self.duplicates_exact,
        }
        return result | {"warnings": warnings(result)}

    def _widen(self, channels: int) -> None:
        if not len(self.counts):
            self.counts = np.zeros((channels, 256), np.int64)

    def _remember(self, value: int, copies: int) -> None:
        if value >> self._hash_bits:
            return
        self._copies[value] = self._copies.get(value, 0) + copies
        if len(self._copies) > DUPLICATE_HASHES:
            self._shrink(self._hash_bits - 1)

    def _shrink(self, bits: int) -> None:
        """Keep only hashes of at most `bits` bits."""
        if bits < self._hash_bits:
            self._hash_bits = bits
            self._copies = {value: copies for value, copies in self._copies.items() if not value >> bits}


def saturated(values: np.ndarray) -> np.ndarray:
    """Which rows of `values`, uint8 (n, d), are 0 or 255 almost everywhere: (n,) bool."""
    width = values.shape[1]

    def others(part: np.ndarray) -> np.ndarray:
        return np.count_nonzero(part + np.uint8(1) > 1, axis=1)  # 255 becomes 0, and 0 becomes 1

    # The middle of most images alone has more other values than a saturated one has at all.
    result = width - others(values[:, width * 3 // 8 : width * 5 // 8]) >= SATURATED_SHARE * width
    result[result] = width - others(values[result]) >= SATURATED_SHARE * width
    return result


def warnings(statistics: dict[str, Any]) -> list[str]:
    """What in the figures of `PixelStatistics.as_json` suggests broken output, one sentence each."""
    found = []
    for key, what, remedy in (
        ("constant_fraction", "are a single colour", "check the checkpoint and its architecture flags"),
        ("saturated_fraction", "are almost only black and white values", "check --precision and the sigma range"),
        ("duplicate_fraction", "repeat another one", "check the labels and the sampler"),
    ):
        share = statistics[key]
        if share >= SUSPICIOUS_SHARE:
            found.append(f"{100 * share:.3g}% of the images {what}; {remedy}.")
    return found
