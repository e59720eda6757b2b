"""The two errors that users see, and what their sentences may show of a URL or of a file's content."""

from __future__ import annotations

import os
import re
import sys
import traceback


class RequestError(ValueError):
    """The request is wrong: one sentence that names the setting, its value and what would be right."""


class RunError(RuntimeError):
    """The run failed or is incomplete: one sentence that says why and what to do."""


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 shard", "2 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def debugging() -> bool:
    """Whether RAY_SAMPLER_DEBUG asks for the tracebacks of errors that become sentences."""
    return os.environ.get("RAY_SAMPLER_DEBUG", "0") not in ("", "0")


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error of which only a sentence is shown, causes and all, where that is asked for."""
    if debugging():
        traceback.print_exception(error, file=sys.stderr)


def require(condition: bool, message: str) -> None:
    """Raise `RequestError` with `message` unless `condition` holds."""
    if not condition:
        raise RequestError(message)


def printable(text: object, longest: int | None = 400) -> str:
    """`text` as one line without control characters: a file or bucket may hold commands for a terminal."""
    shown = str(text)[:longest]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)


def shortened(text: str, longest: int = 200) -> str:
    """A path, URL or list that a request names: no credential of it, and not all of a list of thousands."""
    shown = str(redact(text))
    return shown if len(shown) <= longest else f"{shown[:longest]}…"


def redact(url: str | None) -> str | None:
    """`url` without user names, passwords and query strings, any of which may hold a credential."""
    if url is None or "://" not in url:
        return url
    return "::".join(_redact_link(link) for link in re.split(r"::(?=[\w+.-]+://)", url))


def _redact_link(link: str) -> str:
    """One URL of a chain. A password that was not escaped may hold slashes, as S3 keys do, and more."""
    scheme, separator, rest = link.partition("://")
    # What follows a colon is a port, or else a password up to the last "@".
    rest = re.sub(r"^[^/@?#:]*:(?!\d*(?:[/?#]|$)).*@", "", rest, flags=re.DOTALL)
    if scheme not in ("abfs", "abfss"):  # where the container is before the "@"
        rest = re.sub(r"^[^/?#]*@", "", rest)
    return scheme + separator + re.split(r"[?#]", rest, maxsplit=1)[0]
