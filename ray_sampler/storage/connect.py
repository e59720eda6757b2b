"""From a URL to the store behind it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fsspec

from ray_sampler.errors import RequestError, redact
from ray_sampler.storage.local_store import LocalStore
from ray_sampler.storage.object_store import ObjectStore

EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
    "adl": "azure",
}
"""The extra of this package that a protocol needs."""

READ_TIMEOUT_S = 20
"""Silence, after all of a request was sent and between two pieces of its answer, that counts as a failure."""

S3_OPTIONS: dict[str, Any] = {
    # One attempt: ObjectStore makes the next ones.
    "config_kwargs": {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": READ_TIMEOUT_S,
    },
    # With more, a long object is read in several ranges at once, which may belong to two versions of it.
    "max_concurrency": 1,
}


def check_scheme(url: str, named: str = "") -> None:
    """Check that a URL's scheme is not a folder's name by a slip; `named` begins the sentence.

    Raises:
        RequestError: one slash follows a known scheme.
    """
    scheme, separator, rest = url.partition(":/")
    if separator and not rest.startswith("/") and scheme in fsspec.available_protocols():
        raise RequestError(
            f"{named}{redact(url)!r}, with one slash after {scheme}:; give {scheme}://{'/' * (scheme == 'file')}{rest}"
        )


def open_store(url: str) -> LocalStore | ObjectStore:
    """The folder at a local path or any fsspec URL; nothing is read or written yet.

    Raises:
        RequestError: its protocol is unknown, or needs a package that is not installed.
    """
    check_scheme(url)
    protocol, _ = fsspec.core.split_protocol(url)
    if "::" in url:
        raise RequestError(f"{redact(url)} chains filesystems; give the URL of one folder")
    if protocol in (None, "file", "local"):
        return LocalStore(Path(os.path.abspath(os.path.expanduser(url.partition("://")[2] if protocol else url))))
    try:
        filesystem, root = fsspec.core.url_to_fs(
            url, use_listings_cache=False, **(S3_OPTIONS if protocol in ("s3", "s3a") else {})
        )
    except ImportError:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'ray-sampler[{extra}]'" if extra else f"install fsspec's package for {protocol}"
        raise RequestError(f"{redact(url)} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise RequestError(f"{redact(url)} cannot be opened ({type(error).__name__}); check the URL") from None
        raise RequestError(
            f"{redact(url)} has an unknown protocol; use a local path, s3://, gs:// or abfs://"
        ) from None
    shown = str(redact(url)).rstrip("/")
    if protocol in ("s3", "s3a"):
        from ray_sampler.storage.s3_store import S3Store

        return S3Store(filesystem, root.rstrip("/"), shown)
    return ObjectStore(filesystem, root.rstrip("/"), shown)
