"""Small files of numbers that a flag names, of labels or levels: what is in one is told from its content."""

from __future__ import annotations

import codecs
import os
import re
import stat

import fsspec

from ray_sampler.errors import RequestError, shortened

NPZ, NPY = b"PK", b"\x93NUMPY"
"""How the content of an .npz and of an .npy begins, whatever the file is called."""


def read_given(url: str, flag: str, expected: str) -> bytes:
    """The content of a file that a flag names by its path or URL.

    Args:
        expected: what the flag may be besides.

    Raises:
        RequestError: it cannot be read.
    """
    try:
        if is_device(url):
            raise OSError("a device, which has no end")
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
            return content
    except Exception as error:  # each filesystem has exceptions of its own, which may tell the URL's credentials
        raise RequestError(
            f"{flag} is {shortened(url)!r}; it must be {expected}, or a readable file ({type(error).__name__})"
        ) from None


def is_device(path: str) -> bool:
    """Whether a path is a device or a socket: /dev/zero, for one, has no end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # it is no path, or whoever opens it says what is wrong
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISFIFO(mode))


def is_list(shape: tuple[int, ...]) -> bool:
    """Whether an array is a list, or a list as one column or row."""
    return len(shape) == 1 or (len(shape) == 2 and 1 in shape)


def table_of(data: bytes) -> tuple[list[str], list[list[str]]]:
    """The words of a header line, and those of each other line of a text, without comments and empty lines.

    Raises:
        ValueError: it is no text.
    """
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig")
    lines = (line.partition("#")[0].strip(" \t,;") for line in text.splitlines())
    rows = [[word.strip("\"'") for word in re.split(r"[\s,;]+", line)] for line in lines if line]
    if len(rows) > 1 and not any(number(word) or word[:1].isdigit() for word in rows[0]):
        return rows[0], rows[1:]
    return [], rows


def number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
