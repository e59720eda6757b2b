"""The contact sheet: evenly spaced samples of a run as one picture."""

from __future__ import annotations

import io
import math
import textwrap
from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE = 96
"""Side of a tile in pixels that small images are enlarged towards, by a whole factor."""
LARGEST_TILE = 128
"""Side of a tile in pixels that larger images are reduced to."""

BACKGROUND = (250, 249, 246)
INK = (33, 37, 41)
FAINT = (120, 124, 130)
MARGIN = 28
GAP = 8
SMALLEST_SHEET = 480
LABEL_HEIGHT = 16

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def choose_indices(available: Iterable[tuple[int, int]], count: int = 100) -> list[int]:
    """Sample indices for a contact sheet, evenly spaced among those that exist.

    The samples that exist are cut into `count` equal strata and one index is taken of each, further into each
    stratum than into the one before, so that labels which repeat with the index do not all come out the same.

    Args:
        available: ranges [start, stop) that exist, ascending and without overlap.
        count: indices wanted.

    Returns:
        At most `count` distinct indices in ascending order; equal arguments give equal indices.
    """
    ranges = list(available)
    ends = [0, *accumulate(stop - start for start, stop in ranges)]
    total = ends[-1]
    count = min(count, total)
    bounds = [k * total // count for k in range(count + 1)] if count else []
    positions = [low + k % (high - low) for k, (low, high) in enumerate(pairwise(bounds))]
    found = [(position, bisect_right(ends, position) - 1) for position in positions]
    return [ranges[i][0] + position - ends[i] for position, i in found]


def contact_sheet(images: np.ndarray, labels: np.ndarray | None, title: str, caption: str) -> bytes:
    """Images side by side under a title, about square, as a PNG file.

    Args:
        images: (n, H, W, C) as the run has them, in the order of their sample indices. n may be 0.
        labels: integers (n,), written under the images; None for none.
        title: the first line, wrapped to the width of the sheet.
        caption: the second line, wrapped to the width of the sheet.
    """
    tiles = grid(as_pictures(images), labels, max(math.ceil(math.sqrt(len(images))), 1))
    width = max(2 * MARGIN + tiles.width, SMALLEST_SHEET)
    lines = [
        (line, font, height, colour)
        for text, font, height, colour in ((title, _font(22), 28, INK), (caption, _font(14), 20, FAINT))
        for line in wrapped(text, font, width - 2 * MARGIN)
    ]
    top = MARGIN + sum(height for _, _, height, _ in lines) + 24
    sheet = Image.new("RGB", (width, top + tiles.height + MARGIN), BACKGROUND)
    draw, y = ImageDraw.Draw(sheet), MARGIN
    for line, font, height, colour in lines:
        draw.text((MARGIN, y), line, colour, font)
        y += height
    sheet.paste(tiles, (MARGIN, top), tiles)
    return png(sheet)


def class_rows(images: np.ndarray, labels: np.ndarray, count: int = 10) -> dict[int, bytes]:
    """The first images of each class side by side, as PNG files of one width with nothing between the images.

    Args:
        images: (n, H, W, C) as the run has them, in the order of their sample indices.
        labels: integers (n,).
        count: images of a class, at most.
    """
    pictures = as_pictures(images)
    columns = min(count, np.unique(labels, return_counts=True)[1].max())
    return {int(label): png(grid(pictures[labels == label][:columns], None, columns)) for label in np.unique(labels)}


def grid(images: np.ndarray, labels: np.ndarray | None, columns: int) -> Image.Image:
    """Pictures in rows of `columns`, on nothing, with their labels under them.

    Args:
        images: (n, H, W, 3) uint8.
        labels: integers (n,); None for none.
    """
    n, height, width = images.shape[:3]
    tile = _tile_size(width, height)
    across, down = tile[0] + GAP, tile[1] + GAP + (0 if labels is None else LABEL_HEIGHT)
    picture = Image.new("RGBA", (columns * across - GAP, max(-(-n // columns) * down - GAP, 0)))
    draw, font = ImageDraw.Draw(picture), _font(12)
    filter_ = Image.Resampling.NEAREST if tile[0] >= width else Image.Resampling.LANCZOS
    for i, image in enumerate(images):
        x, y = i % columns * across, i // columns * down
        picture.paste(Image.fromarray(np.ascontiguousarray(image)).resize(tile, filter_), (x, y))
        if labels is not None:
            draw.text((x + tile[0] / 2, y + tile[1] + 3), str(int(labels[i])), FAINT, font, anchor="mt")
    return picture


def as_pictures(images: np.ndarray) -> np.ndarray:
    """What can be looked at of a run's results: (n, H, W, C) uint8 or float32 -> (n, H, W, 3) uint8.

    Grey pictures are repeated. Of latents the first three channels are shown, or the first alone, each stretched over
    all images so that its middle 98% fill the range from black to white.
    """
    channels = images[..., : 3 if images.shape[-1] >= 3 else 1]
    if channels.dtype != np.uint8:
        low, high = np.percentile(channels, (1, 99), axis=(0, 1, 2))
        channels = ((channels - low) / np.maximum(high - low, 1e-12) * 255).clip(0, 255).astype(np.uint8)
    return np.broadcast_to(channels, (*channels.shape[:3], 3))


def reduced(image: np.ndarray) -> np.ndarray:
    """What a sheet shows of a sample (H, W, C), in its dtype and no larger than a tile: (H', W', 1 or 3).

    A tile that is drawn of it is the one that would be drawn of the sample.
    """
    shown = image[..., : 3 if image.shape[-1] >= 3 else 1]
    size = _tile_size(shown.shape[1], shown.shape[0])
    if size[0] >= shown.shape[1]:
        return shown.copy()
    channels = [
        Image.fromarray(np.ascontiguousarray(shown[..., c])).resize(size, Image.Resampling.LANCZOS)
        for c in range(shown.shape[-1])
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """`text` in lines of about `width` pixels, broken between words where that is possible, and no line longer."""
    letters = len(text)
    while True:
        lines = textwrap.wrap(text, max(letters, 1))
        widest = max((font.getlength(line) for line in lines), default=0)
        if widest <= width or letters <= 1:
            return lines
        letters = min(letters - 1, int(letters * width / widest))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a tile: small images are enlarged by a whole factor, so that their pixels stay square."""
    side = max(width, height)
    if side > LARGEST_TILE:
        return max(round(width * LARGEST_TILE / side), 1), max(round(height * LARGEST_TILE / side), 1)
    factor = max(round(TILE / side), 1)
    return width * factor, height * factor


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
