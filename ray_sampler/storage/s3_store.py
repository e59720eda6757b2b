"""A folder in an S3 bucket, request by request, so that each one can be tried again by itself.

What fsspec offers above single requests (files, listings, moves) holds state between them that a failure in the middle
leaves undefined: a part may be sent twice, a deletion fail unseen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from typing import Any

import fsspec
from botocore.exceptions import ClientError

from ray_sampler.storage.object_store import PART_BYTES, ObjectStore, code, families, logger
from ray_sampler.storage.store import ABANDONED_SECONDS, Entry, StagedFile, is_unfinished

PARTS = 9000
"""S3 takes 10,000 parts of an object; this leaves room."""

PARTS_AT_ONCE = 4
PARTS_MEMORY = 4 * PART_BYTES
"""Parts that are uploaded at once, and their bytes, at most; one may have more."""

KEYS_PER_DELETE = 1000


class S3Store(ObjectStore):
    """A folder in an S3 bucket; every request that fails for the moment is tried again."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(filesystem, root, url)
        filesystem.retries = 1  # its own, which would multiply with those of this store
        self.bucket, self.prefix, _ = filesystem.split_path(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.filesystem, self.root, self.url)  # a pickled filesystem forgets its retries

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}".strip("/")

    def _call(self, method: str, **arguments: Any) -> Any:
        return self._retry(lambda: self.filesystem.call_s3(method, Bucket=self.bucket, **arguments))

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if create else {}
        self.filesystem.call_s3("put_object", Bucket=self.bucket, Key=self._key(path), Body=data, **condition)

    def _pages(self, prefix: str, **options: str) -> Iterator[Mapping[str, Any]]:
        """The pages of a listing; one that fails is asked for again, and not those before it."""
        while True:
            page = self._call("list_objects_v2", Prefix=prefix, **options)
            yield page
            if not page.get("IsTruncated"):
                return
            options["ContinuationToken"] = page["NextContinuationToken"]

    def list(self, path: str, times: bool = False) -> list[Entry]:
        prefix = f"{self._key(path)}/".lstrip("/")
        entries = []
        with self._explained("list", path):
            for page in self._pages(prefix, Delimiter="/"):
                folders = [folder["Prefix"] for folder in page.get("CommonPrefixes", [])]
                entries += [Entry(folder[len(prefix) : -1], False) for folder in folders]
                for info in page.get("Contents", []):
                    entries.append(Entry(info["Key"][len(prefix) :], True, info["LastModified"].timestamp()))
        return [entry for entry in entries if entry.name and not is_unfinished(entry.name)]

    def _keys(self, path: str) -> Iterator[str]:
        """The keys of a file, or of all that a folder holds."""
        key = self._key(path)
        for page in self._pages(key):
            for info in page.get("Contents", []):
                if info["Key"] == key or info["Key"].startswith(f"{key}/"):
                    yield info["Key"]

    def move(self, source: str, target: str) -> None:
        with self._explained("move", source):
            old, new = self._key(source), self._key(target)
            for key in list(self._keys(source)):
                # One that is gone has been moved: by a request whose answer was lost, or by another run.
                with contextlib.suppress(FileNotFoundError):
                    paths = f"{self.bucket}/{key}", f"{self.bucket}/{new}{key[len(old) :]}"
                    self._retry(functools.partial(self.filesystem.cp_file, *paths))
                    self._call("delete_object", Key=key)

    def remove(self, path: str) -> None:
        with self._explained("delete", path):
            keys = list(self._keys(path))
            for i in range(0, len(keys), KEYS_PER_DELETE):
                self._retry(functools.partial(self._delete, keys[i : i + KEYS_PER_DELETE]))

    def _delete(self, keys: Sequence[str]) -> None:
        request = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        answer = self.filesystem.call_s3("delete_objects", Bucket=self.bucket, Delete=request)
        if answer.get("Errors"):  # the request itself is answered with 200 all the same
            raise ClientError({"Error": answer["Errors"][0]}, "DeleteObjects")

    @contextlib.contextmanager
    def stage(self, path: str, size: int) -> Iterator[StagedFile]:
        part_bytes = -(-max(PART_BYTES, size // PARTS) // 2**20) * 2**20
        key = self._key(path)
        buffer = bytearray()
        parts: list[Future[str]] = []
        at_once = max(1, min(PARTS_AT_ONCE, PARTS_MEMORY // part_bytes))
        written = 0

        def upload_part(part: bytes, number: int) -> str:
            answer = self._call("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=part)
            return str(answer["ETag"])

        def send(part: bytes) -> None:
            parts.append(pool.submit(upload_part, part, len(parts) + 1))
            if len(parts) >= at_once:  # this bounds memory, and tells early of a part that failed
                parts[-at_once].result()

        def write(data: bytes | memoryview) -> None:
            nonlocal written
            buffer.extend(data)
            written += len(data)
            with self._explained("write", path):
                while len(buffer) >= part_bytes:  # parts of equal size, which some stores beside S3 itself insist on
                    send(bytes(memoryview(buffer)[:part_bytes]))
                    del buffer[:part_bytes]

        with self._explained("write", path):
            before = self._head(key)
            upload = self._call("create_multipart_upload", Key=key)["UploadId"]
        pool = ThreadPoolExecutor(at_once, "upload")
        try:
            yield StagedFile(write)
            with self._explained("write", path):
                if buffer or not parts:
                    send(bytes(buffer))
                self._complete(key, upload, [part.result() for part in parts], written, before)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a part that arrives after the abort would stay, and be billed
            self._abort(key, upload)
            raise
        pool.shutdown()

    def _head(self, key: str) -> tuple[int, str] | None:
        """Size and tag of an object, None where there is none."""
        try:
            answer = self._call("head_object", Key=key)
        except FileNotFoundError:
            return None
        return answer["ContentLength"], answer["ETag"]

    def _complete(self, key: str, upload: str, tags: Sequence[str], size: int, before: tuple[int, str] | None) -> None:
        """Make the parts an object.

        Where the answer to a request that was carried out is lost, the next one finds no such upload any more.
        """
        parts = [{"PartNumber": i + 1, "ETag": tag} for i, tag in enumerate(tags)]
        try:
            self._call("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except FileNotFoundError as error:
            standing = self._head(key) if code(error) == "NoSuchUpload" else None
            if standing is None or standing[0] != size or standing == before:
                raise

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._call("abort_multipart_upload", Key=key, UploadId=upload)
        except FileNotFoundError:
            pass  # it was aborted already, or it is complete
        except families() as error:
            logger.warning("an unfinished upload to %s could not be discarded (%s)", self.url, type(error).__name__)

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        """Abort the multipart uploads to this folder that were begun long ago; S3 keeps and bills them for ever."""
        limit = datetime.now(timezone.utc) - timedelta(seconds=seconds)
        markers: dict[str, str] = {}
        try:
            while True:
                page = self._call("list_multipart_uploads", Prefix=f"{self._key(folder)}/".lstrip("/"), **markers)
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] < limit:
                        self._abort(upload["Key"], upload["UploadId"])
                if not page.get("IsTruncated"):
                    return
                markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        except families() as error:
            logger.info("abandoned uploads in %s could not be listed (%s)", self.url, type(error).__name__)
