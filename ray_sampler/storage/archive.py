"""The npz archive, streamed: one pass over the fragments, in memory that does not grow with N."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from ray_sampler.errors import RunError
from ray_sampler.storage.archive_layout import ArchiveLayout, crc32_combine
from ray_sampler.storage.ranges import Piece, missing
from ray_sampler.storage.record import Column, DamagedFragment, FragmentName, MissingFragment, Record, Samples
from ray_sampler.storage.run_dir import RunDir
from ray_sampler.storage.store import ColdFile, NotCommitted, Read, UnreadableFile

logger = logging.getLogger(__name__)

READERS = 4
"""Threads that read fragments ahead, at most."""

FRAGMENT_MEMORY = 128 * 2**20
"""Bytes of fragments that are held at once; fragments beyond a quarter of it have fewer readers, but at least one."""

COMMITS = 3
"""Times that an archive is written, at most, because a disk or store does not keep it."""

ZIP64_END, ZIP_END_BYTES = b"PK\x06\x06", 22
"""How the last records of a large zip file begin, and the size of that of a small one; neither holds a checksum."""

CHUNK_BYTES = 16 * 2**20
"""That are read or written at once: of a bucket, by one request."""


@dataclass(eq=False)
class DamagedPiece(Exception):
    """A fragment that the archive needs is damaged, gone or not the one whose record was given."""

    fragment: FragmentName
    reason: str
    changed: bool = False
    """Whether it is valid by itself, but differs from the record: read its record again."""
    gone: bool = False
    """Whether it is not seen from here."""

    def __str__(self) -> str:
        return f"{self.fragment.filename}: {self.reason}"


class Content(NamedTuple):
    """What the archive and its summary count on of a fragment."""

    image: Column
    image_crc32: int
    label_crc32: int | None
    """Of the labels as int64, as the archive holds them; None if there are none."""
    numerics: str
    """The numerics key of what computed it."""
    device: str
    seconds: float
    """That an actor took to compute it; 0.0 where its record does not say."""


def content_of(record: Record) -> Content:
    made = record.computed_by
    numerics, device = (str(made.get(name, "unknown")) for name in ("numerics_key", "device"))
    taken = made.get("seconds")
    seconds = taken if isinstance(taken, float) and 0 <= taken < math.inf else 0.0
    crcs = record.crc32["image"], record.crc32.get("label_int64")
    return Content(record.columns["image"], *crcs, numerics, device, seconds)


def lay_out(
    run_dir: RunDir,
    pieces: Sequence[Piece],
    contents: Mapping[FragmentName, Content],
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
    dtype = contents[pieces[0].fragment].image.dtype if pieces[0].fragment in contents else "uint8"
    column = Column(dtype, tuple(image_shape))
    image_crc32 = label_crc32 = 0
    for piece in pieces:
        image, label = piece_checksums(run_dir, piece, contents, column, labelled, fingerprint)
        image_crc32 = crc32_combine(image_crc32, image, (piece.stop - piece.start) * column.size)
        label_crc32 = crc32_combine(label_crc32, label, (piece.stop - piece.start) * 8)
    return ArchiveLayout(num_samples, image_shape, image_crc32, label_crc32 if labelled else None, dtype)


def piece_checksums(
    run_dir: RunDir,
    piece: Piece,
    contents: Mapping[FragmentName, Content],
    column: Column,
    labelled: bool,
    fingerprint: str | None,
) -> tuple[int, int]:
    """CRC-32 of a piece's images and labels: as its fragment's record says, or as read where it is a part only."""
    content = contents.get(piece.fragment)
    if content is None:
        raise DamagedPiece(piece.fragment, "its record is not known", changed=True)
    has_labels = content.label_crc32 is not None
    if content.image != column or has_labels != labelled:
        kind = f"{'labelled ' * has_labels}images of {content.image.shape}, {content.image.dtype}"
        raise DamagedPiece(piece.fragment, f"it holds {kind}")
    if (piece.start, piece.stop) == (piece.fragment.start, piece.fragment.stop):
        return content.image_crc32, content.label_crc32 or 0
    image = label = 0
    for part in parts_of(piece, read_groups(run_dir, piece, content, fingerprint)):
        image, label = isal_zlib.crc32(image_values(part), image), isal_zlib.crc32(label_values(part), label)
    return image, label


def read_groups(run_dir: RunDir, piece: Piece, content: Content, fingerprint: str | None) -> Iterator[Samples]:
    """All samples of a piece's fragment, group by group; they are proved when the last one was taken.

    Raises:
        DamagedPiece: the fragment fails its check, is gone, or differs from `content`.
    """
    try:
        record, groups = run_dir.ranges().read_groups(piece.fragment, fingerprint)
        if content_of(record)[:3] != content[:3]:  # whoever computed them
            raise DamagedPiece(piece.fragment, "it is not the one that was counted on", changed=True)
        yield from groups
    except DamagedFragment as damage:
        raise DamagedPiece(piece.fragment, str(damage), gone=isinstance(damage, MissingFragment)) from damage


def parts_of(piece: Piece, groups: Iterable[Samples]) -> Iterator[Samples]:
    """What of `groups` belongs to the piece."""
    for group in groups:
        start, stop = max(piece.start, group.start), min(piece.stop, group.stop)
        if start < stop:
            yield group.part(start, stop)


def image_values(samples: Samples) -> memoryview:
    return np.ascontiguousarray(samples.images).data.cast("B")


def label_values(samples: Samples) -> memoryview:
    """The bytes of labels as the archive holds them, int64."""
    labels = np.empty(0, np.int64) if samples.labels is None else samples.labels.astype("<i8")
    return labels.data.cast("B")


def readers_for(pieces: Sequence[Piece], image_bytes: int) -> int:
    """Threads that may each hold a fragment."""
    largest = max(piece.fragment.stop - piece.fragment.start for piece in pieces) * image_bytes
    return max(1, min(READERS, FRAGMENT_MEMORY // largest, len(pieces)))


def merge(
    run_dir: RunDir,
    pieces: Sequence[Piece],
    contents: Mapping[FragmentName, Content],
    num_samples: int,
    image_shape: tuple[int, int, int],
    labelled: bool,
    fingerprint: str | None,
    viewer: Callable[[], Callable[[Samples], None]] | None = None,
) -> ArchiveLayout:
    """Write the archive in one pass, every fragment checked on the way.

    No CRC-32 is taken of the archive itself: a fragment's is taken of the very bytes that are written, and must be
    the one from which the layout was made.

    Args:
        pieces: what `cover` gave; together they must be [0, num_samples).
        contents: of every fragment in `pieces`.
        image_shape: (H, W, C).
        labelled: whether the archive has arr_1.
        fingerprint: of the run.
        viewer: called at the start of each attempt for what looks at all samples, a few at a time, in order. What an
            attempt that failed had seen is seen again by the next one's.

    Raises:
        DamagedPiece: a fragment is damaged, gone or changed. No archive was written.
        RunError: the pieces leave samples out, or the store failed. No archive was written.
    """
    layout = lay_out(run_dir, pieces, contents, num_samples, image_shape, labelled, fingerprint)
    name = run_dir.archive_name(num_samples, image_shape)
    for left in reversed(range(COMMITS)):
        on_samples = viewer() if viewer else None
        with contextlib.closing(archive_chunks(run_dir, layout, pieces, contents, fingerprint, on_samples)) as chunks:
            try:
                run_dir.write_archive(name, chunks, layout.size)
                break
            except NotCommitted as error:
                if not left:
                    raise
                logger.warning("%s; the archive is written again", error)
    return layout


def archive_chunks(
    run_dir: RunDir,
    layout: ArchiveLayout,
    pieces: Sequence[Piece],
    contents: Mapping[FragmentName, Content],
    fingerprint: str | None,
    on_samples: Callable[[Samples], None] | None,
) -> Generator[bytes | memoryview, None, None]:
    """The bytes of the archive that `layout` describes, in order; arguments and errors as of `merge`.

    A fragment is read and checked before its first byte is given.
    """
    images_member, *labels_members = layout.members

    def read(piece: Piece) -> list[Samples]:
        return list(parts_of(piece, read_groups(run_dir, piece, contents[piece.fragment], fingerprint)))

    yield images_member.header
    with tempfile.TemporaryFile() as spool:
        for parts in ahead(readers_for(pieces, Column(layout.dtype, layout.image_shape).size), pieces, read):
            for part in parts:
                yield from cut(image_values(part))
                spool.write(label_values(part))
                if on_samples:
                    on_samples(part)
        spool.seek(0)
        for labels_member in labels_members:
            yield labels_member.header
            crc32 = labels_member.npy_crc32
            while chunk := spool.read(CHUNK_BYTES):
                yield chunk
                crc32 = isal_zlib.crc32(chunk, crc32)
            if crc32 != labels_member.crc32:
                raise RunError(
                    "the archive's CRC-32 differs from its fragments'; it was discarded: run the same command again"
                )
    yield layout.directory


def cut(values: memoryview) -> Iterator[memoryview]:
    return (values[start : start + CHUNK_BYTES] for start in range(0, len(values), CHUNK_BYTES))


def ahead(threads: int, pieces: Sequence[Piece], read: Callable[[Piece], list[Samples]]) -> Iterator[list[Samples]]:
    """What `read` gives for each piece, in order; as many as there are threads are read ahead."""
    pool = ThreadPoolExecutor(threads)
    reading: deque[Future[list[Samples]]] = deque()
    try:
        for piece in [*pieces, *[None] * threads]:
            if piece is not None:
                reading.append(pool.submit(read, piece))
            if reading and (piece is None or len(reading) > threads):
                yield reading.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def archive_intact(run_dir: RunDir, layout: ArchiveLayout) -> bool:
    """Whether the archive exists, complete and as `layout` describes it; every byte is read.

    Raises:
        RequestError, RunError: it cannot be read now, and is not lost; says why.
    """
    try:
        with run_dir.open_file(run_dir.archive_name(layout.num_samples, layout.image_shape)) as read:
            for member in layout.members:
                if read(len(member.header)) != member.header:
                    return False
                if values_crc32(read, member.size, member.npy_crc32) != member.crc32:
                    return False
            return read(len(layout.directory) + 1) == layout.directory
    except FileNotFoundError:
        return False
    except ColdFile:
        raise
    except UnreadableFile as error:
        logger.warning("%s; it counts as lost, and is written again", error)
        return False


def archive_complete(
    run_dir: RunDir, num_samples: int, image_shape: tuple[int, int, int], labelled: bool, dtype: str
) -> bool:
    """Whether the archive that is there ends where it must, from its last bytes, which say how long it is."""
    layout = ArchiveLayout(num_samples, image_shape, 0, 0 if labelled else None, dtype)
    end = layout.directory[layout.directory.rfind(ZIP64_END) :] if ZIP64_END in layout.directory else b""
    end = end or layout.directory[-ZIP_END_BYTES:]
    return run_dir.read_end(run_dir.archive_name(num_samples, image_shape), len(end)) == end


def values_crc32(read: Read, size: int, crc32: int) -> int | None:
    """CRC-32 continued from `crc32` over the next `size` bytes, None if there are fewer."""
    while size:
        chunk = read(min(size, CHUNK_BYTES))
        if not chunk:
            return None
        crc32 = isal_zlib.crc32(chunk, crc32)
        size -= len(chunk)
    return crc32
