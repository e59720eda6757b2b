"""A folder in a bucket, request by request, so that each one can be tried again by itself.

What fsspec offers above single requests (files, listings, moves) holds state between them that a failure in the middle
leaves undefined: a part may be sent twice, a deletion fail unseen. S3, Google and Azure each say here what their
requests are; in what order they are made is said once.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from ray_sampler.storage import object_store
from ray_sampler.storage.failures import AGAIN, NO_BUCKET_WORDS, brief, code, families
from ray_sampler.storage.object_store import ObjectStore, logger
from ray_sampler.storage.store import Chunks, Entry, NotCommitted, Read, is_unfinished

PARTS = 9000
"""S3 takes 10,000 parts of an object; this leaves room."""

PARTS_AT_ONCE = 4
DELETES_AT_ONCE = 16

KEYS_HELD = 10_000
"""Deletions that wait at one time."""


class Object(NamedTuple):
    """An object in a bucket."""

    key: str
    modified: float
    """Unix time of its last write, in seconds."""


class Page(NamedTuple):
    """One page of a listing."""

    objects: list[Object]
    folders: list[str]
    """Beginnings of keys up to and with the next slash, where a page is asked for by folder."""
    marker: str | None
    """What the request for the next page names; None at the end."""


class Version(NamedTuple):
    """The object at a key."""

    size: int
    tag: str
    """Changes with every write."""


class BucketStore(ObjectStore):
    """A folder in a bucket; every transient failure of a request is retried.

    The methods that begin with `_request` are single requests. They raise FileNotFoundError where the
    object or upload does not exist.
    """

    bucket: str
    prefix: str
    parts_at_once = PARTS_AT_ONCE

    @abstractmethod
    def _request_read(self, key: str, start: int, stop: int, version: Version) -> bytes:
        """Bytes [start, stop) of that version of an object."""

    @abstractmethod
    def _request_version(self, key: str) -> Version:
        """Size and tag of an object."""

    @abstractmethod
    def _request_page(self, prefix: str, by_folder: bool, marker: str | None) -> Page:
        """A page of the keys that begin with `prefix`."""

    @abstractmethod
    def _request_delete(self, key: str) -> None:
        """Delete an object."""

    @abstractmethod
    def _request_upload(self, key: str) -> Any:
        """Begin an upload in parts; returns what names it."""

    @abstractmethod
    def _request_part(self, key: str, upload: Any, number: int, data: bytes) -> Any:
        """Send a part, the first of which has number 1; returns what `_request_complete` needs to know of it."""

    @abstractmethod
    def _request_complete(self, key: str, upload: Any, parts: Sequence[Any]) -> None:
        """Make the parts an object."""

    @abstractmethod
    def _request_abort(self, key: str, upload: Any) -> None:
        """Forget an upload and its parts."""

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".strip("/")

    def _pages(self, prefix: str, by_folder: bool) -> Iterator[Page]:
        """The pages of a listing; one that fails is asked for again, and not those before it."""
        marker = None
        while True:
            page = self._retry(functools.partial(self._request_page, prefix, by_folder, marker))
            yield page
            marker = page.marker
            if not marker:
                return

    def list(self, path: str, times: bool = False) -> list[Entry]:
        prefix = f"{self._key(path)}/".lstrip("/")
        entries = []
        with self._explained("list", path):
            for page in self._pages(prefix, by_folder=True):
                entries += [Entry(folder[len(prefix) : -1], False) for folder in page.folders]
                entries += [Entry(each.key[len(prefix) :], True, each.modified) for each in page.objects]
        return [entry for entry in entries if entry.name and not is_unfinished(entry.name)]

    def _keys(self, path: str) -> Sequence[str]:
        """The keys of all that a folder holds; where it holds nothing, `path` is a file, if it is anything.

        Only a prefix that ends in a slash is asked for: S3 Express knows no other.
        """
        key = self._key(path)
        below = [each.key for page in self._pages(f"{key}/".lstrip("/"), by_folder=False) for each in page.objects]
        return below or [key]

    def move(self, source: str, target: str) -> None:
        with self._explained("move", source):
            for key in self._keys(source):
                # One that is gone has been moved: by a request whose answer was lost, or by another run.
                with contextlib.suppress(FileNotFoundError):
                    self._move(key.removeprefix(f"{self.prefix}/"), source, target)

    def _move(self, path: str, source: str, target: str) -> None:
        """Move one object: it is read and written, since a copy within the store needs further permissions."""
        data = self._retry(lambda: self._fetch(path))
        self._retry(lambda: self._pipe(target + path.removeprefix(source), data))
        self._retry(lambda: self._request_delete(self._key(path)))

    def remove(self, path: str) -> None:
        def delete(key: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._retry(lambda: self._request_delete(key))

        # One by one: some stores cannot delete many at once, or answer that they did and did not.
        with self._explained("delete", path), ThreadPoolExecutor(DELETES_AT_ONCE, "delete") as pool:
            keys = self._keys(path)
            for start in range(0, len(keys), KEYS_HELD):
                collections.deque(pool.map(delete, keys[start : start + KEYS_HELD]), maxlen=0)

    def _version(self, key: str) -> Version | None:
        """The object at a key, None if there is none."""
        return self._unless_absent(lambda: self._request_version(key))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Read]:
        key = self._key(path)
        with self._explained("read", path):
            found = self._version(key)
        if found is None:
            raise FileNotFoundError(f"{self.url}/{path}")
        version, buffer, reached = found, b"", 0

        def part(start: int, stop: int) -> bytes:
            data = self._request_read(key, start, stop, version)
            if len(data) != stop - start:
                raise ConnectionError(f"{len(data)} bytes came of {stop - start}")
            return data

        def read(size: int) -> bytes:
            # What cannot be fetched moves nothing: the position is that of the bytes that were given.
            nonlocal buffer, reached
            with self._explained("read", path):
                while len(buffer) < size and reached < version.size:
                    stop = min(version.size, reached + max(object_store.PART_BYTES, size - len(buffer)))
                    buffer += self._retry(functools.partial(part, reached, stop))
                    reached = stop
            given, buffer = buffer[:size], buffer[size:]
            return given

        yield read

    def upload(self, path: str, chunks: Chunks, size: int) -> None:
        part_bytes = -(-max(object_store.PART_BYTES, size // PARTS) // 2**20) * 2**20
        key = self._key(path)
        at_once = max(1, min(self.parts_at_once, PARTS_AT_ONCE * object_store.PART_BYTES // part_bytes))
        parts: list[Future[Any]] = []
        written = 0

        def send(part: bytes, number: int) -> Any:
            return self._retry(lambda: self._request_part(key, upload, number, part))

        with self._explained("write", path):
            before = self._version(key)
            upload = self._retry(lambda: self._request_upload(key))
        pool = ThreadPoolExecutor(at_once, "upload")
        try:
            for part in in_parts(chunks, part_bytes):
                parts.append(pool.submit(send, part, len(parts) + 1))
                written += len(part)
                if len(parts) >= at_once:  # this bounds memory, and shows early that a part failed
                    with self._uploading(path):
                        parts[-at_once].result()
            with self._uploading(path):
                self._complete(key, upload, [part.result() for part in parts], written, before)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a part that arrives after the abort would stay, and be billed
            self._abort(key, upload)
            raise
        pool.shutdown()

    @contextlib.contextmanager
    def _uploading(self, path: str) -> Iterator[None]:
        with self._explained("write", path):
            try:
                yield
            except FileNotFoundError as error:
                if code(error) in NO_BUCKET_WORDS:
                    raise
                raise NotCommitted(
                    f"cannot write {self.url}/{path}: the store aborted the upload ({brief(error)}); {AGAIN}"
                ) from None

    def _complete(self, key: str, upload: Any, parts: Sequence[Any], size: int, before: Version | None) -> None:
        """Make the parts an object.

        Where the answer to a request that was carried out is lost, the next one finds no such upload any more.
        """
        try:
            self._retry(lambda: self._request_complete(key, upload, parts))
        except FileNotFoundError as error:
            standing = self._version(key) if code(error) not in NO_BUCKET_WORDS else None
            if standing is None or standing.size != size or standing == before:
                raise

    def _abort(self, key: str, upload: Any) -> None:
        try:
            self._retry(lambda: self._request_abort(key, upload))
        except FileNotFoundError:
            pass  # it was aborted already, or it is complete
        except families() as error:
            logger.warning("an unfinished upload to %s could not be discarded (%s)", self.url, type(error).__name__)


def in_parts(chunks: Chunks, size: int) -> Iterator[bytes]:
    """The same bytes in parts of equal size, on which some stores beside S3 itself insist; the last may be smaller."""
    buffer = bytearray()
    for chunk in chunks:
        buffer.extend(chunk)
        while len(buffer) > size:
            yield bytes(memoryview(buffer)[:size])
            del buffer[:size]
    yield bytes(buffer)
