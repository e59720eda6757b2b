"""Fragments in npz: no pickle, no hostile header, no member too many is read, and numpy alone opens them."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest

from ray_sampler.storage.fragment import decode
from ray_sampler.storage.record import DamagedFragment, FragmentName
from tests.storage.fill import FINGERPRINT, encoded


def test_a_compressed_or_enlarged_npz_is_refused():
    name, data, *_ = encoded("npz")
    with np.load(io.BytesIO(data)) as arrays:
        columns = dict(arrays)
    for change in ("compressed", "extra", "missing"):
        sink = io.BytesIO()
        if change == "compressed":
            np.savez_compressed(sink, **columns)
        elif change == "extra":
            np.savez(sink, **columns, mu=np.zeros(3))
        else:
            np.savez(sink, **{k: v for k, v in columns.items() if k != "arr_1"})
        with pytest.raises(DamagedFragment):
            decode(sink.getvalue(), name, FINGERPRINT)


def test_npz_with_pickled_objects_is_refused_without_loading_them():
    sink = io.BytesIO()
    np.savez(sink, record=np.array([{}], object), arr_0=np.zeros(1), index=np.zeros(1))
    with pytest.raises(DamagedFragment):
        decode(sink.getvalue(), FragmentName(0, 1, "npz"), None)


def npy(header: str, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1") + values


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 30 + ",), }\n"),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }\n", b"cos\nsystem\n"),
        npy("{'descr': '|V0', 'fortran_order': False, 'shape': (5,), }\n"),
        npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 3), }\n", b"abcdef"),
        npy("{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3), }\n", b"abcdef"),
        npy("{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (3,), }\n", b"abc"),
        npy("(" * 5000),
        npy("-" * 5000 + "1"),
        npy("'''"),
        npy("{'descr': (\n"),
        npy("__import__('os').system('true')\n"),
        npy("\xff\xfe"),
        b"\x93NUMPY\x02\x00",
        b"",
    ],
    ids=range(14),
)
@pytest.mark.parametrize("member", ["record.npy", "arr_0.npy", "index.npy"])
def test_a_member_of_an_npz_with_a_hostile_header_is_refused(member, content):
    name, data, *_ = encoded("npz")
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as whole, zipfile.ZipFile(sink, "w") as changed:
        for other in whole.namelist():
            changed.writestr(other, content if other == member else whole.read(other))
    with pytest.raises(DamagedFragment):
        decode(sink.getvalue(), name, FINGERPRINT)
    assert decode(data, name, FINGERPRINT).record.start == name.start  # the reader is none the worse for it


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_npz_with_a_member_twice_is_refused():
    name, data, *_ = encoded("npz")
    for member in ("record.npy", "arr_0.npy", "arr_1.npy", "index.npy"):
        sink = io.BytesIO(data)
        with zipfile.ZipFile(sink, "a") as archive:
            archive.writestr(member, archive.read(member))
        with pytest.raises(DamagedFragment, match="twice"):
            decode(sink.getvalue(), name, FINGERPRINT)


def test_an_npz_whose_members_overlap_thousands_of_times_takes_no_memory():
    """Each entry of the directory may name the same megabyte: together they would be gigabytes."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("arr_0.npy", bytes(2**20))
        for i in range(5000):
            info = zipfile.ZipInfo(f"{i}.npy")
            first = archive.filelist[0]
            info.file_size, info.compress_size, info.CRC = first.file_size, first.compress_size, first.CRC
            info.header_offset = first.header_offset
            archive.filelist.append(info)
        archive._didModify = True  # type: ignore[attr-defined] # so that the directory is written
    tracemalloc.start()
    with pytest.raises(DamagedFragment, match="too many"):
        decode(sink.getvalue(), FragmentName(0, 1, "npz"), None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


def test_npz_fragments_open_with_numpy_alone():
    _, data, record, samples = encoded("npz")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], samples.images)
        np.testing.assert_array_equal(arrays["arr_1"], samples.labels)
        assert json.loads(arrays["record"].item())["fingerprint"] == record.fingerprint
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
