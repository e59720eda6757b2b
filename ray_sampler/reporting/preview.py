"""The contact sheet: evenly spaced samples of a run as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

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


def choose_indices(num_samples: int, available: Iterable[tuple[int, int]], count: int = 100) -> list[int]:
    """Sample indices for a contact sheet, evenly spaced among those that exist.

    The samples that exist are cut into `count` equal strata and one index is taken of each, further into each
    stratum than into the one before, so that labels which repeat with the index do not all come out the same.

    Args:
        num_samples: samples of the run; indices beyond it are left out.
        available: ranges [start, stop) that exist, in any order, possibly overlapping.
        count: indices wanted.

    Returns:
        At most `count` distinct indices in ascending order; equal arguments give equal indices.
    """
    ranges: list[list[int]] = []
    for start, stop in sorted((max(start, 0), min(stop, num_samples)) for start, stop in available):
        if start >= stop:
            continue
        if ranges and start <= ranges[-1][1]:
            ranges[-1][1] = max(ranges[-1][1], stop)
        else:
            ranges.append([start, stop])
    total = sum(stop - start for start, stop in ranges)
    count = min(count, total)
    indices = []
    position, current = 0, 0  # samples before ranges[current]
    for k in range(count):
        low, high = k * total // count, (k + 1) * total // count
        wanted = low + k % (high - low)
        while wanted - position >= ranges[current][1] - ranges[current][0]:
            position += ranges[current][1] - ranges[current][0]
            current += 1
        indices.append(ranges[current][0] + wanted - position)
    return indices


def contact_sheet(
    images: np.ndarray, labels: np.ndarray | None, title: str, caption: str, columns: int | None = None
) -> bytes:
    """Images side by side under a title, as a PNG file.

    Args:
        images: (n, H, W, C) as the run has them, in the order of their sample indices. n may be 0.
        labels: integers (n,), written under the images; None for none.
        title: the first line, wrapped to the width of the sheet.
        caption: the second line, wrapped to the width of the sheet.
        columns: images in a row; as many as make the sheet about square, unless given.
    """
    images = as_pictures(images)
    n, height, width = images.shape[:3]
    columns = columns or max(math.ceil(math.sqrt(n)), 1)
    tile = _tile_size(width, height)
    grid_width, grid_height = _grid_size(n, columns, tile, labels is not None)
    sheet_width = max(2 * MARGIN + grid_width, SMALLEST_SHEET)
    title_font, caption_font = _font(22), _font(14)
    titles = _wrap(title, title_font, sheet_width - 2 * MARGIN)
    lines = _wrap(caption, caption_font, sheet_width - 2 * MARGIN)
    below = MARGIN + 8 + 28 * len(titles)
    top = below + 20 * len(lines) + 16
    sheet = Image.new("RGB", (sheet_width, top + grid_height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for line, text in enumerate(titles):
        draw.text((MARGIN, MARGIN + 28 * line), text, INK, title_font)
    for line, text in enumerate(lines):
        draw.text((MARGIN, below + 20 * line), text, FAINT, caption_font)
    _paste(sheet, images, labels, columns, tile, (MARGIN, top))
    return _png(sheet)


def class_strips(images: np.ndarray, labels: np.ndarray, count: int = 10) -> dict[int, bytes]:
    """The first images of each class side by side, as PNG files with nothing between the images.

    Args:
        images: (n, H, W, C) as the run has them, in the order of their sample indices.
        labels: integers (n,).
        count: images of a class, at most.

    Returns:
        A picture for each label that occurs, in ascending order, all of one width, so that a page scales them alike.
    """
    strips, images = {}, as_pictures(images)
    most = min(count, max(np.unique(labels, return_counts=True)[1], default=0))
    for label in np.unique(labels):
        chosen = images[labels == label][:count]
        tile = _tile_size(chosen.shape[2], chosen.shape[1])
        strip = Image.new("RGBA", _grid_size(most, most, tile, False))
        _paste(strip, chosen, None, len(chosen), tile, (0, 0))
        strips[int(label)] = _png(strip)
    return strips


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


def _grid_size(n: int, columns: int, tile: tuple[int, int], labelled: bool) -> tuple[int, int]:
    """Width and height in pixels of `n` tiles in rows of `columns`, with nothing around them."""
    rows = -(-n // columns)
    row_height = tile[1] + GAP + (LABEL_HEIGHT if labelled else 0)
    return columns * (tile[0] + GAP) - GAP, max(rows * row_height - GAP, 0)


def _paste(
    sheet: Image.Image,
    images: np.ndarray,
    labels: np.ndarray | None,
    columns: int,
    tile: tuple[int, int],
    corner: tuple[int, int],
) -> None:
    """Put `images`, and their labels under them, into rows that begin at `corner`."""
    draw, font = ImageDraw.Draw(sheet), _font(12)
    enlarged = tile[0] >= images.shape[2]
    filter_ = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    row_height = tile[1] + GAP + (LABEL_HEIGHT if labels is not None else 0)
    for i, image in enumerate(images):
        x = corner[0] + i % columns * (tile[0] + GAP)
        y = corner[1] + i // columns * row_height
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)).resize(tile, filter_), (x, y))
        if labels is not None:
            draw.text((x + tile[0] / 2, y + tile[1] + 3), str(int(labels[i])), FAINT, font, anchor="mt")


def _tile_size(width: int, height: int) -> tuple[int, int]:
    """Width and height of a tile: small images are enlarged by a whole factor, so that their pixels stay square."""
    side = max(width, height)
    if side > LARGEST_TILE:
        return max(round(width * LARGEST_TILE / side), 1), max(round(height * LARGEST_TILE / side), 1)
    factor = max(round(TILE / side), 1)
    return width * factor, height * factor


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels, broken between its parts where it has any, else between words.

    A part that is wider by itself, as a file's name may be, is shortened.
    """
    separator = " · " if " · " in text else " "
    lines: list[str] = []
    for part in text.split(separator):
        if lines and font.getlength(lines[-1] + separator + part) <= width:
            lines[-1] += separator + part
        elif part:
            lines.append(_shortened(part, font, width))
    return lines


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text`, without its middle where it is wider than `width` pixels."""
    shown, kept = text, len(text)
    while font.getlength(shown) > width and kept > 2:
        kept -= 1
        shown = f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"
    return shown
