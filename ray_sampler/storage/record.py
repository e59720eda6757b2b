"""What a fragment is named, holds and says of itself.

Its record holds the range, the fingerprint of the run and the CRC-32 of every column, so a fragment that was cut short,
damaged, renamed or written by another run is told apart from a whole one by its bytes alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import numpy as np
from isal import isal_zlib

from ray_sampler.errors import printable

FragmentFormat = Literal["parquet", "npz"]

RECORD_VERSION = 1
LONGEST_REASON = 400
"""Characters that are said of a damaged file, at most."""

EXTENSIONS: dict[str, FragmentFormat] = {"parquet": "parquet", "npz": "npz"}

DTYPES = ("uint8", "float32")
"""Of images: pixels, or a solver's result as it is."""

INDEX = "([0-9]{12}|[1-9][0-9]{12,})"
FILENAME = re.compile(rf"{INDEX}-{INDEX}\.([a-z]+)")


class DamagedFragment(Exception):
    """A file is not a whole, unchanged fragment of this run; its text says why, in one printable line."""

    def __init__(self, reason: str) -> None:
        # It may quote the file, which may hold anything: line breaks, a terminal's commands, half a character.
        super().__init__(printable(reason, LONGEST_REASON))


class MissingFragment(DamagedFragment):
    """The fragment is not there."""


class FragmentName(NamedTuple):
    """Samples [start, stop) in a format: what the name of a fragment says."""

    start: int
    stop: int
    format: FragmentFormat

    @property
    def filename(self) -> str:
        return f"{self.start:012d}-{self.stop:012d}.{self.format}"

    @classmethod
    def parse(cls, filename: str) -> FragmentName | None:
        """The name that `filename` spells, None unless it is spelled exactly as `filename` would."""
        match = FILENAME.fullmatch(filename)
        if not match:
            return None
        first, last, extension = match.groups()
        start, stop = int(first), int(last)
        return cls(start, stop, EXTENSIONS[extension]) if start < stop and extension in EXTENSIONS else None


def in_order(fragments: Iterable[FragmentName]) -> list[FragmentName]:
    """By the smallest start, then the largest stop, then the file name: the order in which overlaps are decided.

    Three stable sorts, the least important first: a million names need no key of their own, which would take longest.
    """
    names = sorted(fragments, key=itemgetter(2))
    names.sort(key=itemgetter(1), reverse=True)
    names.sort(key=itemgetter(0))
    return names


@dataclass(frozen=True)
class Samples:
    """Consecutive samples, the first of which has the global index `start`.

    Raises:
        ValueError: a shape or dtype is wrong.
    """

    start: int
    images: np.ndarray
    """(n, H, W, C) uint8, or float32 where nothing decodes the solver's result; n at least 1."""
    labels: np.ndarray | None
    """(n,) int32, None when unconditional."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0")
        if str(images.dtype) not in DTYPES or images.ndim != 4 or images.size == 0:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; they must be uint8 or float32 (n, H, W, C), none of them 0"
            )
        if labels is not None and (labels.dtype != np.int32 or labels.shape != images.shape[:1]):
            raise ValueError(f"labels are {labels.dtype} {labels.shape}; they must be int32 ({len(images)},)")

    @property
    def stop(self) -> int:
        return self.start + len(self.images)

    def part(self, start: int, stop: int) -> Samples:
        """Those of the samples [start, stop), which must be among these."""
        here = slice(start - self.start, stop - self.start)
        return Samples(start, self.images[here], None if self.labels is None else self.labels[here])


@dataclass(frozen=True)
class Record:
    """What a fragment says about itself."""

    fingerprint: str
    """Of the run, 64 hexadecimal digits."""
    start: int
    stop: int
    shape: tuple[int, int, int]
    """(H, W, C)."""
    conditional: bool
    crc32: Mapping[str, int]
    """CRC-32 by column: image, index (int64), label (int32), and label_int64, the labels as the archive holds them."""
    computed_by: Mapping[str, Any] = field(compare=False)
    """Numerics key, device, versions, seconds: two fragments of equal content may differ in it."""
    dtype: str = "uint8"
    version: int = RECORD_VERSION

    def to_json(self) -> str:
        """The record as JSON with its own CRC-32 under record_crc32."""
        body = asdict(self) | {"shape": list(self.shape)}
        return json.dumps(body | {"record_crc32": json_crc32(body)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """The record that `to_json` wrote.

        Raises:
            DamagedFragment: it is not whole, or of another version.
        """
        try:
            body = json.loads(text)
            written = body.pop("record_crc32")
            if json_crc32(body) != written:
                raise DamagedFragment("its record does not match the record's own CRC-32")
            if body["version"] != RECORD_VERSION:
                raise DamagedFragment(f"its record has version {body['version']}; this code reads {RECORD_VERSION}")
            kinds = (("shape", tuple), ("crc32", dict), ("computed_by", dict))
            record = cls(**body | {name: kind(body[name]) for name, kind in kinds})
            # True equals 1 and 8.0 equals 8: of another type, a value passes for a number until it is used as one.
            numbers = (record.start, record.stop, *record.shape, *record.crc32.values())
            if {type(number) for number in numbers} != {int} or len(record.shape) != 3:
                raise TypeError
            if type(record.fingerprint) is not str or type(record.conditional) is not bool:
                raise TypeError
            return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedFragment(f"its record cannot be read ({type(error).__name__})") from error


def json_crc32(body: Mapping[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(body, sort_keys=True).encode())


def checksums(samples: Samples, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """CRC-32 of each column's bytes, little-endian, in C order; goes on from those of the samples `before` these."""
    index = np.arange(samples.start, samples.stop, dtype="<i8")
    columns = {"image": samples.images, "index": index}
    if samples.labels is not None:
        columns |= {"label": samples.labels.astype("<i4", copy=False), "label_int64": samples.labels.astype("<i8")}
    before = before or {}
    return {
        name: isal_zlib.crc32(np.ascontiguousarray(column).data, before.get(name, 0))
        for name, column in columns.items()
    }


def check_record(record: Record, name: FragmentName, fingerprint: str | None, size: int) -> None:
    """Check what can be checked before the columns are read; `size` is the file's, in bytes."""
    check_origin(record, name, fingerprint)
    if not all(n > 0 for n in record.shape) or record.dtype not in DTYPES:
        raise DamagedFragment(f"its record says images of {record.dtype} {record.shape}")
    if (record.stop - record.start) * image_bytes(record) > size:
        raise DamagedFragment(f"it has {size} bytes, fewer than its images need: it was cut short")


def check_origin(record: Record, name: FragmentName, fingerprint: str | None) -> None:
    """Check that a record is of the run and the range that it should be."""
    if fingerprint is not None and record.fingerprint != fingerprint:
        raise DamagedFragment(
            f"it belongs to another run (fingerprint {str(record.fingerprint)[:8]}, not {fingerprint[:8]})"
        )
    if (record.start, record.stop) != (name.start, name.stop):
        raise DamagedFragment(
            f"its name says samples {name.start} to {name.stop}, its record {record.start} to {record.stop}"
        )


def image_bytes(record: Record) -> int:
    """Bytes of one image."""
    height, width, channels = record.shape
    return height * width * channels * np.dtype(record.dtype).itemsize


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a run's identity, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
