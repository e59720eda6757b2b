"""A folder on disk or in a bucket: whole files in, whole files out.

`LocalStore`, `S3Store` and `ObjectStore` have the same methods; `open_store` chooses one for a URL.
All keep one promise: under its name a file is complete or absent, whatever happens while it is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ray_sampler.errors import RunError

ABANDONED_SECONDS = 86400.0
"""Age at which an unfinished write has certainly been abandoned."""


class UnreadableFile(RunError):
    """A file that is there and cannot be read, however often it is tried."""


class ColdFile(UnreadableFile):
    """A file in an archive class of the store, from which it can be restored."""


class NoRoom(RunError):
    """The output takes nothing more, whoever writes: its disk or bucket is full, or a quota or limit is reached."""


class NotCommitted(RunError):
    """A file was written in pieces, and the disk or store does not keep it; written anew, it may."""


Chunks = Iterable[bytes | memoryview]
"""The bytes of a file, piece by piece."""


class Entry(NamedTuple):
    """A name in a folder."""

    name: str
    is_file: bool
    """Whether it is a plain file: False for folders, links and whatever else there is."""
    modified: float | None = None
    """Unix time of its last write, in seconds; None where the store does not say."""


class Readable(Protocol):
    """A file that is read piece by piece."""

    def read(self, size: int, /) -> bytes:
        """The next `size` bytes, fewer at the end."""


@dataclass(frozen=True)
class OpenFile:
    """A file of an object store that is read piece by piece."""

    read: Callable[[int], bytes]


class Store(Protocol):
    """A folder; paths are relative to it, with slashes."""

    url: str
    """For messages: without a credential."""

    def read(self, path: str) -> bytes | None:
        """The whole file as it was at one moment, None where there is none."""

    def read_end(self, path: str, size: int) -> bytes | None:
        """The last `size` bytes of a file, or all of a smaller one; None where there is none."""

    def put(self, path: str, data: bytes) -> None:
        """Write or replace a whole file."""

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole file unless there is one; whether it was written."""

    def list(self, path: str, times: bool = False) -> list[Entry]:
        """The content of a folder, without unfinished writes; empty if there is no folder.

        When each was written is sure to be said with `times` only: a disk has to be asked for every file.
        """

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder of this store, if it is still there."""

    def remove(self, path: str) -> None:
        """Delete a file, link or folder with all it holds, if it is there."""

    def upload(self, path: str, chunks: Chunks, size: int) -> None:
        """Write a file of about `size` bytes from its pieces, in order. It has its name once the last one is written.

        Raises:
            NotCommitted: the store did not keep it. As after any exception, those of `chunks` among them, what was
                written is discarded.
        """

    def open(self, path: str) -> AbstractContextManager[Readable]:
        """Read piece by piece.

        Raises:
            FileNotFoundError: there is no such file.
        """

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        """Remove the unfinished writes in a folder that were begun so long ago that they must be abandoned."""


def unfinished_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(6)}.tmp"


def is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def is_leftover(name: str) -> bool:
    """Whether a mount keeps a deleted file under this name because some process still has it open."""
    return name.startswith((".nfs", ".fuse_hidden"))
