"""All bytes of an npz archive but its images and labels.

They follow from the fragments' records: CRC-32s of consecutive parts combine into the CRC-32 of the whole. So the
headers are right when they are first written, and no store needs to seek.
"""

from __future__ import annotations

import functools
import io
import zipfile
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

CRC32_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, with the bits reflected: x^0 is the highest bit."""


def multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2) modulo CRC-32's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (CRC32_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=1024)
def shift_operator(length: int) -> int:
    """x^(8 length): what a CRC-32 is multiplied by when `length` bytes follow."""
    result, power = 1 << 31, 1 << 23
    while length:
        if length & 1:
            result = multiply(result, power)
        power = multiply(power, power)
        length >>= 1
    return result


def crc32_combine(crc1: int, crc2: int, len2: int) -> int:
    """CRC-32 of two byte strings in a row, from the CRC-32 of each and the length of the second."""
    return multiply(shift_operator(len2), crc1) ^ crc2


class Member(NamedTuple):
    """One array of the archive, with what precedes its values."""

    header: bytes
    """The zip's local header and the npy header."""
    size: int
    """Bytes of the values."""
    npy_crc32: int
    """Of the npy header."""
    crc32: int
    """Of the npy header and the values."""


class Directory(io.BytesIO):
    """What a zip writes from `offset` on."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset

    def tell(self) -> int:
        return super().tell() + self.offset

    def seek(self, position: int, whence: int = 0) -> int:
        return super().seek(position - self.offset if whence == 0 else position, whence) + self.offset


@dataclass(frozen=True)
class ArchiveLayout:
    """Everything about an archive but its images and labels. Equal to what this Python's `np.savez` writes."""

    num_samples: int
    image_shape: tuple[int, int, int]
    """(H, W, C)."""
    image_crc32: int
    """Of all images' bytes."""
    label_crc32: int | None
    """Of all labels' bytes as int64; None when there are none."""
    dtype: str = "uint8"
    """Of the images: uint8 or float32."""

    @property
    def labelled(self) -> bool:
        return self.label_crc32 is not None

    @functools.cached_property
    def _members_and_directory(self) -> tuple[list[Member], bytes]:
        arrays: list[tuple[str, np.dtype, tuple[int, ...], int]] = [
            ("arr_0.npy", np.dtype(self.dtype), (self.num_samples, *self.image_shape), self.image_crc32)
        ]
        if self.label_crc32 is not None:
            arrays.append(("arr_1.npy", np.dtype("<i8"), (self.num_samples,), self.label_crc32))
        members, infos, offset = [], [], 0
        for name, dtype, shape, values_crc32 in arrays:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": dtype.str, "fortran_order": False, "shape": shape})
            npy = header.getvalue()
            size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            npy_crc32 = isal_zlib.crc32(npy)
            info = member_info(name)
            info.file_size = info.compress_size = len(npy) + size
            info.CRC = crc32_combine(npy_crc32, values_crc32, size)
            info.header_offset = offset
            members.append(Member(info.FileHeader(zip64=True) + npy, size, npy_crc32, info.CRC))
            infos.append(info)
            offset += len(members[-1].header) + size
        directory = Directory(offset)
        with zipfile.ZipFile(directory, "w") as archive:
            archive.filelist.extend(infos)
        return members, directory.getvalue()

    @property
    def members(self) -> list[Member]:
        """arr_0 and, if labelled, arr_1."""
        return self._members_and_directory[0]

    @property
    def directory(self) -> bytes:
        """The bytes after the last member."""
        return self._members_and_directory[1]

    @property
    def size(self) -> int:
        """Of the whole file, in bytes."""
        return sum(len(member.header) + member.size for member in self.members) + len(self.directory)


def member_info(name: str) -> zipfile.ZipInfo:
    """A zip entry as `np.savez` makes it, before its size and CRC-32 are known."""
    with zipfile.ZipFile(io.BytesIO(), "w") as scratch:
        with scratch.open(name, "w", force_zip64=True):
            pass
        return scratch.getinfo(name)
