"""Labels that a user brings: a list on the command line or a file."""

from __future__ import annotations

import io
import zipfile

import fsspec
import numpy as np

from ray_sampler.errors import RequestError, redact


def read_labels(text: str) -> np.ndarray:
    """Labels as --labels names them: (n,) int64.

    Args:
        text: "0,3,999", or the path or URL of an .npz with arr_1, of an .npy, or of a text file with
            integers between white space or commas.

    Raises:
        RequestError: there is no such file, or it holds no labels.
    """
    if all(part.strip().lstrip("-").isdigit() for part in text.split(",")):
        return integers(np.array(text.split(",")), text)
    try:
        with fsspec.open(text, "rb") as file:
            data = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise RequestError(
            f"--labels is {redact(text)!r}; it must be random, balanced, a list as 0,3,999, or a readable file "
            f"({type(error).__name__})"
        ) from error
    return integers(parse(data, text), text)


def parse(data: bytes, source: str) -> np.ndarray:
    try:
        if source.endswith(".npz"):
            return np.load(io.BytesIO(data), allow_pickle=False)["arr_1"]
        if source.endswith(".npy"):
            return np.load(io.BytesIO(data), allow_pickle=False)
        return np.array(data.decode().replace(",", " ").split())
    except KeyError:
        raise RequestError(f"--labels {redact(source)} has no arr_1; an .npz of labels must hold them there") from None
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise RequestError(f"--labels {redact(source)} cannot be read as labels: {error}") from error


def integers(values: np.ndarray, source: str) -> np.ndarray:
    if values.dtype.kind not in "iu":
        try:
            values = values.astype(np.str_).astype(np.int64) if values.dtype.kind in "US" else values[:0]
        except (ValueError, OverflowError):
            values = values[:0]
    if values.ndim != 1 or values.size == 0:
        raise RequestError(
            f"--labels {redact(source)} holds no list of integers; it must hold one label for each sample"
        )
    return values.astype(np.int64)
