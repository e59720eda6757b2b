"""One shard's samples as Parquet or npz, with a record that proves them.

A fragment is encoded and decoded in memory. Its record holds the range, the fingerprint of the run and
the CRC-32 of every column, so a fragment that was cut short, damaged, renamed or written by another run
is told apart from a whole one by its bytes alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_sampler.config import FragmentFormat, RequestError
from ray_sampler.storage.connect import open_store

RECORD_VERSION = 1
RECORD_KEY = b"ray_sampler"
"""Key of the record in a Parquet file's schema metadata."""

ROW_GROUP_BYTES = 4 * 2**20
LONGEST_REASON = 400
"""Characters that are said of a damaged file, at most."""

EXTENSIONS: dict[str, FragmentFormat] = {"parquet": "parquet", "npz": "npz"}
NPZ_MEMBERS = ("arr_0.npy", "arr_1.npy", "index.npy", "record.npy")
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][uiS][0-9]{1,9})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)
FILENAME = re.compile(r"([0-9]{12,})-([0-9]{12,})\.([a-z]+)")


class DamagedFragment(Exception):
    """A file is not a whole, unchanged fragment of this run; its text says why, in one printable line."""

    def __init__(self, reason: str) -> None:
        # It may quote the file, which may hold anything: line breaks, a terminal's commands, half a character.
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in reason[:LONGEST_REASON]))


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
        if not match or match[3] not in EXTENSIONS:
            return None
        name = cls(int(match[1]), int(match[2]), EXTENSIONS[match[3]])
        return name if name.start < name.stop and name.filename == filename else None


@dataclass(frozen=True)
class Samples:
    """Consecutive samples, the first of which has the global index `start`.

    Raises:
        ValueError: a shape or dtype is wrong.
    """

    start: int
    images: np.ndarray
    """(n, H, W, C) uint8, n at least 1."""
    labels: np.ndarray | None
    """(n,) int32, None when unconditional."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if self.start < 0:
            raise ValueError(f"start is {self.start}; it must be at least 0")
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise ValueError(
                f"images are {images.dtype} {images.shape}; they must be uint8 (n, H, W, C), none of them 0"
            )
        if labels is not None and (labels.dtype != np.int32 or labels.shape != images.shape[:1]):
            raise ValueError(f"labels are {labels.dtype} {labels.shape}; they must be int32 ({len(images)},)")

    @property
    def stop(self) -> int:
        return self.start + len(self.images)


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


@dataclass(frozen=True)
class Fragment:
    """A fragment's samples, with its record."""

    record: Record
    samples: Samples


def json_crc32(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def checksums(samples: Samples, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """CRC-32 of each column's bytes, little-endian, in C order; goes on from those of the samples `before` these."""
    index = np.arange(samples.start, samples.stop, dtype="<i8")
    columns = {"image": samples.images, "index": index}
    if samples.labels is not None:
        columns |= {"label": samples.labels.astype("<i4", copy=False), "label_int64": samples.labels.astype("<i8")}
    before = before or {}
    return {
        name: zlib.crc32(np.ascontiguousarray(column).data, before.get(name, 0)) for name, column in columns.items()
    }


def encode(
    samples: Samples, fingerprint: str, computed_by: Mapping[str, Any], format: FragmentFormat
) -> tuple[bytes, Record]:
    """The bytes of a fragment and its record.

    Args:
        fingerprint: of the run.
        computed_by: what computed the samples; anything that JSON can hold.
    """
    _, height, width, channels = samples.images.shape
    record = Record(
        fingerprint=fingerprint,
        start=samples.start,
        stop=samples.stop,
        shape=(height, width, channels),
        conditional=samples.labels is not None,
        crc32=checksums(samples),
        computed_by=dict(computed_by),
    )
    return (encode_parquet if format == "parquet" else encode_npz)(samples, record), record


def decode(data: bytes, name: FragmentName, fingerprint: str | None) -> Fragment:
    """The fragment in `data`, after every check there is.

    Args:
        name: the name it lies under; its range must be the record's.
        fingerprint: of the run it must belong to; None means any.

    Raises:
        DamagedFragment: it is not whole, was changed, or belongs elsewhere.
    """
    record, groups = decode_groups(data, name, fingerprint)
    rows = record.stop - record.start
    images = np.empty((rows, *record.shape), np.uint8)
    labels = np.empty(rows, np.int32) if record.conditional else None
    for group in groups:
        part = slice(group.start - record.start, group.stop - record.start)
        images[part] = group.images
        if labels is not None and group.labels is not None:
            labels[part] = group.labels
    return Fragment(record, Samples(record.start, images, labels))


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
    except (pa.ArrowException, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFragment(f"it is no readable {name.format} file ({type(error).__name__})") from error
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DamagedFragment(f"it is no readable {name.format} file ({type(error).__name__})") from error
    except (EOFError, OverflowError, MemoryError, NotImplementedError, RuntimeError) as error:
        raise DamagedFragment(f"it is no readable {name.format} file ({type(error).__name__})") from error


def checked(record: Record, groups: Iterator[dict[str, np.ndarray]], name: FragmentName) -> Iterator[Samples]:
    """The samples in groups of columns, each group checked for its place, and all of them for their CRC-32s."""
    reached = record.start
    actual: dict[str, int] = {}
    with explained(name):
        for columns in groups:
            end = reached + len(columns["index"])
            if end > record.stop or not np.array_equal(columns["index"], np.arange(reached, end)):
                raise DamagedFragment(f"its index column is not {record.start} to {record.stop - 1}")
            samples = Samples(reached, columns["image"], columns.get("label"))
            actual = checksums(samples, actual)
            yield samples
            reached = end
    if reached != record.stop:
        raise DamagedFragment(f"it holds {reached - record.start} rows, not {record.stop - record.start}")
    if actual != dict(record.crc32):
        wrong = sorted(column for column in actual if actual[column] != record.crc32.get(column))
        raise DamagedFragment(f"the CRC-32 of {' and '.join(wrong) or 'a column'} does not match its record")


def check_record(record: Record, name: FragmentName, fingerprint: str | None, size: int) -> None:
    """Check what can be checked before the columns are read; `size` is the file's, in bytes."""
    if fingerprint is not None and record.fingerprint != fingerprint:
        raise DamagedFragment(
            f"it belongs to another run (fingerprint {str(record.fingerprint)[:8]}, not {fingerprint[:8]})"
        )
    if (record.start, record.stop) != (name.start, name.stop):
        raise DamagedFragment(
            f"its name says samples {name.start} to {name.stop}, its record {record.start} to {record.stop}"
        )
    if not all(n > 0 for n in record.shape) or record.dtype != "uint8":
        raise DamagedFragment(f"its record says images of {record.dtype} {record.shape}")
    if (record.stop - record.start) * image_bytes(record) > size:
        raise DamagedFragment(f"it has {size} bytes, fewer than its images need: it was cut short")


def image_bytes(record: Record) -> int:
    height, width, channels = record.shape
    return height * width * channels


def parquet_schema(record: Record) -> pa.Schema:
    """index int64, label int32 (absent when unconditional), image fixed-size binary; none of them nullable."""
    fields = [pa.field("index", pa.int64(), nullable=False)]
    if record.conditional:
        fields.append(pa.field("label", pa.int32(), nullable=False))
    fields.append(pa.field("image", pa.binary(image_bytes(record)), nullable=False))
    return pa.schema(fields)


def encode_parquet(samples: Samples, record: Record) -> bytes:
    schema = parquet_schema(record).with_metadata({RECORD_KEY: record.to_json().encode()})
    images = pa.py_buffer(np.ascontiguousarray(samples.images))
    columns = [pa.array(np.arange(samples.start, samples.stop, dtype=np.int64))]
    if samples.labels is not None:
        columns.append(pa.array(samples.labels))
    columns.append(
        pa.FixedSizeBinaryArray.from_buffers(schema.field("image").type, len(samples.images), [None, images])
    )
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // image_bytes(record)),
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    return sink.getvalue().to_pybytes()


def decode_parquet(
    data: bytes, name: FragmentName, fingerprint: str | None
) -> tuple[Record, Iterator[dict[str, np.ndarray]]]:
    file = pq.ParquetFile(pa.BufferReader(data))
    text = (file.schema_arrow.metadata or {}).get(RECORD_KEY)
    if text is None:
        raise DamagedFragment("it holds no record: it is another program's file")
    record = Record.from_json(text)
    check_record(record, name, fingerprint, len(data))
    schema = parquet_schema(record)
    if not file.schema_arrow.equals(schema):
        raise DamagedFragment(
            f"its columns are {', '.join(map(str, file.schema_arrow))}, not {', '.join(map(str, schema))}"
        )
    rows = record.stop - record.start
    if file.metadata.num_rows != rows:
        raise DamagedFragment(f"it has {file.metadata.num_rows} rows, not {rows}")
    check_groups(file.metadata, rows)
    return record, parquet_groups(file, record)


def check_groups(metadata: pq.FileMetaData, rows: int) -> None:
    """Check that the row groups hold what the file is said to hold, as it is, so that none grows while it is read."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != rows or any(group.num_rows <= 0 for group in groups):
        raise DamagedFragment(f"its row groups do not make {rows} rows")
    for group in groups:
        for column in map(group.column, range(group.num_columns)):
            # Its codec is not asked for: where a flipped bit makes it an unknown one, Arrow aborts the process.
            as_it_is = column.total_uncompressed_size == column.total_compressed_size
            if not as_it_is or column.num_values != group.num_rows:
                raise DamagedFragment(f"its column {column.path_in_schema!r} is not stored as it is")


def parquet_groups(file: pq.ParquetFile, record: Record) -> Iterator[dict[str, np.ndarray]]:
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(row_groups=[group], use_threads=False):
            columns = {
                "index": values(batch.column("index"), np.dtype("<i8")),
                "image": values(batch.column("image"), np.dtype("u1")).reshape(-1, *record.shape),
            }
            if record.conditional:
                columns["label"] = values(batch.column("label"), np.dtype("<i4"))
            yield columns


def values(array: pa.Array, dtype: np.dtype[Any]) -> np.ndarray:
    """A column's values, flat, without a copy."""
    if array.null_count:
        raise DamagedFragment("a value is null")
    width = array.type.byte_width
    return np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width : (array.offset + len(array)) * width].view(
        dtype
    )


def encode_npz(samples: Samples, record: Record) -> bytes:
    columns = {"arr_0": samples.images}
    if samples.labels is not None:
        columns["arr_1"] = samples.labels
    columns["index"] = np.arange(samples.start, samples.stop, dtype=np.int64)
    columns["record"] = np.array(record.to_json().encode())
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for column, array in columns.items():
            with archive.open(f"{column}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(
                    member, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False
                )
    return sink.getvalue()


def decode_npz(
    data: bytes, name: FragmentName, fingerprint: str | None
) -> tuple[Record, Iterator[dict[str, np.ndarray]]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        if len(infos) > len(NPZ_MEMBERS) or len({info.filename for info in infos}) < len(infos):
            raise DamagedFragment(f"its {len(infos)} members are too many, or one is there twice")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise DamagedFragment(f"its member {info.filename!r} is not stored as it is")
        members = {info.filename: archive.read(info) for info in infos}
    if "record.npy" not in members:
        raise DamagedFragment("it holds no record: it is another program's file")
    record = Record.from_json(npy_values(members.pop("record.npy")).tobytes())
    check_record(record, name, fingerprint, len(data))
    names = {"arr_0.npy": "image", "index.npy": "index"} | ({"arr_1.npy": "label"} if record.conditional else {})
    if set(members) != set(names):
        raise DamagedFragment(f"its members are {', '.join(sorted(members))}, not {', '.join(sorted(names))}")
    columns = {names[member]: npy_values(content) for member, content in members.items()}
    rows = record.stop - record.start
    expected = {"image": ("u1", (rows, *record.shape)), "index": ("i8", (rows,)), "label": ("i4", (rows,))}
    for column, array in columns.items():
        if (array.dtype.str[1:], array.shape) != expected[column]:
            raise DamagedFragment(f"its {column} column is {array.dtype} {array.shape}")
    return record, iter([columns])


def npy_values(content: bytes) -> np.ndarray:
    """The array of an npy file of format 1.0, without a copy.

    numpy's own reader has Python parse the header as an expression, which for one that was written to do harm ends in
    whatever its parser and tokenizer raise, SystemError among it.
    """
    header = NPY_HEADER.match(content)
    if header is None or header.end() != 10 + int.from_bytes(content[8:10], "little"):
        raise DamagedFragment("a member is no npy array as fragments hold them")
    shape = tuple(map(int, header[2].replace(b",", b" ").split()))
    return np.frombuffer(memoryview(content)[header.end() :], np.dtype(header[1].decode())).reshape(shape)


def read_fragment(url: str) -> Fragment:
    """The samples and the record of one fragment, checked.

    Args:
        url: a local path or any fsspec URL, ending in the fragment's own name.

    Raises:
        RequestError: there is no such file, or its name is no fragment's.
        DamagedFragment: it is not whole.
    """
    folder, _, filename = url.rpartition("/")
    name = FragmentName.parse(filename)
    if name is None:
        raise RequestError(f"{filename!r} is no fragment's name; one looks like 000000000000-000000000512.parquet")
    store = open_store(folder or ("/" if url.startswith("/") else "."))
    data = store.read(filename)
    if data is None:
        raise RequestError(f"there is no {filename} in {store.url}")
    return decode(data, name, None)
