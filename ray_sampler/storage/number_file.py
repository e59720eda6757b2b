"""Lists of numbers that a flag gives, of labels or noise levels: on the command line, or in a file of any kind."""

from __future__ import annotations

import codecs
import io
import math
import re
from collections.abc import Sequence

import fsspec
import numpy as np

from ray_sampler.errors import RequestError, printable, require, shortened

NPZ, NPY = b"PK", b"\x93NUMPY"
"""How the content of an .npz and of an .npy begins, whatever the file is called."""

EXACT = 2**53
"""Whole numbers below it are exact as float64."""


def read_labels(text: str) -> np.ndarray:
    """Labels as --labels names them: (n,) int64.

    Args:
        text: as of `read_numbers`; an .npz has them in arr_1.

    Raises:
        RequestError: as of `read_numbers`, or one is not a whole number.
    """
    values = read_numbers(text, "--labels", "arr_1", "random, balanced, a list as 0,3,999")
    wrong = ~((np.floor(values) == values) & (np.abs(values) < EXACT))
    require(
        not wrong.any(),
        f"--labels {shortened(text)} has {values[wrong.argmax()]:.17g} at position {wrong.argmax()}; "
        "labels must be whole numbers, one each",
    )
    return values.astype(np.int64)


def read_levels(text: str | Sequence[float]) -> tuple[float, ...]:
    """Levels as --sigmas names them: they fall, and the last is 0, which is appended where it is absent.

    Args:
        text: as of `read_numbers`; an .npz has them in arr_0. From Python also the levels themselves.

    Raises:
        RequestError: as of `read_numbers`, or they do not fall.
    """
    if not isinstance(text, str):
        text = ",".join(repr(float(level)) for level in text)
    values = read_numbers(text, "--sigmas", "arr_0", "a list of falling noise levels as 80,10,1").tolist()
    shown = f"--sigmas is {shortened(text)!r}"
    require(values[0] > 0, f"{shown}; it must begin with a noise level above 0, for example 80,10,1")
    for level, lower in zip(values, [*values[1:], 0.0][: len(values) - (values[-1] == 0)], strict=False):
        require(
            0 <= lower < level < math.inf,
            f"{shown}, where {lower:g} follows {level:g}; levels must be finite and fall, for example 80,10,1",
        )
    return tuple(values) if values[-1] == 0 else (*values, 0.0)


def read_numbers(text: str, flag: str, member: str, expected: str) -> np.ndarray:
    """The numbers that a flag gives: (n,) float64, n at least 1.

    Args:
        text: "80,10,1", or the path or URL of an .npz, of an .npy, or of a text file with numbers between white space
            or commas, where a header line and what follows a # are passed over.
        member: the array of an .npz that holds them.
        expected: what the flag may be besides a file.

    Raises:
        RequestError: the file does not exist, or does not hold a list of numbers.
    """
    if (listed := listed_numbers(text)) is not None:
        return np.array(listed)
    data = read_given(text, flag, expected)
    try:
        values = numbers_in(data, member)
    except Exception as error:  # what is damaged fails in zipfile, its decompressors or numpy, each in its own way
        raise RequestError(f"{flag} {shortened(text)} cannot be read as numbers: {printable(error)}") from error
    require(
        values.size in values.shape and values.size > 0 and values.dtype.kind in "iuf",
        f"{flag} {shortened(text)} holds an array of shape {values.shape} and type {values.dtype}; "
        "it must hold a list of numbers, one after another",
    )
    return values.reshape(-1).astype(np.float64)


def listed_numbers(text: str) -> list[float] | None:
    """The numbers of a list such as 80,10,1; None for what names a file."""
    try:
        return [float(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        return None


def read_given(url: str, flag: str, expected: str) -> bytes:
    """The content of a file that a flag names by its path or URL. Raises RequestError: it cannot be read."""
    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
            return content
    except Exception as error:  # filesystems raise different exceptions, which may contain the URL's credentials
        reason = "there is none of that name" if isinstance(error, FileNotFoundError) else type(error).__name__
        raise RequestError(
            f"{flag} is {shortened(url)!r}; it must be {expected}, or a readable file ({reason})"
        ) from None


def numbers_in(data: bytes, member: str) -> np.ndarray:
    """The array in a file's content, of whatever shape and type."""
    if data.startswith((NPZ, NPY)):
        found = np.load(io.BytesIO(data), allow_pickle=False)
        return np.asarray(found[member] if data.startswith(NPZ) else found)
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = re.sub("#.*", "", data.decode("utf-16" if wide else "utf-8-sig"))
    rows = [row for line in text.splitlines() if (row := re.split(r"[\s,;\"']+", line.strip(" \t,;\"'")))[0]]
    header = rows.pop(0) if len(rows) > 1 and not any(word[0] in "+-.0123456789" for word in rows[0]) else []
    table = np.array([list(map(float, row)) for row in rows]) if len({len(row) for row in rows}) == 1 else None
    if table is not None and table.shape[1] > 1 and len(table) > 1:
        counts = table.shape[1] == 2 and (np.diff(table[:, 0]) == 1).all()
        require(
            not counts and len(header) < 2,
            f"it has lines of several columns, for example {','.join(header or rows[0])}",
        )
    return np.array([float(word) for row in rows for word in row])
