"""Pictures of whatever holds them: an archive, a run, or a folder of picture files; and as PNGs for evaluators."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import fsspec
import numpy as np
from PIL import Image

from ray_sampler.errors import RequestError, RunError, redact, require
from ray_sampler.storage.connect import Store, absolute, check_output, open_store, path_text
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.read_archive import RANGE_BYTES, Archive, ArchiveRange, read_archive, refusals_told
from ray_sampler.storage.record import DamagedFragment
from ray_sampler.storage.run_dir import RUN, RunDir

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
"""Of the files of a folder that are pictures."""

READS_AT_ONCE = 16

DIGITS = 6
"""Of an index in a name, at least."""
PER_FOLDER = 1000
LABELS = "labels.csv"
PNG_END = b"IEND\xaeB`\x82"
WRITES_AT_ONCE = max(8, min(32, os.cpu_count() or 1))
"""Each waits for its disk or bucket most of the time."""


@dataclass(frozen=True)
class Pictures:
    """Pictures in the order of their indices; those of a folder in the natural order of their names."""

    url: str
    num_samples: int
    """How many there are."""
    shape: tuple[int, ...]
    """(H, W, C) of each."""
    dtype: str
    """uint8, or float32 where an archive or run holds a solver's own results."""
    ranges: list[tuple[int, int]]
    """All that are there, in order, so divided that nothing is read twice."""
    read: Callable[[int, int], ArchiveRange]
    """Those within one of `ranges`. Raises RunError: they are damaged, or not there any more."""
    walk: Callable[[], Iterator[ArchiveRange]]
    """All in order. An archive's CRC-32s are compared after the last one, a fragment's before its first."""
    fingerprint: Callable[[], str]
    """64 hexadecimal digits that change with the content: a run's own, or a SHA-256 over checksums or files."""
    lacking: int = 0
    """Samples of an unfinished run that are not there."""
    is_run: bool = False


def open_pictures(url: str | os.PathLike[str]) -> Pictures:
    """The pictures at a path or any fsspec URL.

    Raises:
        RequestError: there are none, or a run has none yet; those of a folder may be refused later, where they
            differ in size.
    """
    text = absolute(path_text(url, "pictures"))
    with refusals_told(text):
        try:
            files, path = fsspec.core.url_to_fs(text)
            is_folder = files.isdir(path)
        except (ValueError, ImportError) as error:
            raise RequestError(f"{redact(text)} cannot be read ({type(error).__name__}); check its URL") from error
        if not is_folder:
            return _of_archive(read_archive(text))
        if not files.exists(f"{path.rstrip('/')}/{RUN}"):
            return _of_folder(text, files, path)
    return _of_run(RunDir(text))


def check_channels(pictures: Pictures, shown: str) -> None:
    """Raises RequestError: they are neither grey nor in colour, as where the channels are not the last dimension."""
    require(
        pictures.shape[-1] in (1, 3),
        f"{shown}, whose pictures are of shape {list(pictures.shape)}; they must be (H, W, C) with C 1 or 3",
    )


def _of_archive(archive: Archive) -> Pictures:
    ranges = list(pairwise([*range(0, archive.num_samples, archive.size), archive.num_samples]))
    held = archive.images
    said = f"{held.dtype} {list(held.shape)} {held.crc32}".encode()
    return Pictures(
        *(archive.url, archive.num_samples, archive.image_shape, str(held.dtype), ranges, archive.read),
        *(archive.__iter__, lambda: hashlib.sha256(said).hexdigest()),
    )


def _of_run(run_dir: RunDir) -> Pictures:
    run = run_dir.read_run() or {}
    require("fingerprint" in run, f"{run_dir.url}/{RUN} is not one of ray-sampler's; give the --output of a run")
    fragments, total, fingerprint = run_dir.ranges(), run["num_samples"], run["fingerprint"]
    pieces = cover(fragments.list().fragments, total)
    require(bool(pieces), f"{run_dir.url} has no samples yet; run its command first")

    def read(start: int, stop: int) -> ArchiveRange:
        name = next(piece.fragment for piece in pieces if piece.start <= start < piece.stop)
        try:
            samples = fragments.read(name, fingerprint).samples.part(start, stop)
        except DamagedFragment as error:
            raise RunError(
                f"{run_dir.url}/{fragments.folder}/{name.filename} is damaged: {error}; run the run's command again"
            ) from error
        return ArchiveRange(start, samples.images, None if samples.labels is None else samples.labels.astype(np.int64))

    ranges = [(piece.start, piece.stop) for piece in pieces]
    dtype = str(read(ranges[0][0], ranges[0][0] + 1).images.dtype)
    there = sum(stop - start for start, stop in ranges)
    return Pictures(
        *(run_dir.url, there, tuple(run["image_shape"]), dtype, ranges, read),
        *(lambda: (read(*bounds) for bounds in ranges), lambda: fingerprint, total - there, True),
    )


def _of_folder(url: str, files: Any, path: str) -> Pictures:
    names = sorted((name for name in files.find(path) if name.lower().endswith(SUFFIXES)), key=_natural)
    shown = str(redact(url))
    require(bool(names), f"{shown} holds no pictures ({', '.join(SUFFIXES)}), and no run either")

    def load(name: str) -> bytes:
        with refusals_told(url):
            return bytes(files.cat_file(name))

    def picture(name: str) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(load(name)))
            pixels = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RequestError(f"{shown} holds {name}, which cannot be read as a picture") from error
        deep = image.mode.startswith(("I", "F"))  # of which PIL would cut off all above 255
        require(not deep, f"{shown} holds {name}, which has more than 8 bits a channel; convert it first")
        return pixels

    def each(function: Callable[[str], Any], names: list[str]) -> list[Any]:
        with ThreadPoolExecutor(READS_AT_ONCE) as pool:
            return list(pool.map(function, names))

    def read(start: int, stop: int) -> ArchiveRange:
        images = each(picture, names[start:stop])
        odd = next((name for name, image in zip(names[start:stop], images, strict=True) if image.shape != shape), None)
        require(odd is None, f"{shown} holds pictures of several sizes ({odd} is another); make them equal first")
        return ArchiveRange(start, np.stack(images), None)

    def fingerprint() -> str:
        digests = each(lambda name: hashlib.sha256(load(name)).digest(), names)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    shape = picture(names[0]).shape
    size = max(1, RANGE_BYTES // (shape[0] * shape[1] * 3))
    ranges = list(pairwise([*range(0, len(names), size), len(names)]))
    return Pictures(
        *(url, len(names), shape, "uint8", ranges, read, lambda: (read(*bounds) for bounds in ranges), fingerprint)
    )


def _natural(name: str) -> list[str | int]:
    """A key that sorts 10.png after 9.png."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


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
