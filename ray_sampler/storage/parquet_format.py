"""A fragment as Parquet: uncompressed columns index, label and image, and the record in the schema's metadata."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ray_sampler.storage.record import (
    DamagedFragment,
    FragmentName,
    Record,
    Samples,
    check_origin,
    check_record,
    image_bytes,
)

RECORD_KEY = b"ray_sampler"
"""Key of the record in a Parquet file's schema metadata."""

ROW_GROUP_BYTES = 4 * 2**20


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


def record_at_end(data: bytes, name: FragmentName, fingerprint: str | None) -> Record:
    """The record of a fragment of which `data` holds the end, with the whole footer; the columns are not checked."""
    metadata = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    if RECORD_KEY not in metadata:
        raise DamagedFragment("it holds no record: it is another program's file")
    record = Record.from_json(metadata[RECORD_KEY])
    check_origin(record, name, fingerprint)
    return record


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
                "image": values(batch.column("image"), np.dtype(record.dtype)).reshape(-1, *record.shape),
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
