"""What a file of a range is named, holds and says of itself.

It holds columns: images, labels, or whatever else there is one of for each sample. Its record has the range, the
fingerprint of the run, the columns and the CRC-32 of each, so a file that was cut short, damaged, renamed or written by
another run is distinguished from a valid one by its bytes alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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

DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")

COLUMN_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")

RESERVED = ("index", "record", "arr_0", "arr_1")
"""Names that no column may have: what every file holds beside its columns, and what npz calls images and labels."""

WIDENED = {"label": "<i8"}
"""Columns that the archive holds as a wider type, of which a record has the CRC-32 too, as label_int64."""

INDEX = "([0-9]{12}|[1-9][0-9]{12,})"
FILENAME = re.compile(rf"{INDEX}-{INDEX}\.([a-z]+)")


class DamagedFragment(Exception):
    """A file is not an intact fragment of this run; its text gives the reason, in one printable line."""

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

    Three stable sorts, the least important first: a million separate keys would take longest.
    """
    names = sorted(fragments, key=itemgetter(2))
    names.sort(key=itemgetter(1), reverse=True)
    names.sort(key=itemgetter(0))
    return names


class Column(NamedTuple):
    """What there is one of for each sample."""

    dtype: str
    """As numpy names it."""
    shape: tuple[int, ...] = ()
    """Of what one sample has; () for a number."""

    @property
    def size(self) -> int:
        """Bytes of what one sample has."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


LABEL = Column("int32")


def check_column(name: str, column: Column) -> None:
    """Raises ValueError: a column of this kind cannot be stored."""
    dtype, shape = column
    if not COLUMN_NAME.fullmatch(name) or name in RESERVED:
        raise ValueError(f"a column is called {name!r}; it must be a small letter, and more, digits or _ after it")
    if dtype not in DTYPES or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"column {name} is {dtype} {shape}; it must be of numbers, and no side 0")
    if name == "image" and (dtype not in ("uint8", "float32") or len(shape) != 3):
        raise ValueError(f"images are {dtype} {shape}; they must be uint8 or float32 (H, W, C)")
    if name == "label" and column != LABEL:
        raise ValueError(f"labels are {dtype} {shape}; they must be int32, one a sample")


@dataclass(frozen=True)
class Samples:
    """Consecutive samples, the first of which has the global index `start`.

    Raises:
        ValueError: a column's name, shape or dtype is wrong.
    """

    start: int
    columns: Mapping[str, np.ndarray]
    """By name, each (n, ...), n at least 1."""

    def __post_init__(self) -> None:
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0")
        lengths = {array.shape[:1] for array in self.columns.values()}
        if len(lengths) != 1 or lengths <= {(), (0,)}:
            raise ValueError(f"columns are of lengths {sorted(lengths)}; they must be of one length, and not empty")
        for name, column in self.kinds().items():
            check_column(name, column)

    @classmethod
    def of(cls, start: int, images: np.ndarray, labels: np.ndarray | None = None) -> Samples:
        """Pictures: images (n, H, W, C) uint8 or float32, and labels (n,) int32 where there are any."""
        return cls(start, {"image": images} | ({} if labels is None else {"label": labels}))

    @property
    def images(self) -> np.ndarray:
        """(n, H, W, C) uint8, or float32 where nothing decodes the solver's result."""
        return self.columns["image"]

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int32, None when unconditional."""
        return self.columns.get("label")

    @property
    def stop(self) -> int:
        return self.start + len(next(iter(self.columns.values())))

    def kinds(self) -> dict[str, Column]:
        """The columns without their values."""
        return {name: Column(str(array.dtype), array.shape[1:]) for name, array in self.columns.items()}

    def part(self, start: int, stop: int) -> Samples:
        """Those of the samples [start, stop), which must be among these."""
        here = slice(start - self.start, stop - self.start)
        return Samples(start, {name: array[here] for name, array in self.columns.items()})


@dataclass(frozen=True)
class Record:
    """What a file of a range says about itself."""

    fingerprint: str
    """Of the run, 64 hexadecimal digits."""
    start: int
    stop: int
    columns: Mapping[str, Column]
    """By name."""
    crc32: Mapping[str, int]
    """CRC-32 by column; of index (int64) too, and of label_int64, the labels as the archive holds them."""
    computed_by: Mapping[str, Any] = field(compare=False)
    """Numerics key, device, versions, seconds: two files of equal content may differ in it."""
    version: int = RECORD_VERSION

    def to_json(self) -> str:
        """The record as JSON with its own CRC-32 under record_crc32.

        Images, and labels beside them, are said by shape, dtype and conditional; other columns by a list of them.
        """
        body = {name: value for name, value in vars(self).items() if name != "columns"}
        more = dict(self.columns)
        if image := more.pop("image", None):
            labelled = more.pop("label", None) is not None
            body |= {"shape": list(image.shape), "dtype": image.dtype, "conditional": labelled}
        if more:
            body["columns"] = {name: [column.dtype, list(column.shape)] for name, column in more.items()}
        return json.dumps(body | {"record_crc32": json_crc32(body)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """The record that `to_json` wrote.

        Raises:
            DamagedFragment: it is corrupt, or of another version.
        """
        try:
            body = json.loads(text)
            written = body.pop("record_crc32")
            if json_crc32(body) != written:
                raise DamagedFragment("its record does not match the record's own CRC-32")
            if body["version"] != RECORD_VERSION:
                raise DamagedFragment(f"its record has version {body['version']}; this code reads {RECORD_VERSION}")
            columns = {name: Column(dtype, tuple(shape)) for name, (dtype, shape) in body.pop("columns", {}).items()}
            if "shape" in body:
                columns["image"] = Column(body.pop("dtype"), tuple(body.pop("shape")))
                labelled = body.pop("conditional")
                if type(labelled) is not bool:
                    raise TypeError
                columns |= {"label": LABEL} if labelled else {}
            for name, column in columns.items():
                check_column(name, column)
            kinds = (("crc32", dict), ("computed_by", dict))
            record = cls(columns=columns, **body | {name: kind(body[name]) for name, kind in kinds})
            # True equals 1 and 8.0 equals 8: of another type, a value passes for a number until it is used as one.
            numbers = (record.start, record.stop, *record.crc32.values())
            if {type(number) for number in numbers} != {int} or type(record.fingerprint) is not str or not columns:
                raise TypeError
            return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DamagedFragment(f"its record cannot be read ({type(error).__name__})") from error


def json_crc32(body: Mapping[str, Any]) -> int:
    return isal_zlib.crc32(json.dumps(body, sort_keys=True).encode())


def checksums(samples: Samples, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """CRC-32 of each column's bytes, little-endian, in C order, continued from those of the samples `before` these."""
    columns = {"index": np.arange(samples.start, samples.stop, dtype="<i8"), **samples.columns}
    for name in WIDENED.keys() & columns.keys():
        columns[f"{name}_int64"] = columns[name].astype(WIDENED[name])
    before = before or {}
    return {
        name: isal_zlib.crc32(np.ascontiguousarray(column).data, before.get(name, 0))
        for name, column in columns.items()
    }


def check_record(record: Record, name: FragmentName, fingerprint: str | None, size: int) -> None:
    """Check what can be checked before the columns are read; `size` is the file's, in bytes."""
    check_origin(record, name, fingerprint)
    if (record.stop - record.start) * sum(column.size for column in record.columns.values()) > size:
        raise DamagedFragment(f"it has {size} bytes, fewer than its columns need: it was cut short")


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


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a run's identity, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
