"""A folder in a bucket, or on any other filesystem that fsspec knows; S3's has requests of its own in s3_store.py.

This is the one layer that tries again: with backoff, jitter, a bound and a warning for each. Where a library beneath it
would do so as well, their attempts multiply, and a lasting failure takes hours.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, TypeVar

import fsspec
import tenacity

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.store import (
    ABANDONED_SECONDS,
    Entry,
    OpenFile,
    StagedFile,
    is_unfinished,
    unfinished_name,
)

logger = logging.getLogger(__name__)

CLOUDS = ("gs", "gcs", "abfs", "abfss", "az", "adl")
"""Protocols of Google's and Azure's stores. Their open files show nothing under their name until they are committed,
and their libraries try again by themselves."""

ATTEMPTS = 6
CLOUD_ATTEMPTS = 2
"""Where the library below makes several of each."""

BACKOFF_S = 1.0
"""Longest wait before the second attempt; it doubles with each, and what is waited is drawn from 0 to it."""

LONGEST_WAIT_S = 16.0
GIVE_UP_S = 60.0
"""A request that fails so long after its first attempt is not tried again."""

PART_BYTES = 16 * 2**20

FAMILIES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),
    ("azure.core.exceptions", "AzureError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
)
"""What stores raise beside OSError, by module; a module that is not loaded raises nothing."""

PASSING_KINDS = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
    "FSTimeoutError",
    "ResponseParserError",
}
PASSING_CODES = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "OperationAborted"}
PASSING_CODES |= {"ConditionalRequestConflict", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
PASSING_CODES |= {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}  # damaged on its way
PASSING_CODES |= {"429", "500", "502", "503", "504"}
PASSING_ERRNOS = {errno.EBUSY, errno.EAGAIN, getattr(errno, "EREMOTEIO", errno.EAGAIN)}
FORBIDDEN_CODES = {
    "AccessDenied",
    "AllAccessDisabled",
    "Forbidden",
    "401",
    "403",
    "AuthorizationFailure",
    "MethodNotAllowed",
}
WRONG_KEY_CODES = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "AuthenticationFailed",
}
NO_KEY_KINDS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "GoogleAuthError",
    "ProfileNotFound",
}
INVALID_KINDS = {"ValueError", "ParamValidationError", "EndpointResolutionError"}
"""Of what was refused before it was sent; botocore gives some of it as a bare ValueError, with the address in it."""

NO_BUCKET_CODES = {"NoSuchBucket", "ContainerNotFound"}

Result = TypeVar("Result")


def families() -> tuple[type[BaseException], ...]:
    """The exceptions by which the loaded stores report a failure."""
    loaded = ((sys.modules.get(module), name) for module, name in FAMILIES)
    return (OSError, ValueError, *(getattr(module, name) for module, name in loaded if module is not None))


def kinds(error: BaseException) -> set[str]:
    """The names of an exception's classes."""
    return {kind.__name__ for kind in type(error).__mro__}


def code(error: BaseException) -> str:
    """The store's own word for a failure, as NoSuchBucket or 503; "" if it has none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        if "HttpProcessingError" in kinds(cause):  # aiohttp's own number for an answer that was cut short
            return ""
        for attribute in ("error_code", "code", "status_code", "status"):
            value = getattr(cause, attribute, None)
            if isinstance(value, str | int):
                return str(value)
        cause = cause.__cause__
    return ""


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if not isinstance(error, families()):
        return False
    return (
        code(error) in PASSING_CODES
        or isinstance(error, TimeoutError | ConnectionError)
        or (isinstance(error, OSError) and error.errno in PASSING_ERRNOS)
        or bool(kinds(error) & PASSING_KINDS)
    )


def said(error: BaseException) -> str:
    """What a store said, in two words; its text is left out, as it may quote a key."""
    return f"{type(error).__name__} {code(error)}".strip()


def failure(error: BaseException, action: str, url: str) -> RequestError | RunError:
    """One sentence for what a store said. Its own text is left out: it may quote a key."""
    word = code(error)
    if word in NO_BUCKET_CODES:
        return RequestError(f"cannot {action} {url}: its bucket does not exist; create it or correct the URL")
    if kinds(error) & INVALID_KINDS:
        return RequestError(
            f"cannot {action} {url}: the bucket's name or the store's address is invalid; "
            "correct the URL or the endpoint, neither of which may hold a credential"
        )
    if kinds(error) & NO_KEY_KINDS:
        return RequestError(
            f"cannot {action} {url}: no credentials were found; set them in the environment or a profile"
        )
    if word in WRONG_KEY_CODES:
        return RequestError(f"cannot {action} {url}: the credentials are wrong or have expired ({word}); renew them")
    if isinstance(error, PermissionError) or word in FORBIDDEN_CODES:
        return RequestError(f"cannot {action} {url}: permission denied; these credentials may not {action} there")
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENOSPC):
        return RunError(
            f"cannot {action} {url}: the store takes no more data; make room and run the same command again"
        )
    if isinstance(error, FileNotFoundError) and word != "NoSuchUpload":
        return RequestError(f"cannot {action} {url}: there is no such bucket or folder; create it or correct the URL")
    return RunError(
        f"cannot {action} {url}: the store did not answer as it should ({said(error)}); run the same command again"
    )


class ObjectStore:
    """A folder in a bucket; every method tries again what may pass."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.url = url
        protocols = filesystem.protocol
        self.protocol = protocols if isinstance(protocols, str) else protocols[0]
        self.attempts = CLOUD_ATTEMPTS if self.protocol in CLOUDS else ATTEMPTS

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @contextlib.contextmanager
    def _explained(self, action: str, path: str) -> Iterator[None]:
        try:
            yield
        except families() as error:
            raise failure(error, action, f"{self.url}/{path}".rstrip("/")) from None

    def _retry(self, request: Callable[[], Result]) -> Result:
        def log(state: tenacity.RetryCallState) -> None:
            error = state.outcome.exception() if state.outcome else None
            logger.warning(
                "the store of %s answered %s; attempt %d of %d follows in %.1f s",
                self.url, said(error) if error else "", state.attempt_number + 1, self.attempts, state.upcoming_sleep,
            )  # fmt: skip

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.attempts) | tenacity.stop_after_delay(GIVE_UP_S),
            wait=tenacity.wait_random_exponential(multiplier=BACKOFF_S, max=LONGEST_WAIT_S),
            retry=tenacity.retry_if_exception(is_passing),
            before_sleep=log,
            reraise=True,
        )
        return retrying(request)

    def read(self, path: str) -> bytes | None:
        with self._explained("read", path):
            try:
                return bytes(self._retry(lambda: self.filesystem.cat_file(self._full(path))))
            except FileNotFoundError as error:
                if code(error) in NO_BUCKET_CODES:
                    raise
                return None

    def read_end(self, path: str, size: int) -> bytes | None:
        with self._explained("read", path):
            try:
                return self._retry(lambda: self._cat_end(self._full(path), size))
            except FileNotFoundError as error:
                if code(error) in NO_BUCKET_CODES:
                    raise
                return None

    def _cat_end(self, full: str, size: int) -> bytes:
        try:
            there: int = self.filesystem.info(full)["size"]
            return bytes(self.filesystem.cat_file(full, start=max(0, there - size), end=there))
        except families() as error:
            # Some stores give a part the checksum of the whole, which no client takes.
            if "FlexibleChecksumError" not in kinds(error):
                raise
            return bytes(self.filesystem.cat_file(full))[-size:]

    def put(self, path: str, data: bytes) -> None:
        with self._explained("write", path):
            self._retry(lambda: self._pipe(path, data))

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        """Write a whole file in one request, with `create` only if there is none."""
        if self.protocol not in CLOUDS:
            self.filesystem.makedirs(self._full(path).rpartition("/")[0], exist_ok=True)
        self.filesystem.pipe_file(self._full(path), data, mode="create" if create else "overwrite")

    def create(self, path: str, data: bytes) -> bool:
        # Some stores take a conditional put and ignore the condition; looking first leaves them a moment's race.
        if self.read(path) is not None:
            return False
        with self._explained("write", path):
            try:
                self._retry(lambda: self._pipe(path, data, create=True))
            except FileExistsError:
                return False
            except OSError as error:
                if code(error) in ("PreconditionFailed", "412"):
                    return False
                if error.errno != errno.ENOSYS and code(error) not in ("NotImplemented", "501"):
                    raise
                # The store knows no conditions: the caller reads back what stands there.
                self.put(path, data)
            return True

    def list(self, path: str, times: bool = False) -> list[Entry]:
        folder = self._full(path).rstrip("/")
        with self._explained("list", path):
            try:
                found = self._retry(lambda: self.filesystem.ls(folder, detail=True))
            except FileNotFoundError as error:
                if code(error) in NO_BUCKET_CODES:
                    raise
                return []
        entries = []
        for info in found:
            name = info["name"].rstrip("/")
            if name.strip("/") != folder.strip("/"):
                entries.append(Entry(name.rpartition("/")[2], info["type"] == "file", modified(info)))
        return [entry for entry in entries if entry.name and not is_unfinished(entry.name)]

    def move(self, source: str, target: str) -> None:
        with self._explained("move", source), contextlib.suppress(FileNotFoundError):
            is_folder = self._retry(lambda: self.filesystem.isdir(self._full(source)))
            if self.protocol not in CLOUDS:
                self.filesystem.makedirs(self._full(target).rpartition("/")[0], exist_ok=True)
            self._retry(lambda: self.filesystem.mv(self._full(source), self._full(target), recursive=is_folder))

    def remove(self, path: str) -> None:
        with self._explained("delete", path), contextlib.suppress(FileNotFoundError):
            self._retry(lambda: self.filesystem.rm(self._full(path), recursive=True))

    @contextlib.contextmanager
    def stage(self, path: str, size: int) -> Iterator[StagedFile]:
        if self.protocol == "memory":
            buffer = io.BytesIO()
            yield StagedFile(buffer.write)
            self.put(path, buffer.getvalue())
            return
        folder, slash, name = path.rpartition("/")
        staged = self.protocol in CLOUDS
        target = path if staged else f"{folder}{slash}{unfinished_name(name)}"
        with self._explained("write", path):
            if not staged:
                self.filesystem.makedirs(self._full(folder), exist_ok=True)
            options = {"autocommit": False, "block_size": PART_BYTES} if staged else {}
            file = self.filesystem.open(self._full(target), "wb", **options)

        def write(data: bytes | memoryview) -> None:
            with self._explained("write", path):
                file.write(data)

        try:
            yield StagedFile(write)
            with self._explained("write", path):
                file.close()
                if staged:
                    file.commit()
                else:
                    self.filesystem.mv(self._full(target), self._full(path))
        except BaseException:
            self._discard(file, target, staged)
            raise

    def _discard(self, file: Any, target: str, staged: bool) -> None:
        """Forget an unfinished file, whose close would commit it."""
        try:
            if staged:
                file.discard()
            else:
                file.close()
                self.filesystem.rm(self._full(target))
        except families() as error:
            logger.warning("an unfinished upload to %s could not be discarded (%s)", self.url, type(error).__name__)
        finally:
            if staged:
                file.closed = True  # else its finaliser would flush what is left

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[OpenFile]:
        with self._explained("read", path):
            try:
                file = self._retry(
                    lambda: self.filesystem.open(self._full(path), "rb", block_size=PART_BYTES, cache_type="readahead")
                )
            except FileNotFoundError as error:
                if code(error) in NO_BUCKET_CODES:
                    raise
                file = None
        if file is None:
            raise FileNotFoundError(f"{self.url}/{path}")

        def read(size: int) -> bytes:
            # What cannot be fetched moves nothing: the position is that of the bytes that were given.
            with self._explained("read", path):
                return bytes(self._retry(lambda: file.read(size)))

        with file:
            yield OpenFile(read)

    def clear_abandoned(self, folder: str, seconds: float = ABANDONED_SECONDS) -> None:
        """Nothing is left of uploads that were abandoned: these stores drop them after a while by themselves."""


def modified(info: Mapping[str, Any]) -> float | None:
    """When an object was last written, as unix time: S3, GCS, Azure and fsspec's own each have a name for it."""
    for key in ("LastModified", "updated", "last_modified", "created"):
        value = info.get(key)
        if isinstance(value, str):
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, float):
            return value
    return None
