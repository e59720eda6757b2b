"""Draw the first samples of several archives side by side, as docs/guidance.png shows three weights of guidance."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluate import load_archive
from ray_sampler.reporting.preview import BACKGROUND, INK, MARGIN

SCALE, HEADING = 2, 40
"""Pixels in a row for each of a digit, and of the line above each archive."""


def panel(images: np.ndarray, columns: int) -> Image.Image:
    """Digits (n, 3, 32, 32) float32 in [-1, 1] in rows of `columns`, with nothing between them."""
    grey = np.rint((images[:, 0] + 1) * 127.5).astype(np.uint8)
    rows = np.concatenate([np.concatenate(list(row), axis=1) for row in grey.reshape(-1, columns, 32, 32)])
    return Image.fromarray(rows.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


def side_by_side(panels: list[Image.Image], headings: list[str]) -> Image.Image:
    width, height = panels[0].size
    sheet = Image.new("RGB", (len(panels) * (width + MARGIN) + MARGIN, height + HEADING + 2 * MARGIN), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=24)
    for i, (each, heading) in enumerate(zip(panels, headings, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        draw.text((left, MARGIN), heading, INK, font)
        sheet.paste(each, (left, MARGIN + HEADING))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archives", type=Path, nargs="+", help="of one seed and balanced labels, so that they compare")
    parser.add_argument("--headings", nargs="+", required=True, help="one for each archive")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("docs/guidance.png"))
    request = parser.parse_args()
    drawn = [panel(load_archive(path).images[: 10 * request.rows], 10) for path in request.archives]
    side_by_side(drawn, request.headings).save(request.out, optimize=True)
