"""A folder on a local disk or a mounted one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.store import ABANDONED_SECONDS, Entry, StagedFile, is_unfinished, unfinished_name

QUIET_SECONDS = 30.0
"""Age of the last write to an unfinished file at which its lock is asked whether somebody is still at it: some mounts
do not show one machine's locks to another."""


def local_failure(error: OSError, action: str, path: str) -> RequestError | RunError:
    """One sentence for what the operating system said."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(f"cannot {action} {path}: the disk is full; free some space and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return RequestError(f"cannot {action} {path}: permission denied; choose an output that you may write")
    if error.errno == errno.EROFS:
        return RequestError(f"cannot {action} {path}: the file system is read-only; choose another output")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return RequestError(f"cannot {action} {path}: a file stands where a folder must be; choose another output")
    return RunError(f"cannot {action} {path}: {error.strerror or type(error).__name__}; run the same command again")


class LocalStore:
    """A folder on a local disk or a mounted one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise local_failure(error, action, f"{self.url}/{path}".rstrip("/")) from error

    def _inside(self, folder: str) -> Path:
        """A folder of this one, or itself.

        A link on the way would lead elsewhere, where whoever may write here could have files read, moved and replaced.

        Raises:
            RequestError: there is one.
        """
        place = self.root
        for name in Path(folder).parts:
            place /= name
            if name == ".." or place.is_symlink():
                raise RequestError(
                    f"{place} is a link; a run's folders must be its own: put a folder there, or choose another output"
                )
        return place

    def _file(self, path: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self._inside(folder) / name

    def read(self, path: str) -> bytes | None:
        with self._explained("read", path):
            try:
                # A link is another file's name: whoever put it there decides what is read.
                descriptor = os.open(self._file(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            with os.fdopen(descriptor, "rb") as file:
                if sys.platform == "linux":
                    # The disk reads all of it at once, not a little ahead of us.
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
                return file.read()

    def read_end(self, path: str, size: int) -> bytes | None:
        with self._explained("read", path):
            try:
                descriptor = os.open(self._file(path), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except (FileNotFoundError, NotADirectoryError):
                return None
            with os.fdopen(descriptor, "rb") as file:
                file.seek(max(0, os.fstat(descriptor).st_size - size))
                return file.read()

    def put(self, path: str, data: bytes) -> None:
        with self.stage(path, len(data)) as file:
            file.write(data)

    def create(self, path: str, data: bytes) -> bool:
        target = self._file(path)
        with self._explained("write", path):
            temporary = self._temporary(target)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                try:
                    os.link(temporary, target)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK):
                        raise
                    # No hard links here: the check and the rename are two steps, and the caller reads back.
                    if os.path.lexists(target):
                        return False
                    os.replace(temporary, target)
                sync_folder(target.parent)
                return True
            finally:
                temporary.unlink(missing_ok=True)

    def list(self, path: str, times: bool = False) -> list[Entry]:
        with self._explained("list", path):
            try:
                with os.scandir(self._inside(path)) as entries:
                    return [
                        Entry(
                            entry.name,
                            entry.is_file(follow_symlinks=False),
                            entry.stat(follow_symlinks=False).st_mtime if times else None,
                        )
                        for entry in entries
                        if not is_unfinished(entry.name)
                    ]
            except FileNotFoundError:
                return []

    def move(self, source: str, target: str) -> None:
        with self._explained("move", source):
            old, new = self._file(source), self._file(target)
            new.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(old, new)

    def remove(self, path: str) -> None:
        target = self._file(path)
        with self._explained("delete", path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if stat.S_ISDIR(target.lstat().st_mode):
                shutil.rmtree(target)
            else:
                target.unlink()

    @contextlib.contextmanager
    def stage(self, path: str, size: int) -> Iterator[StagedFile]:
        target = self._file(path)
        with self._explained("write", path):
            temporary = self._temporary(target)
            file = open(temporary, "xb")  # noqa: SIM115 - it outlives this block
            lock(file.fileno())

        def write(data: bytes | memoryview) -> None:
            with self._explained("write", path):
                file.write(data)

        def write_at(offset: int, data: bytes | memoryview) -> None:
            left = memoryview(data)
            with self._explained("write", path):
                while left:
                    done = os.pwrite(file.fileno(), left, offset)
                    if sys.platform == "linux":
                        # The disk begins now, so that the sync at the end finds little left to do.
                        os.posix_fadvise(file.fileno(), offset, done, os.POSIX_FADV_DONTNEED)
                    offset, left = offset + done, left[done:]

        try:
            yield StagedFile(write, write_at)
            with self._explained("write", path):
                file.flush()
                os.fsync(file.fileno())
                file.close()
                os.replace(temporary, target)
                sync_folder(target.parent)
        except BaseException:
            with contextlib.suppress(OSError):  # closing flushes, and a full disk says so twice
                file.close()
            temporary.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        target = self._file(path)
        if target.is_symlink():
            raise FileNotFoundError(f"{target} is a link")
        with open(target, "rb") as file:
            yield file

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        with self._explained("clean", folder), contextlib.suppress(FileNotFoundError):
            with os.scandir(self._inside(folder)) as entries:
                unfinished = [entry.path for entry in entries if is_unfinished(entry.name)]
            for name in unfinished:
                with contextlib.suppress(FileNotFoundError):
                    age = time.time() - os.lstat(name).st_mtime
                    if age > seconds or (age > QUIET_SECONDS and is_unlocked(name)):
                        os.unlink(name)

    def _temporary(self, target: Path) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent / unfinished_name(target.name)


def lock(descriptor: int) -> bool:
    """Whether this process has a file's lock now, which it loses when it ends, however it does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or this mount knows no locks
        return False
    return True


def is_unlocked(path: str) -> bool:
    """Whether this is a file whose lock nobody holds."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return lock(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some mounts cannot sync a folder
            raise
    finally:
        os.close(descriptor)
