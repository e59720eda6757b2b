"""Labels that users bring: read where only one reading is possible, else refused with what was found."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_sampler.errors import RequestError
from ray_sampler.storage.number_file import read_labels


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


COLUMN = np.array([[3], [1], [2]])
IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


def encrypted(data: bytes) -> bytes:
    """A zip file whose first member says that it is encrypted."""
    changed = bytearray(data)
    changed[6] |= 1
    changed[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


def other_method(data: bytes) -> bytes:
    """A zip file whose first member says that it is packed in an unknown way."""
    changed = bytearray(data)
    changed[8] = changed[data.index(b"PK\x01\x02") + 10] = 99
    return bytes(changed)


READ: dict[str, tuple[str, bytes]] = {
    "plain": ("l.txt", b"3 1\n2\n"),
    "byte order mark": ("l.txt", b"\xef\xbb\xbf3,1,2\n"),
    "UTF-16": ("l.txt", "3\n1\n2\n".encode("utf-16")),
    "header": ("l.csv", b"label\n3\n1\n2\n"),
    "header of two words": ("l.csv", b"class label\n3\n1\n2\n"),
    "comments": ("l.txt", b"# classes\n3 # a dog\n\n1\n2\n"),
    "commas at the ends": ("l.csv", b"3,\n1,\n2,\n"),
    "quotes": ("l.csv", b'"3"\n"1"\n"2"\n'),
    "an .npz by another name": ("labels", npz(arr_1=COLUMN)),
    "an .npy by another name": ("L.NPY", npy(COLUMN)),
    "whole floats": ("l.txt", b"3.0 1.0 2e0"),
    "two in a line that do not count": ("l.txt", b"3 1\n2 9\n"),
    "a column": ("l.npy", npy(COLUMN)),
    "a row": ("l.npy", npy(COLUMN.T)),
    "floats": ("l.npy", npy(COLUMN.astype(np.float32))),
    "unsigned": ("l.npy", npy(COLUMN.astype(np.uint64))),
    "arr_1": ("l.npz", npz(arr_0=IMAGES, arr_1=COLUMN.reshape(-1))),
}
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "index and label": ("l.csv", b"0,3\n1,1\n2,2\n", "several columns, for example 0,3"),
    "index and label from one": ("l.csv", b"1 3\n2 1\n", "several columns, for example 1,3"),
    "index and label with a header": (
        "l.csv",
        b"name,label\n7,3\n4,1\n",
        "several columns, for example name,label",
    ),
    "beyond 64 bits": ("l.npy", npy(np.array([2**63 + 5], np.uint64)), "has 9.2233720368547758e+18 at position 0"),
    "beyond 64 bits in text": ("l.txt", b"1 9223372036854775813", "has 9.2233720368547758e+18 at position 1"),
    "a fraction": ("l.npy", npy(np.array([1.0, 0.5])), "has 0.5 at position 1"),
    "a fraction in text": ("l.txt", b"1 2 0.5", "has 0.5 at position 2"),
    "not a number": ("l.npy", npy(np.array([np.nan])), "has nan at position 0"),
    "words": ("l.txt", b"1\ndog\n", "could not convert string to float: 'dog'"),
    "a terminal's command": ("l.txt", b"1 \x1b[2J", "could not convert string to float: "),
    "one-hot rows": ("l.npy", npy(np.eye(3)), "holds an array of shape (3, 3)"),
    "booleans": ("l.npy", npy(np.array([True])), "type bool"),
    "two lists": ("l.npz", npz(a=np.arange(3), b=np.arange(3)), "arr_1 is not a file"),
    "images alone": ("l.npz", npz(arr_0=IMAGES), "arr_1 is not a file"),
    "a hexadecimal number above others": ("l.txt", b"0x3\n1\n2\n", "could not convert string to float: '0x3'"),
    "a member that is encrypted": ("l.npz", encrypted(npz(arr_1=COLUMN)), "cannot be read as numbers"),
    "a member that is packed otherwise": ("l.npz", other_method(npz(arr_1=COLUMN)), "cannot be read as numbers"),
    "a header that promises too much": (
        "l.npy",
        npy(np.arange(5)).replace(b"(5,), ", b"(5000000000000,), "),
        "cannot be read as numbers",
    ),
    "a header without an end": ("l.npy", npy(np.arange(5)).replace(b"(5,), }", b"(5,),  "), "cannot be read"),
    "nothing": ("l.txt", b"# none\n", "an array of shape (0,)"),
}


@pytest.mark.parametrize(("name", "data"), READ.values(), ids=READ)
def test_what_can_be_read_in_one_way_is_read(tmp_path: Path, name: str, data: bytes):
    path = tmp_path / name
    path.write_bytes(data)
    labels = read_labels(str(path))
    assert labels.dtype == np.int64
    assert labels.tolist()[:3] == [3, 1, 2]


@pytest.mark.parametrize(("name", "data", "found"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_is_refused_with_what_was_found(tmp_path: Path, name: str, data: bytes, found: str):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(RequestError) as refusal:
        read_labels(str(path))
    assert found in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_list_may_end_in_a_comma():
    assert read_labels("1,2,").tolist() == [1, 2]
    assert read_labels("7").tolist() == [7]
    for text in ("1,,2", ",", "1,2,,"):
        with pytest.raises(RequestError):
            read_labels(text)


def test_a_long_list_is_not_repeated_in_what_is_wrong_with_it():
    with pytest.raises(RequestError) as refusal:
        read_labels(",".join(map(str, range(50_000))) + ",-")
    assert len(str(refusal.value)) < 500
