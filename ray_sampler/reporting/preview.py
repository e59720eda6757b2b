"""The contact sheet: evenly spaced samples of a run as one picture."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence

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
LABEL_HEIGHT = 16

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


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
        images: uint8 (n, H, W, 3), in the order of their sample indices. n may be 0.
        labels: integers (n,), written under the images; None for none.
        title: the first line.
        caption: the second line, wrapped to the width of the sheet.
        columns: images in a row; as many as make the sheet about square, unless given.
    """
    n, height, width = images.shape[:3]
    columns = columns or max(math.ceil(math.sqrt(n)), 1)
    rows = -(-n // columns)
    tile_width, tile_height, filter_ = _tile_size(width, height)
    row_height = tile_height + (LABEL_HEIGHT if labels is not None else 0) + GAP
    sheet_width = max(2 * MARGIN + columns * (tile_width + GAP) - GAP, 480)
    left = (sheet_width - columns * (tile_width + GAP) + GAP) // 2
    title_font, caption_font, label_font = (_font(size) for size in (22, 14, 12))
    caption_lines = _wrap(caption, caption_font, sheet_width - 2 * left)
    top = MARGIN + 34 + 20 * len(caption_lines) + 14
    sheet = Image.new("RGB", (sheet_width, top + max(rows * row_height - GAP, 0) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((left, MARGIN), title, INK, title_font)
    for line, text in enumerate(caption_lines):
        draw.text((left, MARGIN + 34 + 20 * line), text, FAINT, caption_font)
    for i in range(n):
        x = left + i % columns * (tile_width + GAP)
        y = top + i // columns * row_height
        sheet.paste(Image.fromarray(images[i]).resize((tile_width, tile_height), filter_), (x, y))
        if labels is not None:
            draw.text((x + tile_width / 2, y + tile_height + 3), str(int(labels[i])), FAINT, label_font, anchor="mt")
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _tile_size(width: int, height: int) -> tuple[int, int, Image.Resampling]:
    """Width and height of a tile, and how to get there: pixels stay square and sharp when enlarged."""
    side = max(width, height)
    if side > LARGEST_TILE:
        scale = LARGEST_TILE / side
        return max(round(width * scale), 1), max(round(height * scale), 1), Image.Resampling.LANCZOS
    factor = max(round(TILE / side), 1)
    return width * factor, height * factor, Image.Resampling.NEAREST


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)


def _wrap(text: str, font: Font, width: int) -> Sequence[str]:
    """`text` in lines of at most `width` pixels, broken between words."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
