"""Labels that a user brings: a list on the command line or a file, read wherever only one reading is possible."""

from __future__ import annotations

import codecs
import io
import re
import zipfile
from typing import Any

import fsspec
import numpy as np

from ray_sampler.errors import RequestError, printable, redact

EXACT = 2**53
"""Whole numbers below it are exact as float64."""


def read_labels(text: str) -> np.ndarray:
    """Labels as --labels names them: (n,) int64.

    Args:
        text: "0,3,999", or the path or URL of an .npz with arr_1 or with one list of integers, of an .npy, or of a text
            file with integers between white space or commas; a header line and what follows a # are passed over.

    Raises:
        RequestError: there is no such file, or it holds no labels.
    """
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if all(part.removeprefix("-").isdigit() for part in parts):
        return whole_numbers(np.array(parts), text)
    try:
        with fsspec.open(text, "rb") as file:
            data = file.read()
    except Exception as error:  # each filesystem has exceptions of its own
        raise RequestError(
            f"--labels is {redact(text)!r}; it must be random, balanced, a list as 0,3,999, or a readable file "
            f"({type(error).__name__})"
        ) from error
    return whole_numbers(parse(data, text), text)


def refused(source: str, found: str, expected: str = "it must hold one label for each sample") -> RequestError:
    return RequestError(f"--labels {redact(source)} {found}; {expected}")


def parse(data: bytes, source: str) -> np.ndarray:
    """The values in a file, of whatever kind and shape."""
    try:
        if source.endswith(".npz"):
            return labels_of_npz(data, source)
        if source.endswith(".npy"):
            return np.load(io.BytesIO(data), allow_pickle=False)
        wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return parse_text(data.decode("utf-16" if wide else "utf-8-sig"), source)
    except RequestError:
        raise
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise RequestError(f"--labels {redact(source)} cannot be read as labels: {printable(error)}") from error


def labels_of_npz(data: bytes, source: str) -> np.ndarray:
    """arr_1, or else the only array that can be a list of labels. Others, as images, are not read."""
    shapes = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.namelist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
            shapes[member.removesuffix(".npy")] = (shape, dtype)
    fitting = [name for name, (shape, dtype) in shapes.items() if dtype.kind in "iu" and is_list(shape)]
    if "arr_1" in shapes or len(fitting) == 1:
        return np.load(io.BytesIO(data), allow_pickle=False)["arr_1" if "arr_1" in shapes else fitting[0]]
    found = ", ".join(f"{name} {dtype} {shape}" for name, (shape, dtype) in shapes.items())
    raise refused(source, f"holds {printable(found) or 'nothing'}", "it must hold arr_1, or one list of integers")


def is_list(shape: tuple[int, ...]) -> bool:
    """Whether an array is a list, or a list as one column or row."""
    return len(shape) == 1 or (len(shape) == 2 and 1 in shape)


def parse_text(text: str, source: str) -> np.ndarray:
    """The numbers of a text, as they are written there."""
    lines = (line.partition("#")[0].strip(" \t,;") for line in text.splitlines())
    rows = [[word.strip("\"'") for word in re.split(r"[\s,;]+", line)] for line in lines if line]
    header = rows[0] if len(rows) > 1 and not any(map(number, rows[0])) else []
    rows = rows[1:] if header else rows
    pairs = len(rows) > 1 and all(len(row) == 2 for row in rows)
    counts = pairs and all(number(row[0]) and float(row[0]) == float(rows[0][0]) + i for i, row in enumerate(rows))
    if counts or (len(header) > 1 and any(len(row) > 1 for row in rows)):
        shown = ",".join(header or rows[0])
        raise refused(source, f"holds lines of several columns, the first of them {printable(shown, 60)!r}")
    return np.array([word for row in rows for word in row])


def number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def whole_numbers(values: np.ndarray, source: str) -> np.ndarray:
    """`values` as (n,) int64.

    Raises:
        RequestError: they are no list, or one of them is no whole number.
    """
    if not is_list(values.shape) or values.size == 0:
        shape = f"an array of shape {values.shape}" if values.ndim != 1 else "no numbers"
        raise refused(source, f"holds {shape}", "it must hold a list of integers, one label for each sample")
    values = values.reshape(-1)
    if values.dtype.kind in "US":
        exact = [as_whole(word) for word in values.tolist()]
    elif values.dtype.kind in "iuf":
        exact = [as_whole(value) for value in values.tolist()]
    else:
        raise refused(source, f"holds values of type {values.dtype}", "labels must be integers")
    wrong = next((i for i, value in enumerate(exact) if value is None), None)
    if wrong is not None:
        raise refused(
            source, f"has {printable(values[wrong], 40)} at position {wrong}", "labels must be whole numbers, one each"
        )
    return np.array(exact, np.int64)


def as_whole(value: Any) -> int | None:
    """A number, or a word that spells one, as an int that fits 64 bits; None where it is none."""
    try:
        whole = int(value) if not isinstance(value, float) else None
    except ValueError:
        whole = None
    if whole is None:
        try:
            rounded = float(value)
        except ValueError:
            return None
        if not rounded.is_integer() or abs(rounded) >= EXACT:
            return None
        whole = int(rounded)
    return whole if -(2**63) <= whole < 2**63 else None
