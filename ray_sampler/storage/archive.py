"""The npz archive, streamed: one forward pass over the fragments, in memory that does not grow with N.

All of its bytes but the images and labels follow from the layout, which follows from the fragments' records:
CRC-32s of consecutive parts combine into the CRC-32 of the whole. So the headers are right when they are first
written, and no store needs to seek.
"""

from __future__ import annotations

import functools
import io
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np

from ray_sampler.config import RunError
from ray_sampler.storage.coverage import Piece, missing
from ray_sampler.storage.fragment import DamagedFragment, Fragment, FragmentName, Record, Samples
from ray_sampler.storage.run_dir import RunDir

CRC32_POLYNOMIAL = 0xEDB88320
"""Of CRC-32, with the bits reflected: x^0 is the highest bit."""

READ_AHEAD = 3
"""Fragments that are read while one is written."""

CHUNK_BYTES = 8 * 2**20


class DamagedPiece(Exception):
    """A fragment that the archive needs is damaged, gone or not the one whose record was given."""

    def __init__(self, fragment: FragmentName, reason: str, changed: bool = False) -> None:
        super().__init__(f"{fragment.filename}: {reason}")
        self.fragment = fragment
        self.reason = reason
        self.changed = changed
        """Whether it is whole by itself, but of other content than the record says: read its record again."""


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
    """One array of the archive, with what stands before its values."""

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

    @property
    def labelled(self) -> bool:
        return self.label_crc32 is not None

    @functools.cached_property
    def _members_and_directory(self) -> tuple[list[Member], bytes]:
        arrays: list[tuple[str, str, tuple[int, ...], int, int]] = [
            ("arr_0.npy", "|u1", (self.num_samples, *self.image_shape), 1, self.image_crc32)
        ]
        if self.label_crc32 is not None:
            arrays.append(("arr_1.npy", "<i8", (self.num_samples,), 8, self.label_crc32))
        members, infos, offset = [], [], 0
        for name, descr, shape, itemsize, values_crc32 in arrays:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
            npy = header.getvalue()
            size = int(np.prod(shape, dtype=np.int64)) * itemsize
            npy_crc32 = zlib.crc32(npy)
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


def lay_out(
    run_dir: RunDir,
    pieces: Sequence[Piece],
    records: Mapping[FragmentName, Record],
    num_samples: int,
    image_shape: tuple[int, int, int],
    labelled: bool,
    fingerprint: str | None,
) -> ArchiveLayout:
    """The layout of the archive that `pieces` make; only fragments of which a part is used are read.

    Raises:
        DamagedPiece: a fragment is damaged, gone, or of other images than the archive's.
        RunError: the pieces leave samples out.
    """
    gaps = missing(pieces, num_samples)
    if gaps:
        raise RunError(f"samples {gaps[0][0]} to {gaps[0][1]} are missing; run the same command again")
    image_bytes = int(np.prod(image_shape))
    parts = {piece: record_checksums(piece, records, image_shape, labelled) for piece in pieces}
    partial = [piece for piece in pieces if parts[piece] is None]
    for piece, fragment in read_pieces(run_dir, partial, records, fingerprint):
        images, labels = piece_values(piece, fragment)
        parts[piece] = zlib.crc32(images), zlib.crc32(labels)
    image_crc32 = label_crc32 = 0
    for piece in pieces:
        image, label = parts[piece] or (0, 0)
        image_crc32 = crc32_combine(image_crc32, image, (piece.stop - piece.start) * image_bytes)
        label_crc32 = crc32_combine(label_crc32, label, (piece.stop - piece.start) * 8)
    return ArchiveLayout(num_samples, image_shape, image_crc32, label_crc32 if labelled else None)


def record_checksums(
    piece: Piece, records: Mapping[FragmentName, Record], image_shape: tuple[int, int, int], labelled: bool
) -> tuple[int, int] | None:
    """CRC-32 of a piece's images and labels if its fragment's record says them, None if it is a part only."""
    record = records.get(piece.fragment)
    if record is None:
        raise DamagedPiece(piece.fragment, "its record is not known", changed=True)
    if record.shape != tuple(image_shape) or record.conditional != labelled:
        raise DamagedPiece(piece.fragment, f"it holds {'labelled ' * record.conditional}images of {record.shape}")
    if (piece.start, piece.stop) != (record.start, record.stop):
        return None
    return record.crc32["image"], record.crc32.get("label_int64", 0)


def piece_values(piece: Piece, fragment: Fragment) -> tuple[memoryview, memoryview]:
    """The bytes of a piece's images, and of its labels as the archive holds them (int64)."""
    samples = piece_of(fragment.samples, piece)
    labels = np.empty(0, np.int64) if samples.labels is None else samples.labels.astype("<i8")
    return np.ascontiguousarray(samples.images).data.cast("B"), labels.data.cast("B")


def piece_of(samples: Samples, piece: Piece) -> Samples:
    part = slice(piece.start - samples.start, piece.stop - samples.start)
    return Samples(piece.start, samples.images[part], None if samples.labels is None else samples.labels[part])


def read_pieces(
    run_dir: RunDir, pieces: Sequence[Piece], records: Mapping[FragmentName, Record], fingerprint: str | None
) -> Iterator[tuple[Piece, Fragment]]:
    """Each piece with its fragment, in order, a few of them read ahead.

    Raises:
        DamagedPiece: a fragment fails its check, is gone, or differs from its record.
    """
    pool = ThreadPoolExecutor(READ_AHEAD)
    ahead: deque[tuple[Piece, Future[Fragment]]] = deque()
    try:
        for piece in [*pieces, *[None] * READ_AHEAD]:
            if piece is not None:
                ahead.append((piece, pool.submit(run_dir.read_fragment, piece.fragment, fingerprint)))
            if ahead and (piece is None or len(ahead) > READ_AHEAD):
                first, future = ahead.popleft()
                try:
                    fragment = future.result()
                except DamagedFragment as damage:
                    raise DamagedPiece(first.fragment, str(damage)) from damage
                if fragment.record != records[first.fragment]:
                    raise DamagedPiece(first.fragment, "it is not the one that was counted on", changed=True)
                del future
                yield first, fragment
                del fragment
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def merge(
    run_dir: RunDir,
    pieces: Sequence[Piece],
    records: Mapping[FragmentName, Record],
    num_samples: int,
    image_shape: tuple[int, int, int],
    labelled: bool,
    fingerprint: str | None,
    on_samples: Callable[[Samples], None] | None = None,
) -> ArchiveLayout:
    """Write the archive in one forward pass, every fragment checked on the way.

    Args:
        pieces: what `cover` gave; together they must be [0, num_samples).
        records: of every fragment in `pieces`.
        image_shape: (H, W, C).
        labelled: whether the archive has arr_1.
        fingerprint: of the run.
        on_samples: called with the samples of each piece.

    Raises:
        DamagedPiece: a fragment is damaged, gone or changed. No archive was written.
        RunError: the pieces leave samples out, or the store failed. No archive was written.
    """
    layout = lay_out(run_dir, pieces, records, num_samples, image_shape, labelled, fingerprint)
    name = run_dir.archive_name(num_samples, image_shape)
    with tempfile.TemporaryFile() as spool, run_dir.stage_archive(name, layout.size) as file:
        images_member = layout.members[0]
        file.write(images_member.header)
        crc32 = images_member.npy_crc32
        for piece, fragment in read_pieces(run_dir, pieces, records, fingerprint):
            images, labels = piece_values(piece, fragment)
            for offset in range(0, len(images), CHUNK_BYTES):
                file.write(images[offset : offset + CHUNK_BYTES])
            crc32 = zlib.crc32(images, crc32)
            spool.write(labels)
            if on_samples:
                on_samples(piece_of(fragment.samples, piece))
            del images, labels, fragment
        require_crc32(crc32, images_member)
        for labels_member in layout.members[1:]:
            file.write(labels_member.header)
            crc32 = labels_member.npy_crc32
            spool.seek(0)
            while chunk := spool.read(CHUNK_BYTES):
                file.write(chunk)
                crc32 = zlib.crc32(chunk, crc32)
            require_crc32(crc32, labels_member)
        file.write(layout.directory)
    return layout


def require_crc32(crc32: int, member: Member) -> None:
    if crc32 != member.crc32:
        raise RunError("the archive's CRC-32 differs from its fragments'; it was discarded: run the same command again")


def archive_intact(run_dir: RunDir, layout: ArchiveLayout) -> bool:
    """Whether the archive is there, whole and the one that `layout` describes; every byte is read."""
    try:
        with run_dir.open_file(run_dir.archive_name(layout.num_samples, layout.image_shape)) as file:
            for member in layout.members:
                if file.read(len(member.header)) != member.header:
                    return False
                if values_crc32(file, member.size, member.npy_crc32) != member.crc32:
                    return False
            return file.read(len(layout.directory) + 1) == layout.directory
    except FileNotFoundError:
        return False


def values_crc32(file: IO[bytes], size: int, crc32: int) -> int | None:
    """CRC-32 going on from `crc32` over the next `size` bytes, None if there are fewer."""
    while size:
        chunk = file.read(min(size, CHUNK_BYTES))
        if not chunk:
            return None
        crc32 = zlib.crc32(chunk, crc32)
        size -= len(chunk)
    return crc32
