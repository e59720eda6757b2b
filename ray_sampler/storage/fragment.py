"""One range of samples as Parquet or npz, with a record that verifies them: encoded and decoded in memory.

Parquet: uncompressed columns, the index first, and the record in the schema's metadata. A column of numbers is a plain
one, of float vectors a fixed-size list, of other arrays the bytes of each. npz: an array for each column, index and
record, all stored as they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_sampler.errors import RequestError
from ray_sampler.storage.connect import open_store, path_text
from ray_sampler.storage.record import (
    Column,
    DamagedFragment,
    FragmentFormat,
    FragmentName,
    Record,
    Samples,
    check_origin,
    check_record,
    checksums,
)

RECORD_KEY = b"ray_sampler"
"""Key of the record in a Parquet file's schema metadata."""

ROW_GROUP_BYTES = 4 * 2**20

NPZ_NAMES = {"image": "arr_0", "label": "arr_1"}
"""Columns that numpy gives the names of unnamed arrays; all others keep their own."""

MOST_MEMBERS = 64

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][fuiS][0-9]{1,9})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)

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


def parquet_columns(record: Record) -> dict[str, Column]:
    """The columns of a file in their order: index, numbers, and then whatever has a shape."""
    return {"index": Column("int64"), **dict(sorted(record.columns.items(), key=lambda c: (c[1].shape != (), c[0])))}


def is_vector(column: Column) -> bool:
    return len(column.shape) == 1 and column.dtype.startswith("float")


def arrow_type(column: Column) -> pa.DataType:
    if column.shape and not is_vector(column):
        return pa.binary(column.size)
    number = pa.from_numpy_dtype(column.dtype)
    return pa.list_(pa.field("element", number, nullable=False), column.shape[0]) if column.shape else number


def parquet_schema(record: Record) -> pa.Schema:
    """The columns, none of them nullable."""
    return pa.schema(
        [pa.field(name, arrow_type(column), nullable=False) for name, column in parquet_columns(record).items()]
    )


def arrow_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    values = np.ascontiguousarray(values)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    if pa.types.is_fixed_size_binary(kind):
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(values), [None, pa.py_buffer(values)])
    return pa.array(values)


def encode_parquet(samples: Samples, record: Record) -> bytes:
    schema = parquet_schema(record).with_metadata({RECORD_KEY: record.to_json().encode()})
    columns = {"index": np.arange(samples.start, samples.stop, dtype=np.int64), **samples.columns}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays([arrow_array(columns[field.name], field.type) for field in schema], schema=schema),
        sink,
        row_group_size=max(1, ROW_GROUP_BYTES // max(column.size for column in record.columns.values())),
        compression="none",
        use_dictionary=False,
        write_statistics=False,
    )
    return sink.getvalue().to_pybytes()


def decode_parquet(
    data: bytes, name: FragmentName, fingerprint: str | None
) -> tuple[Record, Iterator[dict[str, np.ndarray]]]:
    file = pq.ParquetFile(pa.BufferReader(data))
    record = record_in(file.schema_arrow.metadata)
    check_record(record, name, fingerprint, len(data))
    schema = parquet_schema(record)
    if not file.schema_arrow.equals(schema):
        raise DamagedFragment(
            f"its columns are {', '.join(map(str, file.schema_arrow))}, not {', '.join(map(str, schema))}"
        )
    rows = record.stop - record.start
    if file.metadata.num_rows != rows:
        raise DamagedFragment(f"it has {file.metadata.num_rows} rows, not {rows}")
    columns = parquet_columns(record)
    check_groups(file.metadata, rows, [c.shape[0] if is_vector(c) else 1 for c in columns.values()])
    return record, parquet_groups(file, columns)


def record_in(metadata: dict[bytes, bytes] | None) -> Record:
    if not metadata or RECORD_KEY not in metadata:
        raise DamagedFragment("it holds no record: it is another program's file")
    return Record.from_json(metadata[RECORD_KEY])


def record_at_end(data: bytes, name: FragmentName, fingerprint: str | None) -> Record:
    """The record of a file of which `data` holds the end, with the whole footer; the columns are not checked."""
    record = record_in(pq.read_metadata(pa.BufferReader(data)).metadata)
    check_origin(record, name, fingerprint)
    return record


def check_groups(metadata: pq.FileMetaData, rows: int, widths: list[int]) -> None:
    """Check that the row groups hold what the file is said to hold, as it is, so that none grows while it is read.

    Args:
        widths: values of each column that Parquet counts in a row.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    if sum(group.num_rows for group in groups) != rows or any(group.num_rows <= 0 for group in groups):
        raise DamagedFragment(f"its row groups do not make {rows} rows")
    for group in groups:
        for column, width in zip(map(group.column, range(group.num_columns)), widths, strict=True):
            # Its codec is not asked for: where a flipped bit makes it an unknown one, Arrow aborts the process.
            as_it_is = column.total_uncompressed_size == column.total_compressed_size
            if not as_it_is or column.num_values != group.num_rows * width:
                raise DamagedFragment(f"its column {column.path_in_schema!r} is compressed or encoded")


def parquet_groups(file: pq.ParquetFile, columns: dict[str, Column]) -> Iterator[dict[str, np.ndarray]]:
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(row_groups=[group], use_threads=False):
            yield {name: values(batch.column(name), column) for name, column in columns.items()}


def values(array: pa.Array, column: Column) -> np.ndarray:
    """A column's values, (n, ...), without a copy."""
    if array.null_count:
        raise DamagedFragment("a value is null")
    rows, numbers = len(array), array.flatten() if is_vector(column) else array
    if numbers.null_count:
        raise DamagedFragment("a value is null")
    first, width = numbers.offset, numbers.type.byte_width
    flat = np.frombuffer(numbers.buffers()[1], np.uint8)[first * width : (first + len(numbers)) * width]
    return flat.view(np.dtype(column.dtype)).reshape(rows, *column.shape)


def npz_columns(record: Record) -> dict[str, str]:
    """The names of the arrays in their order, by column: images, labels, whatever else there is, and the index."""
    names = sorted(record.columns, key=lambda column: NPZ_NAMES.get(column, column))
    return {column: NPZ_NAMES.get(column, column) for column in [*names, "index"]}


def encode_npz(samples: Samples, record: Record) -> bytes:
    values = {**samples.columns, "index": np.arange(samples.start, samples.stop, dtype=np.int64)}
    columns = {name: values[column] for column, name in npz_columns(record).items()}
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
        if len(infos) > MOST_MEMBERS or len({info.filename for info in infos}) < len(infos):
            raise DamagedFragment(f"its {len(infos)} members are too many, or one is there twice")
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED:
                raise DamagedFragment(f"its member {info.filename!r} is compressed")
        if sum(info.file_size for info in infos) > len(data):
            raise DamagedFragment("its members overlap: together they are larger than the file")
        members = {info.filename: archive.read(info) for info in infos}
    if "record.npy" not in members:
        raise DamagedFragment("it holds no record: it is another program's file")
    record = Record.from_json(npy_values(members.pop("record.npy")).tobytes())
    check_record(record, name, fingerprint, len(data))
    names = {f"{name}.npy": column for column, name in npz_columns(record).items()}
    if set(members) != set(names):
        raise DamagedFragment(f"its members are {', '.join(sorted(members))}, not {', '.join(sorted(names))}")
    columns = {names[member]: npy_values(content) for member, content in members.items()}
    for held, column in {**record.columns, "index": Column("int64")}.items():
        array, shape = columns[held], (record.stop - record.start, *column.shape)
        if (array.dtype.str[1:], array.shape) != (np.dtype(column.dtype).str[1:], shape):
            raise DamagedFragment(f"its {held} column is {array.dtype} {array.shape}")
    return record, iter([columns])


def npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], int] | None:
    """dtype, shape and length of the header of an npy file of format 1.0 with numbers in C order; None of any other.

    numpy's own reader has Python parse the header as an expression, which for one that was written to do harm ends in
    whatever its parser and tokenizer raise, SystemError among it.
    """
    found = NPY_HEADER.match(content)
    if found is None or found.end() != 10 + int.from_bytes(content[8:10], "little"):
        return None
    return np.dtype(found[1].decode()), tuple(map(int, found[2].replace(b",", b" ").split())), found.end()


def npy_values(content: bytes) -> np.ndarray:
    """The array of an npy file, without a copy."""
    header = npy_header(content)
    if header is None:
        raise DamagedFragment("a member is not an npy array as fragments hold them")
    dtype, shape, begin = header
    return np.frombuffer(memoryview(content)[begin:], dtype).reshape(shape)
