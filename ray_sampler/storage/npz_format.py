"""A file of a range as npz: an array for each column, index and record, all stored as they are."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator

import numpy as np

from ray_sampler.storage.record import Column, DamagedFragment, FragmentName, Record, Samples, check_record

NPZ_NAMES = {"image": "arr_0", "label": "arr_1"}
"""Columns that numpy gives the names of unnamed arrays; all others keep their own."""

MOST_MEMBERS = 64

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][fuiS][0-9]{1,9})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
)


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


def npy_values(content: bytes) -> np.ndarray:
    """The array of an npy file of format 1.0, without a copy.

    numpy's own reader has Python parse the header as an expression, which for one that was written to do harm ends in
    whatever its parser and tokenizer raise, SystemError among it.
    """
    header = NPY_HEADER.match(content)
    if header is None or header.end() != 10 + int.from_bytes(content[8:10], "little"):
        raise DamagedFragment("a member is not an npy array as fragments hold them")
    shape = tuple(map(int, header[2].replace(b",", b" ").split()))
    return np.frombuffer(memoryview(content)[header.end() :], np.dtype(header[1].decode())).reshape(shape)
