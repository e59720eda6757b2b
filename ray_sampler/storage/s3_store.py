"""A folder in an S3 bucket, or in one of a store that speaks S3's protocol."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import fsspec
from fsspec.asyn import sync

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.bucket_store import BucketStore, Object, Page, Version
from ray_sampler.storage.failures import ForeignAnswer, code, failure, families, field_of, status
from ray_sampler.storage.object_store import logger
from ray_sampler.storage.store import ABANDONED_SECONDS

CHECKSUMS = "AWS_REQUEST_CHECKSUM_CALCULATION"


class S3Store(BucketStore):
    """A folder in an S3 bucket; every request that fails for the moment is tried again."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(filesystem, root, url)
        filesystem.retries = 1  # its own, which would multiply with those of this store
        self.bucket, self.prefix, _ = filesystem.split_path(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Store, (self.filesystem, self.root, self.url)  # a pickled filesystem forgets its retries

    def _request(self, method: str, **arguments: Any) -> Any:
        return self.filesystem.call_s3(method, Bucket=self.bucket, **arguments)

    def _failure(self, error: BaseException, action: str, url: str) -> RequestError | RunError:
        refused = status(error) in (400, 411, 501) or code(error) in ("XAmzContentSHA256Mismatch", "BadDigest")
        if action != "write" or not refused or os.environ.get(CHECKSUMS, "").lower() == "when_required":
            return failure(error, action, url)
        hint = (
            "it may not know the checksums that AWS's library adds to uploads: "
            f"set {CHECKSUMS}=when_required and run the same command again"
        )
        return failure(error, action, url, hint)

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if create else {}
        field_of(self._request("put_object", Key=self._key(path), Body=data, **condition), "ETag")

    def _get(self, key: str, **arguments: str) -> bytes:
        answer = self._request("get_object", Key=key, **arguments)
        field_of(answer, "ETag")

        async def content() -> bytes:
            async with answer["Body"] as body:
                return bytes(await body.read())

        return bytes(sync(self.filesystem.loop, content))

    def _fetch(self, path: str) -> bytes:
        return self._get(self._key(path))

    def _request_read(self, key: str, start: int, stop: int, version: Version) -> bytes:
        return self._get(key, Range=f"bytes={start}-{stop - 1}", IfMatch=version.tag)

    def _request_version(self, key: str) -> Version:
        answer = self._request("head_object", Key=key)
        return Version(int(field_of(answer, "ContentLength")), field_of(answer, "ETag"))

    def _request_page(self, prefix: str, by_folder: bool, marker: str | None) -> Page:
        options = ({"Delimiter": "/"} if by_folder else {}) | ({"ContinuationToken": marker} if marker else {})
        page = self._request("list_objects_v2", Prefix=prefix, **options)
        if page.keys() <= {"ResponseMetadata"}:  # taken for an empty folder, it would have everything computed again
            raise ForeignAnswer("the answer has nothing that a listing has")
        return Page(
            [Object(info["Key"], info["LastModified"].timestamp()) for info in page.get("Contents", [])],
            [folder["Prefix"] for folder in page.get("CommonPrefixes", [])],
            page["NextContinuationToken"] if page.get("IsTruncated") else None,
        )

    def _request_delete(self, key: str) -> None:
        self._request("delete_object", Key=key)

    def _request_upload(self, key: str) -> str:
        return field_of(self._request("create_multipart_upload", Key=key), "UploadId")

    def _request_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        answer = self._request("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data)
        return field_of(answer, "ETag")

    def _request_complete(self, key: str, upload: str, parts: Sequence[str]) -> None:
        sent = {"Parts": [{"PartNumber": i + 1, "ETag": tag} for i, tag in enumerate(parts)]}
        field_of(self._request("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload=sent), "ETag")

    def _request_abort(self, key: str, upload: str) -> None:
        self._request("abort_multipart_upload", Key=key, UploadId=upload)

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        """Abort the multipart uploads to this folder that were begun long ago; S3 keeps and bills them for ever."""
        limit = datetime.now(UTC) - timedelta(seconds=seconds)
        prefix = f"{self._key(folder)}/".lstrip("/")
        markers: dict[str, str] = {}
        try:
            while True:
                page = self._retry(lambda: self._request("list_multipart_uploads", Prefix=prefix, **markers))  # noqa: B023
                for upload in page.get("Uploads", []):
                    if upload["Initiated"] < limit:
                        self._abort(upload["Key"], upload["UploadId"])
                if not page.get("IsTruncated"):
                    return
                markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        except families() as error:
            logger.info("abandoned uploads in %s could not be listed (%s)", self.url, type(error).__name__)
