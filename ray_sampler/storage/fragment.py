"""One range of samples as Parquet or npz, with a record that verifies them: encoded and decoded in memory."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ray_sampler.errors import RequestError
from ray_sampler.storage.connect import open_store, path_text
from ray_sampler.storage.npz_format import decode_npz, encode_npz
from ray_sampler.storage.parquet_format import decode_parquet, encode_parquet
from ray_sampler.storage.record import DamagedFragment, FragmentFormat, FragmentName, Record, Samples, checksums

READER_ERRORS = (
    pa.ArrowException,
    zipfile.BadZipFile,
    zlib.error,
    OSError,  # Arrow's, of a footer or page that makes no sense
    ValueError,  # of bytes that are not a text, array or schema, by any of the readers
    TypeError,  # of unexpected metadata, for example a column type without a width
    KeyError,  # zipfile's and Arrow's, of a missing name
    IndexError,  # of a missing group or buffer
    AttributeError,  # of a column of a type that has no such buffers
    EOFError,  # zipfile's, of a member that ends early
    OverflowError,  # of a number in a header that no C integer holds
    RuntimeError,  # zipfile's, of a member that is encrypted, or of a version that it cannot read
)
"""What the readers of the two formats raise for a corrupt or foreign file. MemoryError is not among them: sizes are
checked before they are trusted, so it concerns this machine, not the file."""


@dataclass(frozen=True)
class Fragment:
    """A fragment's samples, with its record."""

    record: Record
    """What the file says of itself: fingerprint, range, checksums, and what computed it."""
    samples: Samples
    """Its `start` is the index of the first one; `images` (n, H, W, C) uint8, or float32 with --decoder none; `labels`
    (n,) int32, None of an unconditional model."""


def encode(
    samples: Samples, fingerprint: str, computed_by: Mapping[str, Any], format: FragmentFormat
) -> tuple[bytes, Record]:
    """The bytes of a fragment and its record.

    Args:
        fingerprint: of the run.
        computed_by: what computed the samples; anything that JSON can hold.
    """
    record = Record(
        fingerprint, samples.start, samples.stop, samples.kinds(), checksums(samples), computed_by=dict(computed_by)
    )
    return (encode_parquet if format == "parquet" else encode_npz)(samples, record), record


def decode(data: bytes, name: FragmentName, fingerprint: str | None) -> Fragment:
    """The fragment in `data`, after every check there is.

    Args:
        name: the name it lies under; its range must be the record's.
        fingerprint: of the run it must belong to; None means any.

    Raises:
        DamagedFragment: it is corrupt, was changed, or belongs elsewhere.
    """
    record, groups = decode_groups(data, name, fingerprint)
    rows = record.stop - record.start
    columns = {held: np.empty((rows, *column.shape), column.dtype) for held, column in record.columns.items()}
    for group in groups:
        for held, array in group.columns.items():
            columns[held][group.start - record.start : group.stop - record.start] = array
    return Fragment(record, Samples(record.start, columns))


def decode_groups(data: bytes, name: FragmentName, fingerprint: str | None) -> tuple[Record, Iterator[Samples]]:
    """The record of the fragment in `data`, and its samples group by group, without a copy of the whole.

    What a group holds is proved only when the last one was taken: the CRC-32s are compared then. Each group lies
    within the record's range and follows the one before.

    Args and raises: as of `decode`; the groups raise DamagedFragment too.
    """
    with explained(name):
        record, groups = (decode_parquet if name.format == "parquet" else decode_npz)(data, name, fingerprint)
    return record, checked(record, groups, name)


@contextlib.contextmanager
def explained(name: FragmentName) -> Iterator[None]:
    """Say of whatever a reader of a file format raises that the file is damaged."""
    try:
        yield
    except READER_ERRORS as error:
        raise DamagedFragment(f"it is not a readable {name.format} file ({type(error).__name__})") from error


def checked(record: Record, groups: Iterator[dict[str, np.ndarray]], name: FragmentName) -> Iterator[Samples]:
    """The samples in groups of columns, each group checked for its place, and all of them for their CRC-32s."""
    reached = record.start
    actual: dict[str, int] = {}
    with explained(name):
        for columns in groups:
            index = columns.pop("index")
            end = reached + len(index)
            if end > record.stop or not np.array_equal(index, np.arange(reached, end)):
                raise DamagedFragment(f"its index column is not {record.start} to {record.stop - 1}")
            samples = Samples(reached, columns)
            actual = checksums(samples, actual)
            yield samples
            reached = end
    if reached != record.stop:
        raise DamagedFragment(f"it holds {reached - record.start} rows, not {record.stop - record.start}")
    if actual != dict(record.crc32):
        wrong = sorted(column for column in actual if actual[column] != record.crc32.get(column))
        raise DamagedFragment(f"the CRC-32 of {' and '.join(wrong) or 'a column'} does not match its record")


def read_fragment(url: str | os.PathLike[str]) -> Fragment:
    """The samples and the record of one fragment, checked: `read_fragment(url).samples.images` is an array.

    Args:
        url: a local path or any fsspec URL, ending in the fragment's own name.

    Raises:
        RequestError: there is no such file, or its name is not a fragment's.
        DamagedFragment: it is corrupt.
    """
    url = path_text(url, "a fragment")
    folder, _, filename = url.rpartition("/")
    name = FragmentName.parse(filename)
    if name is None:
        raise RequestError(f"{filename!r} is not a fragment's name; one looks like 000000000000-000000000512.parquet")
    store = open_store(folder or ("/" if url.startswith("/") else "."))
    data = store.read(filename)
    if data is None:
        raise RequestError(f"there is no {filename} in {store.url}")
    return decode(data, name, None)
