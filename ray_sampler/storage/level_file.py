"""Noise levels that a user brings: a list on the command line or a file."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

from ray_sampler.errors import RequestError, printable, require, shortened
from ray_sampler.storage.number_file import NPY, NPZ, is_list, read_given, table_of


def read_levels(text: str | Sequence[float]) -> tuple[float, ...]:
    """Levels as --sigmas names them: they fall, and the last is 0, which is appended where it is absent.

    Args:
        text: "80,10,1", or the path or URL of an .npz with arr_0, of an .npy, or of a text file with numbers between
            white space or commas, a header line and comments after a # passed over. From Python also
            the levels themselves.

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
    data = read_given(text, "--sigmas", "a list of falling noise levels as 80,10,1")
    return falling(parse(data, text), text)


def parse(data: bytes, source: str) -> list[float]:
    """The numbers in a file's content. Raises RequestError: there are none."""
    try:
        if not data.startswith((NPZ, NPY)):
            return [float(word) for row in table_of(data)[1] for word in row]
        array = np.load(io.BytesIO(data), allow_pickle=False)
        values = array["arr_0"] if data.startswith(NPZ) else array
    except KeyError:
        raise RequestError(
            f"--sigmas {shortened(source)} has no arr_0; an .npz of levels must hold them there"
        ) from None
    except Exception as error:  # what is damaged fails in zipfile, its decompressors or numpy, each in its own way
        said = printable(error)
        raise RequestError(f"--sigmas {shortened(source)} cannot be read as noise levels: {said}") from error
    require(
        isinstance(values, np.ndarray) and is_list(values.shape) and values.dtype.kind in "iuf",
        f"--sigmas {shortened(source)} holds no list of numbers; it must hold the noise levels, one after another",
    )
    return [float(value) for value in values.reshape(-1)]


def falling(values: list[float], source: str) -> tuple[float, ...]:
    """The levels, with 0 at the end. Raises RequestError: they do not fall, or one is no level."""
    shown = f"--sigmas is {shortened(source)!r}"
    require(bool(values) and values[0] > 0, f"{shown}; it must begin with a noise level above 0, as in 80,10,1")
    for level, lower in zip(values, [*values[1:], 0.0][: len(values) - (values[-1] == 0)], strict=False):
        require(
            0 <= lower < level < math.inf,
            f"{shown}, where {lower:g} follows {level:g}; levels must be finite and fall, as in 80,10,1",
        )
    return tuple(values) if values[-1] == 0 else (*values, 0.0)
