"""What disks and mounts answer: what may pass, what they do not support, and the sentence for the rest."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.retry import persist
from ray_sampler.storage.store import NoRoom, UnreadableFile

PASSING_ERRNOS = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNABORTED}
PASSING_ERRNOS |= {errno.ENOTCONN, errno.EHOSTDOWN, errno.ENETDOWN, errno.ENETRESET, errno.EREMOTEIO}
PASSING_ERRNOS |= {errno.ESHUTDOWN, errno.ECOMM, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}
"""What a shared disk answers while its server or the network fails for the moment: Lustre says ESHUTDOWN where it has
cut a client off, BeeGFS ECOMM."""

UNREADABLE_ERRNOS = {errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ, errno.ESTALE}
"""What remains of a file on a part of a disk that has failed."""

UNSUPPORTED_ERRNOS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY}

AGAIN = "run the same command again"

Result = TypeVar("Result")


def is_passing(error: BaseException) -> bool:
    """Whether a disk may do the same a moment later."""
    return isinstance(error, OSError) and error.errno in PASSING_ERRNOS


def brief(error: BaseException) -> str:
    number = error.errno if isinstance(error, OSError) and error.errno else None
    return errno.errorcode.get(number, str(number)) if number else type(error).__name__


def retried(request: Callable[[], Result], where: str) -> Result:
    """What `request` gives, tried again while the disk fails in a way that passes."""
    return persist(request, is_passing, brief, f"the disk of {where}")


READING = ("read", "list")
"""What also those do who may not write."""

CAUSES: dict[int, tuple[type[RequestError | RunError], str]] = {
    errno.EDQUOT: (NoRoom, f"your quota on that disk is used up; free some space and {AGAIN}"),
    errno.ENOSPC: (NoRoom, f"the disk is full, or has no inodes left (see `df -i`); free some space and {AGAIN}"),
    errno.EFBIG: (
        NoRoom,
        "the file is larger than this process (`ulimit -f`) or that disk (FAT: 4 GB) allows; raise the limit, or "
        f"choose an output on another disk, and {AGAIN}",
    ),
    errno.EMFILE: (RunError, f"this process has too many files open; raise `ulimit -n` and {AGAIN}"),
    errno.ENFILE: (RunError, f"this machine has too many files open; raise fs.file-max and {AGAIN}"),
    errno.EROFS: (RequestError, "the file system is read-only; choose another output"),
    errno.ENOTDIR: (RequestError, "a file is in the place of a folder; choose another output"),
    errno.EEXIST: (RequestError, "a file is in the place of a folder; choose another output"),
    errno.ELOOP: (RequestError, "a link in it leads back to itself; choose another output"),
    errno.ENAMETOOLONG: (RequestError, "a name in it is too long for that disk; choose a shorter one"),
    errno.EACCES: (RequestError, "permission denied; fix the permissions or choose another output"),
    errno.EPERM: (RequestError, "permission denied; fix the permissions or choose another output"),
}
"""What an error means, and what to do about it."""


def failure(error: OSError, action: str, path: str) -> RequestError | RunError:
    """One sentence for what the operating system said."""
    number = error.errno or 0
    cause = brief(error) if number else error.strerror or type(error).__name__
    if number in (errno.EACCES, errno.EPERM) and action in READING:
        return RequestError(f"cannot {action} {path}: permission denied; ask its owner for the right to read it")
    if number == errno.ELOOP and Path(path).is_symlink():
        return RunError(f"cannot {action} {path}: a link is in the place of the run's file; delete it and {AGAIN}")
    if number in CAUSES:
        kind, sentence = CAUSES[number]
        return kind(f"cannot {action} {path}: {sentence}")
    if number in UNSUPPORTED_ERRNOS:
        return RequestError(
            f"cannot {action} {path}: this mount lacks what an output needs, such as renaming files ({cause}); choose "
            "another folder, or the URL of the bucket behind the mount"
        )
    if action == "read" and number in UNREADABLE_ERRNOS:
        return UnreadableFile(f"cannot read {path}: the disk cannot read it ({cause}); check the disk and {AGAIN}")
    return RunError(f"cannot {action} {path}: {error.strerror or cause} ({cause}); check the disk and {AGAIN}")


def rename_again(source: Path, target: Path) -> None:
    """Rename a file in place of whatever has the name, tried again while the disk fails for the moment."""
    before = retried(lambda: os.stat(source), str(source))

    def once() -> None:
        try:
            os.replace(source, target)
        except FileNotFoundError:
            # Done by an attempt whose answer was lost: the renamed file is there.
            after = os.stat(target)
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise

    retried(once, str(target))


def write_on(descriptor: int, data: bytes | memoryview, offset: int, where: str) -> int:
    """Write at the end of a file, all of it; returns where that is then.

    A write that fails for the moment is tried again from where it came to. The disk begins at once to take what was
    written, so that a sync at the end finds little left to do.
    """
    left, reached = memoryview(data).cast("B"), offset
    while left:
        done = retried(lambda: os.pwrite(descriptor, left, reached), where)  # noqa: B023 - it is called here only
        reached, left = reached + done, left[done:]
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, reached - offset, os.POSIX_FADV_DONTNEED)
    return reached


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the mount can: some refuse, each in its own way."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
