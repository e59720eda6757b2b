"""Reading an archive range by range: an evaluator need not hold all of it in memory."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, NamedTuple

import fsspec
import numpy as np
from isal import isal_zlib

from ray_sampler.errors import RequestError, RunError, redact, require
from ray_sampler.storage.connect import path_text
from ray_sampler.storage.failures import failure, families, status
from ray_sampler.storage.fragment import READER_ERRORS, npy_header

RANGE_BYTES = 64 * 2**20
"""Of the images that are read at once, unless a number is asked for."""

NPY_HEADER_BYTES = 4096
"""In which the header of an array must end."""


class ArchiveRange(NamedTuple):
    """Consecutive samples of an archive."""

    start: int
    """Index of the first."""
    images: np.ndarray
    """(n, H, W, C) uint8, or float32 where the archive holds a solver's own results."""
    labels: np.ndarray | None
    """(n,) int64; None where the archive has none."""


@dataclass(frozen=True)
class Values:
    """Where the values of one array lie."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = field(repr=False)
    """Of the first value in the file."""
    header: bytes = field(repr=False)
    """What precedes the values in the zip's member."""
    crc32: int = field(repr=False)
    """Of header and values."""

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Archive:
    """An archive to be read range by range: `for start, images, labels in archive`, or `archive.read(start, stop)`."""

    url: str
    size: int
    """Samples of a range."""
    images: Values
    labels: Values | None

    @property
    def num_samples(self) -> int:
        """N."""
        return self.images.shape[0]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return self.images.shape[1:]

    def __iter__(self) -> Iterator[ArchiveRange]:
        """All ranges in order.

        Raises:
            RunError: the file is shorter than it says or, after the last range, a CRC-32 does not match.
        """
        arrays = [self.images, *([self.labels] if self.labels else [])]
        crcs = [isal_zlib.crc32(array.header) for array in arrays]
        with open_file(self.url) as file:
            for start in range(0, self.num_samples, self.size):
                stop = min(start + self.size, self.num_samples)
                read = [values(self.url, file, array, start, stop) for array in arrays]
                crcs = [isal_zlib.crc32(rows, crc) for rows, crc in zip(read, crcs, strict=True)]
                yield of_rows(start, read)
        wrong = [f"arr_{i}" for i, array in enumerate(arrays) if array.crc32 != crcs[i]]
        if wrong:
            raise RunError(f"{redact(self.url)} is damaged: the CRC-32 of {' and '.join(wrong)} does not match")

    def read(self, start: int, stop: int) -> ArchiveRange:
        """The samples [start, stop), as far as there are; what they hold is not checked.

        Raises:
            RunError: the file is shorter than it says.
        """
        start, stop = max(0, min(start, self.num_samples)), max(0, min(stop, self.num_samples))
        arrays = [self.images, *([self.labels] if self.labels else [])]
        with open_file(self.url) as file:
            return of_rows(start, [values(self.url, file, array, start, max(start, stop)) for array in arrays])


def read_archive(url: str | os.PathLike[str], size: int | None = None) -> Archive:
    """An archive of samples, to be read range by range, in memory that does not grow with it.

    `for start, images, labels in read_archive(path)` gives all samples in order: the index of a range's first sample,
    its images as (n, H, W, C) uint8 (float32 with `--decoder none`), and its labels as (n,) int64 or None. After the
    last range the CRC-32s of the file have been checked. `read_archive(path).read(start, stop)` gives one range.

    Args:
        url: a local path or any fsspec URL.
        size: samples of a range; as many as make about 64 MiB unless given.

    Raises:
        RequestError: the file does not exist, or is not an archive of images as `numpy.savez` stores them; nothing in
            it is unpickled.
    """
    text = path_text(url, "an archive")
    require(
        size is None or (isinstance(size, int) and size >= 1), f"size is {size!r}; it must be a whole number from 1 on"
    )
    with open_file(text) as file:
        try:
            images, labels = members(file)
        except READER_ERRORS as error:
            for cause in (error, error.__context__):  # zipfile calls whatever it cannot read no zip file
                if cause is not None and status(cause):
                    raise cause from cause.__cause__
            reason = str(error) if isinstance(error, RequestError) else "it is cut short, or no npz file"
            raise RequestError(f"{redact(text)} is not an archive of samples: {reason}") from error
    return Archive(text, size or max(1, RANGE_BYTES // max(1, images.row_bytes)), images, labels)


@contextlib.contextmanager
def open_file(url: str) -> Iterator[IO[bytes]]:
    """The file at a path or URL.

    Raises:
        RequestError: it cannot be opened.
        RequestError, RunError: the store refused to give it, now or while it was read.
    """
    with refusals_told(url), contextlib.ExitStack() as stack:
        try:
            filesystem, path = fsspec.core.url_to_fs(os.path.expanduser(url))
            file = stack.enter_context(filesystem.open(path, "rb"))
        except FileNotFoundError:
            raise RequestError(f"there is no {redact(url)}") from None
        except (OSError, ValueError, ImportError) as error:
            if status(error):
                raise
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise RequestError(
                f"{redact(url)} cannot be read ({reason}); give the path or URL of an archive"
            ) from error
        yield file


@contextlib.contextmanager
def refusals_told(url: str) -> Iterator[None]:
    """Tell in one sentence what a store refuses."""
    try:
        yield
    except families() as error:
        if isinstance(error, OSError | ValueError) and not status(error):
            raise
        raise failure(error, "read", str(redact(url))) from None


def members(file: IO[bytes]) -> tuple[Values, Values | None]:
    """The images and labels of an archive.

    Raises:
        RequestError: they are not as archives hold them; the sentence says how.
    """
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        found = {info.filename: info for info in infos}
        require("arr_0.npy" in found, "it holds no arr_0")
        require(len(found) == len(infos), "it holds an array twice")
        images = member(file, archive, found["arr_0.npy"], ("|u1", "<f4"))
        require(len(images.shape) == 4, f"its arr_0 is of shape {images.shape}, not (N, H, W, C)")
        if "arr_1.npy" not in found:
            return images, None
        labels = member(file, archive, found["arr_1.npy"], ("<i8", "<i4"))
    require(labels.shape == images.shape[:1], f"its arr_1 is of shape {labels.shape}, not {images.shape[:1]}")
    return images, labels


def member(file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo, dtypes: tuple[str, ...]) -> Values:
    """Where the values of an array of `archive` lie in `file`. Raises RequestError: it is not stored plainly."""
    name = info.filename.removesuffix(".npy")
    require(
        info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1,
        f"its {name} is compressed or encrypted; write it by numpy.savez",
    )
    archive.open(info).close()  # which reads what precedes the member
    begin = file.tell()
    head = file.read(min(NPY_HEADER_BYTES, info.file_size))
    header = npy_header(head)
    require(header is not None, f"its {name} is not a plain array of numbers")
    assert header is not None
    dtype, shape, length = header
    require(dtype.str in dtypes, f"its {name} is of type {dtype.str}, not {' or '.join(dtypes)}")
    require(
        info.file_size == info.compress_size == length + math.prod(shape) * dtype.itemsize,
        f"its {name} does not have the size that its shape {shape} needs",
    )
    return Values(dtype, shape, begin + length, head[:length], info.CRC)


def values(url: str, file: IO[bytes], array: Values, start: int, stop: int) -> np.ndarray:
    """The rows [start, stop) of an array."""
    rows = np.empty((stop - start, *array.shape[1:]), array.dtype)
    target = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # an array is a buffer
    file.seek(array.offset + start * array.row_bytes)
    done = 0
    while done < len(target):
        part = file.read(len(target) - done)
        if not part:
            raise RunError(f"{redact(url)} ends early: it was changed or cut short while it was read")
        target[done : done + len(part)] = part
        done += len(part)
    return rows


def of_rows(start: int, read: list[np.ndarray]) -> ArchiveRange:
    return ArchiveRange(start, read[0], read[1].astype(np.int64) if len(read) > 1 else None)
