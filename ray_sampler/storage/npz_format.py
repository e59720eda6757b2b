"""A fragment as npz: arrays arr_0 (images), arr_1 (labels), index and record, all stored as they are."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator

import numpy as np

from ray_sampler.storage.record import DamagedFragment, FragmentName, Record, Samples, check_record

NPZ_MEMBERS = ("arr_0.npy", "arr_1.npy", "index.npy", "record.npy")

NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([|<][fuiS][0-9]{1,9})', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n",
    re.DOTALL,
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
    image = np.dtype(record.dtype).str[1:]
    expected = {"image": (image, (rows, *record.shape)), "index": ("i8", (rows,)), "label": ("i4", (rows,))}
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
