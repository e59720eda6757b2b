"""Where a run may lie: the flags that say it, and what is refused before anything is written."""

from __future__ import annotations

from dataclasses import dataclass

from ray_sampler.errors import redact, require
from ray_sampler.options import option
from ray_sampler.storage.connect import check_scheme
from ray_sampler.storage.record import FragmentFormat

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
