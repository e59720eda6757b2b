"""A file of a range as Parquet: uncompressed columns, the index first, and the record in the schema's metadata.

A column of numbers is a plain one, of float vectors a fixed-size list, of other arrays the bytes of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_sampler.storage.record import (
    Column,
    DamagedFragment,
    FragmentName,
    Record,
    Samples,
    check_origin,
    check_record,
)

RECORD_KEY = b"ray_sampler"
"""Key of the record in a Parquet file's schema metadata."""

ROW_GROUP_BYTES = 4 * 2**20


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
