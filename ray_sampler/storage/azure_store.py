"""A container of Azure Blob Storage, by the requests of Azure's own library.

adlfs finds the account and the credentials, as its users expect. Azure's library waits 15 seconds before its first
second attempt and says nothing; here it makes one, and ours follow.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import fsspec
from azure.core import MatchConditions
from azure.core.exceptions import ClientAuthenticationError, ResourceExistsError, ResourceNotFoundError
from azure.storage.blob import BlobBlock, BlobPrefix
from fsspec.asyn import sync

from ray_sampler.storage.bucket_store import BucketStore, Object, Page, Version
from ray_sampler.storage.failures import NO_BUCKET_WORDS, code, field_of

# Where no credentials are found it warns of each place in which it looked, in dozens of lines. They are for those who
# set logging up, and not for standard error.
logging.getLogger("azure").addHandler(logging.NullHandler())

ONE_ATTEMPT = dict.fromkeys(("retry_total", "retry_connect", "retry_read", "retry_status"), 0)
LIMITS = {"connection_timeout": 10, "read_timeout": 20}
"""Seconds."""
LOOK_FOR_CREDENTIALS_S = 12.0
SCOPE = "https://storage.azure.com/.default"

NAMES_PER_PAGE = 5000


class AzureStore(BucketStore):
    """A folder in a container; every request that fails for the moment is tried again."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(filesystem, root, url)
        self.bucket, _, self.prefix = root.partition("/")
        self._looked = False

    def _request(self, request: Callable[[Any], Awaitable[Any]]) -> Any:
        """What a request of the container's client gives."""

        async def made() -> Any:
            await self._found_credentials()
            try:
                return await request(self.filesystem.service_client.get_container_client(self.bucket))
            except ResourceNotFoundError as error:
                if code(error) in NO_BUCKET_WORDS:
                    raise
                raise FileNotFoundError(code(error)) from None
            except ResourceExistsError as error:
                if code(error) in ("BlobAlreadyExists", "UnauthorizedBlobOverwrite"):
                    raise FileExistsError(code(error)) from None
                raise

        return sync(self.filesystem.loop, made)

    async def _found_credentials(self) -> None:
        """Look once for default credentials, without waiting for a metadata server that never answers."""
        credential = self.filesystem.credential
        if self._looked or not hasattr(credential, "get_token"):
            return
        try:
            await asyncio.wait_for(credential.get_token(SCOPE), LOOK_FOR_CREDENTIALS_S)
        except TimeoutError:
            raise ClientAuthenticationError("no credentials were found in time") from None
        self._looked = True

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        options = {"overwrite": not create, "length": len(data), "max_concurrency": 1, **LIMITS, **ONE_ATTEMPT}
        self._request(lambda container: container.get_blob_client(self._key(path)).upload_blob(data, **options))

    async def _get(self, container: Any, key: str, **options: Any) -> bytes:
        blob = container.get_blob_client(key)
        stream = await blob.download_blob(max_concurrency=1, **options, **LIMITS, **ONE_ATTEMPT)
        field_of(stream.properties, "etag")
        return await stream.readall()

    def _fetch(self, path: str) -> bytes:
        return bytes(self._request(lambda container: self._get(container, self._key(path))))

    def _request_read(self, key: str, start: int, stop: int, version: Version) -> bytes:
        same = {"etag": version.tag, "match_condition": MatchConditions.IfNotModified}
        return bytes(self._request(lambda each: self._get(each, key, offset=start, length=stop - start, **same)))

    def _request_version(self, key: str) -> Version:
        found = self._request(lambda each: each.get_blob_client(key).get_blob_properties(**LIMITS, **ONE_ATTEMPT))
        return Version(found.size, field_of(found, "etag"))

    def _request_page(self, prefix: str, by_folder: bool, marker: str | None) -> Page:
        async def page(container: Any) -> Page:
            options = {"name_starts_with": prefix, "results_per_page": NAMES_PER_PAGE, **LIMITS, **ONE_ATTEMPT}
            found = container.walk_blobs(delimiter="/", **options) if by_folder else container.list_blobs(**options)
            pages = found.by_page(continuation_token=marker)
            objects, folders = [], []
            async for each in await anext(pages):
                if isinstance(each, BlobPrefix) or hasattr(each, "prefix"):
                    folders.append(each.name)
                else:
                    objects.append(Object(each.name, each.last_modified.timestamp()))
            return Page(objects, folders, pages.continuation_token or None)

        found: Page = self._request(page)
        return found

    def _request_delete(self, key: str) -> None:
        self._request(lambda each: each.get_blob_client(key).delete_blob(**LIMITS, **ONE_ATTEMPT))

    def _request_upload(self, key: str) -> str:
        return key  # blocks need no beginning

    def _request_part(self, key: str, upload: str, number: int, data: bytes) -> str:
        block = base64.b64encode(f"{number:08d}".encode()).decode()
        options = {"length": len(data), **LIMITS, **ONE_ATTEMPT}
        self._request(lambda each: each.get_blob_client(key).stage_block(block, data, **options))
        return block

    def _request_complete(self, key: str, upload: str, parts: Sequence[str]) -> None:
        blocks = [BlobBlock(block) for block in parts]
        try:
            self._request(lambda each: each.get_blob_client(key).commit_block_list(blocks, **LIMITS, **ONE_ATTEMPT))
        except Exception as error:
            if code(error) == "InvalidBlockList":  # after a commit that was carried out, the blocks are no more
                raise FileNotFoundError("InvalidBlockList") from None
            raise

    def _request_abort(self, key: str, upload: str) -> None:
        """Nothing: blocks that are not committed are invisible, and the store drops them after a week."""
