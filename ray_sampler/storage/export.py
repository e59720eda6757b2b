"""Pictures as PNG files, one a sample, for evaluators that read folders."""

from __future__ import annotations

import io
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from ray_sampler.errors import require
from ray_sampler.storage.connect import open_store
from ray_sampler.storage.output import check_output
from ray_sampler.storage.pictures import check_channels, open_pictures
from ray_sampler.storage.store import Store

DIGITS = 6
"""Of an index in a name, at least."""
PER_FOLDER = 1000
LABELS = "labels.csv"
PNG_END = b"IEND\xaeB`\x82"
WRITES_AT_ONCE = max(8, min(32, os.cpu_count() or 1))
"""Each waits for its disk or bucket most of the time."""


def export(source: str, output: str, subdirs: bool = False) -> tuple[int, int]:
    """Write the pictures of a run or an archive as <output>/000000.png and so on, and labels as labels.csv.

    An existing PNG with the same pixels is kept, and any other file of that name is replaced, so an interrupted
    export continues.

    Args:
        subdirs: a folder for each thousand, as 001000/001234.png.

    Returns:
        How many PNGs were written, and how many were kept.

    Raises:
        RequestError: `source` holds no pictures, but a solver's results; the output holds other PNGs.
        RunError: a fragment or the archive is damaged.
    """
    check_output(output)
    pictures = open_pictures(source)
    require(
        pictures.dtype == "uint8",
        f"{pictures.url} holds {pictures.dtype} results of a solver, of which no PNG can be made; "
        "sample with a --decoder that gives pictures",
    )
    check_channels(pictures, f"what is exported is {pictures.url}")
    require(
        not pictures.lacking, f"{pictures.url} lacks {pictures.lacking} of its samples; run its command again first"
    )
    store = open_store(output)
    digits = max(DIGITS, len(str(pictures.num_samples - 1)))
    name = partial(_name, digits=digits, subdirs=subdirs)
    there = _pngs(store)
    foreign = min(there - {name(i) for i in range(pictures.num_samples)}, default=None)
    require(
        foreign is None,
        f"--output is {store.url}, which holds {foreign}, none of these {pictures.num_samples} pictures, and an "
        "evaluator would read it too; give an empty folder",
    )
    rows, kept = ["file,label"], 0
    with ThreadPoolExecutor(WRITES_AT_ONCE, "export") as pool:
        for start, images, labels in pictures.walk():
            names = [name(index) for index in range(start, start + len(images))]
            kept += sum(pool.map(partial(_write, store, there), names, images))
            rows += [] if labels is None else [f"{n},{label}" for n, label in zip(names, labels, strict=True)]
    if len(rows) > 1:
        store.put(LABELS, "\n".join([*rows, ""]).encode())
    return pictures.num_samples - kept, kept


def _name(index: int, digits: int, subdirs: bool) -> str:
    folder = f"{index - index % PER_FOLDER:0{digits}d}/" if subdirs else ""
    return f"{folder}{index:0{digits}d}.png"


def _pngs(store: Store) -> set[str]:
    """The PNGs in a folder, and in its folders that have numbers for names."""
    entries = store.list("")
    folders = [entry.name for entry in entries if not entry.is_file and re.fullmatch(r"\d+", entry.name)]
    inside = {f"{folder}/{entry.name}" for folder in folders for entry in store.list(folder)}
    return {name for name in inside | {entry.name for entry in entries} if name.lower().endswith(".png")}


def _write(store: Store, there: set[str], name: str, image: np.ndarray) -> bool:
    """Write a picture (H, W, C) unless there is a PNG with its pixels; whether there was."""
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    if name in there and _holds(store.read(name), pixels):
        return True
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    store.put(name, data.getvalue())
    return False


def _holds(data: bytes | None, pixels: np.ndarray) -> bool:
    """Whether a PNG file is complete and has these pixels."""
    try:
        whole = data is not None and data.endswith(PNG_END)
        return whole and np.array_equal(np.asarray(Image.open(io.BytesIO(data or b""))), pixels)
    except (OSError, SyntaxError, ValueError):
        return False
