from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.reporting import pixels
from ray_sampler.reporting.pixels import PixelStatistics


def collected(*parts: np.ndarray) -> PixelStatistics:
    statistics = PixelStatistics()
    for part in parts:
        statistics.add(part)
    return statistics


def test_mean_deviation_and_histogram_are_those_of_the_pixels(images: np.ndarray) -> None:
    found = collected(images[:13], images[13:]).as_json()
    assert found["mean"] == pytest.approx(images.astype(np.float64).mean((0, 1, 2)), abs=1e-4)
    assert found["std"] == pytest.approx(images.astype(np.float64).std((0, 1, 2)), abs=1e-4)
    for channel in range(3):
        counts, _ = np.histogram(images[..., channel], bins=32, range=(0, 256))
        assert found["histogram"][channel] == counts.tolist()
    assert found["warnings"] == []


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 4, 4, 3), np.uint8)
    images[:5] = images[20]
    whole = collected(images).as_json()
    for cuts in ([], [0, 3, 40], [1, 20, 21]):
        assert collected(*np.split(images, cuts)).as_json() == whole
    assert whole["duplicate_fraction"] == 5 / 40


@pytest.mark.parametrize("kind", ["constant", "saturated", "duplicate"])
def test_suspicious_images_are_counted_and_warned_of(kind: str, images: np.ndarray) -> None:
    broken = images.copy()
    if kind == "constant":
        broken[:4] = np.arange(4)[:, None, None, None] + [1, 50, 100]
    elif kind == "saturated":
        broken[:4] = np.where(broken[:4] < 128, 0, 255)
    else:
        broken[:4] = broken[4]
    found = collected(broken[:20], broken[20:]).as_json()
    fractions = {name: found[f"{name}_fraction"] for name in ("constant", "saturated", "duplicate")}
    assert fractions == {"constant": 0, "saturated": 0, "duplicate": 0} | {kind: 0.1}
    assert len(found["warnings"]) == 1
    assert found["warnings"][0].startswith("10% of the images")


@given(width=st.integers(1, 300), share=st.floats(0.9, 1.0), seed=st.integers(0, 2**32))
def test_an_image_is_saturated_exactly_where_enough_of_its_values_are_extreme(
    width: int, share: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    values = random.choice(np.array([0, 255], np.uint8), (8, width))
    values[random.random((8, width)) > share] = 128
    extreme = ((values == 0) | (values == 255)).sum(1)
    found = collected(values[:, None, :, None]).as_json()
    assert found["saturated_fraction"] == (extreme >= pixels.SATURATED_SHARE * width).mean()
