from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ray_sampler.reporting.preview import choose_indices, class_rows, contact_sheet, reduced

ENDS = st.lists(st.integers(0, 300), max_size=16, unique=True).map(sorted)


@given(ends=ENDS, count=st.integers(1, 40))
def test_indices_are_evenly_spaced_among_what_exists(ends: list[int], count: int) -> None:
    ranges = list(zip(ends[::2], ends[1::2], strict=False))
    existing = [i for start, stop in ranges for i in range(start, stop)]
    indices = choose_indices(ranges, count)
    assert len(indices) == min(count, len(existing))
    for k, index in enumerate(indices):  # one of each stratum
        low, high = k * len(existing) // len(indices), (k + 1) * len(existing) // len(indices)
        assert index in existing[low:high]


def test_labels_that_repeat_with_the_index_do_not_all_come_out_the_same() -> None:
    labels = [index % 10 for index in choose_indices([(0, 50_000)], 100)]
    assert np.bincount(labels).tolist() == [10] * 10


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("side", "shown"), [(8, 96), (28, 84), (32, 96), (64, 128), (128, 128), (256, 128)])
def test_every_image_is_on_the_sheet_at_a_legible_size(side: int, shown: int, labelled: bool) -> None:
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10), (10, 200, 200)]
    images = np.stack([np.full((side, side, 3), colour, np.uint8) for colour in colours])
    labels = np.arange(5, dtype=np.int32) if labelled else None
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(images, labels, "digits", "5 samples · seed 42"))))
    corners = []
    for colour in colours:
        y, x = np.nonzero((sheet == colour).all(-1))
        assert len(y) == shown * shown
        assert np.ptp(y) == np.ptp(x) == shown - 1
        corners.append((y.min(), x.min()))
    assert corners == sorted(corners)  # in the order of the indices


@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 1), (128, 128, 3), (256, 256, 3), (200, 100, 1), (512, 300, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_reduced_image_is_small_and_looks_the_same_on_a_sheet(shape: tuple[int, int, int], dtype: type) -> None:
    image: np.ndarray = (np.random.default_rng(0).random(shape) * 255).astype(dtype)
    small = reduced(image)
    assert small.dtype == dtype
    assert max(small.shape[:2]) <= 128
    assert small.nbytes <= 128 * 128 * 3 * image.itemsize
    if dtype == np.uint8:  # a float's range is stretched over what is shown
        assert contact_sheet(small[None], None, "", "") == contact_sheet(image[None], None, "", "")


def test_small_images_keep_their_pixels_sharp(images: np.ndarray) -> None:
    sheet = Image.open(io.BytesIO(contact_sheet(images[:1], None, "", "")))
    tile = np.asarray(sheet)[-28 - 96 : -28, 28 : 28 + 96]
    assert np.array_equal(tile, images[0].repeat(12, 0).repeat(12, 1))


def test_nothing_of_a_caption_is_cut_off() -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    short, long = (
        np.asarray(Image.open(io.BytesIO(contact_sheet(images, None, "digits", " · ".join(["heun 18 steps"] * n)))))
        for n in (1, 30)
    )
    assert long.shape[0] > short.shape[0]
    assert long.shape[1] == short.shape[1]
    assert (long[:, -28:] == long[0, 0]).all()  # the margin stays free


def test_a_sheet_of_no_images_is_a_picture() -> None:
    assert contact_sheet(np.zeros((0, 32, 32, 3), np.uint8), None, "digits", "nothing yet").startswith(b"\x89PNG")


def test_each_class_has_a_row_of_its_images(images: np.ndarray) -> None:
    rows = class_rows(images[:6], np.array([7, 3, 7, 7, 3, 7]), count=3)
    assert list(rows) == [3, 7]
    assert len({Image.open(io.BytesIO(png)).size for png in rows.values()}) == 1
    strip = np.asarray(Image.open(io.BytesIO(rows[7])).convert("RGB"))
    for position, image in enumerate((0, 2, 3)):
        assert np.array_equal(strip[::12, position * 104 : position * 104 + 96 : 12], images[image])


def test_a_long_title_stays_on_the_sheet() -> None:
    """Wrapped between its words, and within one that is too long by itself."""
    images = np.zeros((1, 8, 8, 3), np.uint8)
    for title in (f"{'n' * 30}.pkl · heun 18 steps · seed 42 · 0a1b2c3d", f"{'m' * 200} · heun"):
        sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(images, None, title, "one of one"))))
        assert sheet.shape[1] == 480
        assert (sheet[:, -20:] == sheet[0, 0]).all(), "nothing is drawn in the margin"
