"""A folder on disk or in a bucket: whole files in, whole files out.

`LocalStore` and `ObjectStore`, with those for S3, Google and Azure, have the same methods; `ObjectStore` says what they
do, and `open_store` chooses one for a URL.
All keep one promise: under its name a file is complete or absent, whatever happens while it is written.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import NamedTuple

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


Read = Callable[[int], bytes]
"""The next so many bytes of a file, fewer at the end."""


def unfinished_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(6)}.tmp"


def is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def is_leftover(name: str) -> bool:
    """Whether a mount keeps a deleted file under this name because some process still has it open."""
    return name.startswith((".nfs", ".fuse_hidden"))
