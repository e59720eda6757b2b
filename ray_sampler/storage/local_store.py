"""A folder on a local disk or a mounted one."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from ray_sampler.errors import RequestError
from ray_sampler.storage.disk import (
    failure,
    is_passing,
    rename_again,
    retried,
    sync_folder,
    write_on,
)
from ray_sampler.storage.store import (
    ABANDONED_SECONDS,
    Chunks,
    Entry,
    NotCommitted,
    Read,
    is_leftover,
    is_unfinished,
    unfinished_name,
)

logger = logging.getLogger(__name__)

QUIET_SECONDS = 30.0
"""Age of the last write to an unfinished file at which its lock is asked whether somebody is still at it: some mounts
do not show one machine's locks to another."""

Result = TypeVar("Result")


class LinkRefused(RequestError):
    """A link is in the place of a folder of the run."""


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
            raise failure(error, action, f"{self.url}/{path}".rstrip("/")) from error

    def _try(self, action: str, path: str, request: Callable[[], Result]) -> Result:
        """What `request` gives, tried again where that may help; its failure is told in one sentence."""
        with self._explained(action, path):
            return retried(request, f"{self.url}/{path}".rstrip("/"))

    def is_file(self) -> bool:
        """Whether something other than a folder is in this folder's place."""
        return self._try("read", "", lambda: self.root.exists() and not self.root.is_dir())

    def _inside(self, folder: str) -> Path:
        """A folder of this one, or itself.

        A link on the way would lead elsewhere, where whoever may write here could have files read, moved and replaced.

        Raises:
            LinkRefused: there is one.
        """
        place = self.root
        for name in Path(folder).parts:
            place /= name
            if name == ".." or self._try("read", folder, place.is_symlink):
                raise LinkRefused(
                    f"{place} is a link; a run's folders must be its own: put a folder there, or choose another output"
                )
        return place

    def _file(self, path: str) -> Path:
        folder, _, name = path.rpartition("/")
        return self._inside(folder) / name

    def read(self, path: str) -> bytes | None:
        return self._try("read", path, functools.partial(end_of, self._file(path), sys.maxsize))

    def read_end(self, path: str, size: int) -> bytes | None:
        return self._try("read", path, functools.partial(end_of, self._file(path), size))

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        """A hidden name beside a file's, under which nothing is left."""
        temporary = target.parent / unfinished_name(target.name)
        try:
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _write_whole(self, target: Path, data: bytes, place: Callable[[Path], Result]) -> Result:
        """Write and sync a hidden file, and have `place` give it its name.

        If any step fails, all of them must be repeated: after a failed sync the content of the disk is unknown.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._temporary(target) as temporary:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            placed = place(temporary)
            sync_folder(target.parent)
            return placed

    def put(self, path: str, data: bytes) -> None:
        target = self._file(path)
        self._try("write", path, lambda: self._write_whole(target, data, lambda written: os.replace(written, target)))

    def create(self, path: str, data: bytes) -> bool:
        target = self._file(path)

        def place(written: Path) -> bool:
            try:
                os.link(written, target)
            except FileExistsError:
                return False
            except OSError:
                # Some mounts have no hard links, and refuse them in one way or another: the check and the rename are
                # two steps, and the caller reads back. What else is wrong, the rename will say.
                if os.path.lexists(target):
                    return False
                os.replace(written, target)
            return True

        return self._try("write", path, lambda: self._write_whole(target, data, place))

    def list(self, path: str, times: bool = False) -> list[Entry]:
        folder = self._inside(path)

        def once() -> list[Entry]:
            found = []
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for each in entries:
                    if is_unfinished(each.name) or is_leftover(each.name):
                        continue
                    with contextlib.suppress(FileNotFoundError):  # it has gone meanwhile
                        modified = each.stat(follow_symlinks=False).st_mtime if times else None
                        found.append(Entry(each.name, each.is_file(follow_symlinks=False), modified))
            return found

        return self._try("list", path, once)

    def move(self, source: str, target: str) -> None:
        old, new = self._file(source), self._file(target)

        def once() -> None:
            new.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                os.replace(old, new)

        self._try("move", source, once)

    def remove(self, path: str) -> None:
        target = self._file(path)

        def once() -> None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if stat.S_ISDIR(target.lstat().st_mode):
                    remove_tree(target)
                else:
                    target.unlink()

        self._try("delete", path, once)

    def upload(self, path: str, chunks: Chunks, size: int) -> None:
        target = self._file(path)
        with self._temporary(target) as temporary:
            self._try("write", path, lambda: target.parent.mkdir(parents=True, exist_ok=True))
            opened = self._try("write", path, lambda: open(temporary, "xb", buffering=0))  # noqa: SIM115 - closed below
            with closed_quietly(opened) as file:
                lock(file.fileno())
                reached = 0
                for chunk in chunks:
                    with self._explained("write", path):
                        reached = write_on(file.fileno(), chunk, reached, str(target))
                with self._explained("write", path):
                    try:
                        os.fsync(file.fileno())
                        file.close()
                    except OSError as error:
                        if is_passing(error):  # the content of the disk is now unknown
                            raise NotCommitted(str(failure(error, "write", str(target)))) from error
                        raise
                    rename_again(temporary, target)
                    sync_folder(target.parent)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Read]:
        target = self._file(path)
        descriptor = self._try("read", path, lambda: None if target.is_symlink() else open_descriptor(target))
        if descriptor is None:
            raise FileNotFoundError(f"{target} is not there, or a link")
        reached = 0

        def read(size: int) -> bytes:
            nonlocal reached
            data = self._try("read", path, lambda: os.pread(descriptor, size, reached))
            reached += len(data)
            return data

        try:
            yield read
        finally:
            os.close(descriptor)

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        place = self._inside(folder)
        try:
            with os.scandir(place) as entries:
                unfinished = [entry.path for entry in entries if is_unfinished(entry.name)]
        except OSError as error:
            logger.info("abandoned files in %s could not be listed (%s)", place, error)
            return
        for name in unfinished:
            with contextlib.suppress(OSError):
                age = time.time() - os.lstat(name).st_mtime
                if age > seconds or (age > QUIET_SECONDS and is_unlocked(name)):
                    os.unlink(name)


def open_descriptor(target: Path) -> int | None:
    """A descriptor to read a file, None where there is none.

    A link is another file's name: whoever put it there would decide what is read, so it is refused (ELOOP).
    """
    try:
        return os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None


def end_of(target: Path, size: int) -> bytes | None:
    """The last `size` bytes of a file, or all of a smaller one; None where there is none."""
    descriptor = open_descriptor(target)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        start = max(0, os.fstat(descriptor).st_size - size)
        file.seek(start)
        return file.read()


def remove_tree(folder: Path) -> None:
    """Delete a folder with all it holds; what a mount keeps of deleted files that are open goes when they are closed.

    Raises:
        OSError: something else cannot be deleted.
    """

    def go_on(function: object, path: str, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError) or is_leftover(os.path.basename(path)):
            return
        if os.path.isdir(path) and all(map(is_leftover, os.listdir(path))):
            return
        raise error

    if sys.version_info >= (3, 12):
        shutil.rmtree(folder, onexc=go_on)
    else:
        shutil.rmtree(folder, onerror=lambda function, path, info: go_on(function, path, info[1]))


@contextlib.contextmanager
def closed_quietly(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Close a file at the end, where an error would hide the one that brought it there."""
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def lock(descriptor: int) -> bool:
    """Whether this process has a file's lock now, which it loses when it ends, however it does."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another has it, or this mount knows no locks
        return False
    return True


def is_unlocked(path: str) -> bool:
    """Whether this is a file that is not locked."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return lock(descriptor)
    finally:
        os.close(descriptor)
