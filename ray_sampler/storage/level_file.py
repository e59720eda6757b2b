"""Noise levels that a user brings: a list on the command line or a file."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence

import fsspec
import numpy as np

from ray_sampler.errors import RequestError, redact, require


def read_levels(text: str | Sequence[float]) -> tuple[float, ...]:
    """Levels as --sigmas names them: they fall, and the last is 0, which is appended where it is absent.

    Args:
        text: "80,10,1", or the path or URL of an .npz with arr_0, of an .npy, or of a text file with numbers between
            white space or commas. From Python also the levels themselves.

    Raises:
        RequestError: there is no such file, or it holds no falling levels.
    """
    if not isinstance(text, str):
        text = ",".join(repr(float(level)) for level in text)
    try:
        return falling([float(part) for part in text.split(",")], text)
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
    try:
        with fsspec.open(text, "rb") as file:
            data = file.read()
    except Exception as error:  # each filesystem has exceptions of its own
        raise RequestError(
            f"--sigmas is {redact(text)!r}; it must be a list of falling noise levels as 80,10,1, or a readable file "
            f"({type(error).__name__})"
        ) from error
    return falling(parse(data, text), text)


def parse(data: bytes, source: str) -> list[float]:
    """The numbers in a file's content. Raises RequestError: there are none."""
    try:
        if source.endswith((".npz", ".npy")):
            array = np.load(io.BytesIO(data), allow_pickle=False)
            values = array["arr_0"] if source.endswith(".npz") else array
            require(
                isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf",
                f"--sigmas {redact(source)} holds no list of numbers; it must hold the noise levels, one after another",
            )
            return [float(value) for value in values]
        return [float(part) for part in data.decode().replace(",", " ").split()]
    except KeyError:
        raise RequestError(f"--sigmas {redact(source)} has no arr_0; an .npz of levels must hold them there") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"--sigmas {redact(source)} cannot be read as noise levels: {error}") from error


def falling(values: list[float], source: str) -> tuple[float, ...]:
    """The levels, with 0 at the end. Raises RequestError: they do not fall, or one is no level."""
    shown = f"--sigmas is {redact(source)!r}"
    require(bool(values) and values[0] > 0, f"{shown}; it must begin with a noise level above 0, as in 80,10,1")
    for level, lower in zip(values, [*values[1:], 0.0][: len(values) - (values[-1] == 0)], strict=False):
        require(
            0 <= lower < level < math.inf,
            f"{shown}, where {lower:g} follows {level:g}; levels must be finite and fall, as in 80,10,1",
        )
    return tuple(values) if values[-1] == 0 else (*values, 0.0)
