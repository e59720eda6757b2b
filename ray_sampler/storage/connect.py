"""Where a run may lie: the flags that say it, what is refused before anything is written, and the store of a URL."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from ray_sampler.errors import RequestError, redact, require
from ray_sampler.options import option
from ray_sampler.storage.failures import failure, families
from ray_sampler.storage.local_store import LocalStore
from ray_sampler.storage.object_store import ObjectStore
from ray_sampler.storage.record import FragmentFormat

EXTRAS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "abfss": "azure",
    "az": "azure",
}
"""The extra of this package that a protocol needs."""

READ_TIMEOUT_S = 20
"""Silence, after all of a request was sent and between two pieces of its answer, that counts as a failure."""

S3_CONFIG = {
    # One attempt: the store's own retries make the next ones.
    "retries": {"mode": "standard", "total_max_attempts": 1},
    "connect_timeout": 10,
    "read_timeout": READ_TIMEOUT_S,
    # Some stores give a part of an object the checksum of the whole, and every fragment and archive has its own.
    "response_checksum_validation": "when_required",
}

READ_ONLY = ("hf", "github", "gist", "git", "zip", "tar", "jar", "libarchive", "data", "reference")
"""Protocols of places that hold files, and into which a run cannot put its own."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where a run lies, and as what."""

    output: str | None = option(
        None,
        "Run directory: a path, or a URL such as s3://, gs:// or abfs:// (default: runs/<model>-<fingerprint>).",
        common=True,
    )
    fragment_format: FragmentFormat = option("parquet", "File format of the fragments.")
    accept_code_change: bool = option(
        False,
        "Resume a run although the code of its network has changed.",
        recorded=False,
    )
    overwrite: bool = option(
        False, "Delete an earlier run in --output first; no other driver may be writing to it.", common=True
    )

    def check(self) -> None:
        """Raises RequestError: the output cannot be one."""
        if self.output is not None:
            check_output(self.output)


def check_output(output: str) -> None:
    """Raises RequestError: nothing can be written to this kind of path or URL."""
    require(output != "", "--output is empty; it must be a directory or an fsspec URL")
    require(
        not output.startswith("memory://"),
        f"--output is {output!r}, the memory of one process, which no actor shares; give a directory or a bucket",
    )
    check_scheme(output, "--output is ")
    protocol, _, path = output.partition("://") if "://" in output else ("", "", output)
    require(
        path.strip("/") != "" or not protocol, f"--output is {output!r}; a bucket or directory must follow the protocol"
    )
    require(
        protocol not in ("http", "https"),
        f"--output is {redact(output)!r}, a web address, where nothing can be written; give a directory or a bucket",
    )
    require(
        protocol not in READ_ONLY,
        f"--output is {redact(output)!r}, and {protocol}:// takes no files one by one; give a directory or a bucket, "
        "and copy the archive there afterwards",
    )
    require(
        protocol in ("", "file", "local") or "?" not in path,
        f"--output is {redact(output)!r} with a query, which no bucket has; credentials come from the environment",
    )


def path_text(url: str | os.PathLike[str], what: str) -> str:
    """A path or URL as text. Raises RequestError: it is neither."""
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str):
        raise RequestError(f"{text!r} cannot name {what}; give its path or URL")
    return text


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


Store = LocalStore | ObjectStore
"""A folder on disk or in a bucket."""


def absolute(url: str) -> str:
    """A path or URL as actors find it, who have other working directories."""
    protocol, _ = fsspec.core.split_protocol(url)
    if protocol not in (None, "file", "local"):
        return url
    return os.path.abspath(os.path.expanduser(url.partition("://")[2] if protocol else url))


def open_store(url: str) -> Store:
    """The folder at a local path or any fsspec URL; nothing is read or written yet.

    Raises:
        RequestError: its protocol is unknown, needs a package that is not installed, or its path is none that every
            store takes the same way.
    """
    check_scheme(url)
    protocol, _ = fsspec.core.split_protocol(url)
    if "::" in url:
        raise RequestError(f"{redact(url)} chains filesystems; give the URL of one folder")
    if protocol in (None, "file", "local"):
        return LocalStore(Path(absolute(url)))
    shown = shown_url(url).rstrip("/")
    if protocol in EXTRAS:
        require_plain_path(url, shown)
    try:
        return bucket_store(protocol, url, shown)
    except ImportError:
        extra = EXTRAS.get(protocol)
        remedy = f"pip install 'ray-sampler[{extra}]'" if extra else f"install fsspec's package for {protocol}"
        raise RequestError(f"{shown} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        if protocol in fsspec.available_protocols():
            raise RequestError(
                f"{shown} cannot be opened ({type(error).__name__}); check the URL and the credentials"
            ) from None
        raise RequestError(f"{shown} has an unknown protocol; use a local path, s3://, gs:// or abfs://") from None
    except families() as error:
        if protocol == "hdfs":
            raise RequestError(
                f"{shown} needs Hadoop's client, libhdfs, which does not start here ({type(error).__name__}); set "
                "HADOOP_HOME and CLASSPATH as pyarrow's HadoopFileSystem wants them, or use another store"
            ) from None
        raise failure(error, "open", shown) from None


def bucket_store(protocol: str, url: str, shown: str) -> ObjectStore:
    """The store of a URL that is not a local path."""
    if protocol in ("s3", "s3a"):
        from ray_sampler.storage.s3_store import S3Store

        return S3Store(connected(url, s3_options())[0], path_of(url), shown)
    if protocol in ("gs", "gcs"):
        from ray_sampler.storage.gcs_store import GcsStore, credential_option

        fsspec.get_filesystem_class(protocol)  # before credentials are looked for: it may not be installed
        # A name may hold "#", which gcsfs would take for the number of a version.
        return GcsStore(connected(url.partition("#")[0], credential_option())[0], path_of(url), shown)
    if protocol in ("abfs", "abfss", "az"):
        from ray_sampler.storage.azure_store import AzureStore

        head, tail = split_tail(url)
        filesystem, root = connected(head, {})
        return AzureStore(filesystem, (root + tail).rstrip("/"), shown)
    filesystem, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return ObjectStore(filesystem, root.rstrip("/"), shown)


def connected(url: str, options: dict[str, Any]) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL, and the path in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # gcsfs's of a project, which only making a bucket needs
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    return filesystem, path


def s3_options() -> dict[str, Any]:
    """Ours, with those of fsspec's configuration for S3 beneath: FSSPEC_S3, or its files."""
    found = [fsspec.config.conf.get(protocol, {}).get("config_kwargs") for protocol in ("s3", "s3a")]
    theirs = {name: value for each in found if isinstance(each, dict) for name, value in each.items()}
    return {"config_kwargs": theirs | S3_CONFIG}


def path_of(url: str) -> str:
    """A bucket's name and what follows it, as they are."""
    return url.partition("://")[2].rstrip("/")


def require_plain_path(url: str, shown: str) -> None:
    """Refuse a path that means one thing to one request and another to the next.

    Raises:
        RequestError: a step of it is empty, or a dot or two.
    """
    steps = path_of(url).split("/")
    if any(step in ("", ".", "..") for step in steps):
        raise RequestError(
            f"{shown} has an empty step, '.' or '..' in its path, which stores read differently; "
            "give a path with one '/' between two names"
        )


def split_tail(url: str) -> tuple[str, str]:
    """A URL up to its first "?" or "#", and the rest."""
    found = re.search(r"[?#]", url)
    return (url[: found.start()], url[found.start() :]) if found else (url, "")


def shown_url(url: str) -> str:
    """`url` as it is, "#", "?" and all, unless something in it may be a credential."""
    tail = split_tail(url)[1]
    safe = str(redact(url))
    return safe if not tail or re.search("[=@&]", tail) else str(redact(split_tail(url)[0])) + tail
