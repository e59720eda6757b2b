"""A folder on any filesystem that fsspec knows. S3, Google and Azure have separate modules."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

import fsspec

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.failures import NO_BUCKET_WORDS, brief, code, failure, families, is_passing, status
from ray_sampler.storage.retry import persist
from ray_sampler.storage.store import (
    ABANDONED_SECONDS,
    Chunks,
    Entry,
    Read,
    is_unfinished,
    unfinished_name,
)

logger = logging.getLogger(__name__)

PART_BYTES = 16 * 2**20

CREATING = threading.Lock()
"""memory:// looks for a file and then writes it: two threads that create one would both succeed."""

Result = TypeVar("Result")


class ObjectStore:
    """A folder in a bucket; paths are relative to it, with slashes. Every method tries again what may pass."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.url = url
        """For messages: without a credential."""

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except families() as error:
            raise self._failure(error, action, f"{self.url}/{path}".rstrip("/")) from None

    def _failure(self, error: BaseException, action: str, url: str) -> RequestError | RunError:
        return failure(error, action, url)

    def _retry(self, request: Callable[[], Result]) -> Result:
        return persist(request, is_passing, brief, f"the store of {self.url}")

    def _unless_absent(self, request: Callable[[], Result]) -> Result | None:
        """The result of a request, retried where that helps; None if the file does not exist."""
        try:
            return self._retry(request)
        except FileNotFoundError as error:
            if code(error) in NO_BUCKET_WORDS:
                raise
            return None

    def _fetch(self, path: str) -> bytes:
        """The whole file, in one request."""
        return bytes(self.filesystem.cat_file(self._full(path)))

    def read(self, path: str) -> bytes | None:
        """The whole file as it was at one moment, None where there is none."""
        with self._explained("read", path):
            return self._unless_absent(lambda: self._fetch(path))

    def read_end(self, path: str, size: int) -> bytes | None:
        """The last `size` bytes of a file, or all of a smaller one; None where there is none."""
        with self._explained("read", path):
            return self._unless_absent(lambda: self._cat_end(self._full(path), size))

    def _cat_end(self, full: str, size: int) -> bytes:
        there: int = self.filesystem.info(full)["size"]
        return bytes(self.filesystem.cat_file(full, start=max(0, there - size), end=there))

    def put(self, path: str, data: bytes) -> None:
        """Write or replace a whole file."""
        with self._explained("write", path):
            self._retry(lambda: self._pipe(path, data))

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        """Write a whole file in one request, with `create` only if there is none."""
        self.filesystem.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
        if not create:
            self.filesystem.pipe_file(self._full(path), data)
            return
        with CREATING:
            self.filesystem.pipe_file(self._full(path), data, mode="create")

    def create(self, path: str, data: bytes) -> bool:
        """Write a whole file unless there is one; whether it was written."""
        # Some stores take a conditional put and ignore the condition; looking first leaves them a moment's race.
        if self.read(path) is not None:
            return False
        with self._explained("write", path):
            try:
                self._retry(lambda: self._pipe(path, data, create=True))
            except FileExistsError:
                return False
            except families() as error:
                if status(error) == 412 or code(error) == "PreconditionFailed":
                    return False
                if getattr(error, "errno", None) != errno.ENOSYS and status(error) not in (400, 501):
                    raise
                # The store may not support conditions: the caller reads the file back.
                self._retry(lambda: self._pipe(path, data))
            return True

    def list(self, path: str, times: bool = False) -> list[Entry]:
        """The content of a folder, without unfinished writes; empty if there is no folder.

        When each was written is sure to be said with `times` only: a disk has to be asked for every file.
        """
        folder = self._full(path).rstrip("/")
        with self._explained("list", path):
            found = self._unless_absent(lambda: self.filesystem.ls(folder, detail=True)) or []
        entries = []
        for info in found:
            name = info["name"].rstrip("/")
            if name.strip("/") != folder.strip("/"):
                entries.append(Entry(name.rpartition("/")[2], info["type"] == "file", modified(info)))
        return [entry for entry in entries if entry.name and not is_unfinished(entry.name)]

    def move(self, source: str, target: str) -> None:
        """Rename a file or folder of this store, if it is still there."""
        with self._explained("move", source), contextlib.suppress(FileNotFoundError):
            is_folder = self._retry(lambda: self.filesystem.isdir(self._full(source)))
            self.filesystem.makedirs(self._full(target).rpartition("/")[0], exist_ok=True)
            self._retry(lambda: self.filesystem.mv(self._full(source), self._full(target), recursive=is_folder))

    def remove(self, path: str) -> None:
        """Delete a file, link or folder with all it holds, if it is there."""
        with self._explained("delete", path), contextlib.suppress(FileNotFoundError):
            self._retry(lambda: self.filesystem.rm(self._full(path), recursive=True))

    def upload(self, path: str, chunks: Chunks, size: int) -> None:
        """Write a file of about `size` bytes from its pieces, in order. It has its name once the last one is written.

        Raises:
            NotCommitted: the store did not keep it. As after any exception, those of `chunks` among them, what was
                written is discarded.
        """
        if "memory" in self.filesystem.protocol:
            self.put(path, b"".join(chunks))
            return
        folder, slash, name = path.rpartition("/")
        target = self._full(f"{folder}{slash}{unfinished_name(name)}")
        with self._explained("write", path):
            self.filesystem.makedirs(self._full(folder), exist_ok=True)
            file = self.filesystem.open(target, "wb")
        try:
            for chunk in chunks:
                with self._explained("write", path):
                    file.write(chunk)
            with self._explained("write", path):
                file.close()
                self.filesystem.mv(target, self._full(path))
        except BaseException:
            try:
                file.close()
                self.filesystem.rm(target)
            except families() as error:
                logger.warning("an unfinished file in %s could not be removed (%s)", self.url, type(error).__name__)
            raise

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Read]:
        """Read piece by piece.

        Raises:
            FileNotFoundError: there is no such file.
        """
        with self._explained("read", path):
            options = {"block_size": PART_BYTES, "cache_type": "readahead"}
            file = self._unless_absent(lambda: self.filesystem.open(self._full(path), "rb", **options))
        if file is None:
            raise FileNotFoundError(f"{self.url}/{path}")

        def read(size: int) -> bytes:
            # What cannot be fetched moves nothing: the position is that of the bytes that were given.
            with self._explained("read", path):
                return bytes(self._retry(lambda: file.read(size)))

        with file:
            yield read

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        """Nothing is left of uploads that were abandoned: these stores drop them after a while by themselves."""


def modified(info: Mapping[str, Any]) -> float | None:
    """When a file was last written, as unix time, if the listing has it: filesystems use different names for it."""
    found = next((info[key] for key in ("mtime", "last_modified", "LastModified", "created") if key in info), None)
    if isinstance(found, datetime):
        return found.timestamp()
    return found if isinstance(found, float) else None
