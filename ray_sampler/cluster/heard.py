"""What actors print, and their tracebacks: the driver's log has the first, a file on its machine the second."""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from threading import Lock, local
from typing import Any

from ray_sampler.errors import show_traceback

logger = logging.getLogger(__name__)

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
MOST_LINES = 500
"""Different lines of an actor that are passed on; its own log, which Ray keeps on its node, has all."""


class Heard:
    """A stream whose lines are kept for the driver too, each different one once."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.seen: dict[str, None] = {}
        self.taken = 0
        self.begun = local()
        self.lock = Lock()

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self.begun, "text", "") + text).split("\n")
        self.begun.text = rest
        with self.lock:
            for line in lines:
                if line.strip() and len(self.seen) < MOST_LINES:
                    self.seen.setdefault(line.rstrip())
        self.stream.write(text)  # Ray's returns nothing
        return len(text)

    def take(self) -> tuple[str, ...]:
        """Lines that are new since the last call."""
        with self.lock:
            new = tuple(self.seen)[self.taken :]
            self.taken = len(self.seen)
        return new + (("and more lines, in the log of the actor alone",) if new and self.taken == MOST_LINES else ())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def pass_on(lines: Iterable[str]) -> None:
    """Log what an actor printed."""
    for line in lines:
        logger.warning("an actor printed: %s", line)


class Tracebacks:
    """A file of this machine with the full tracebacks of actors, each different one once."""

    def __init__(self) -> None:
        self.path: str | None = None
        self.written: set[str] = set()

    def keep(self, error: BaseException) -> None:
        """Write one down, and say where the first time; what the actor printed before is said too."""
        show_traceback(error)
        pass_on(getattr(getattr(error, "cause", None), "__notes__", ()))
        text = COLOURS.sub("", str(getattr(error, "traceback_str", error)))
        if text in self.written:
            return
        self.written.add(text)
        with suppress(OSError):
            if self.path is None:
                handle, self.path = tempfile.mkstemp(prefix="ray-sampler-tracebacks-", suffix=".txt")
                os.close(handle)
                logger.warning("full tracebacks of actors are in %s", self.path)
            with open(self.path, "a", errors="backslashreplace") as file:
                file.write(f"{text}\n\n")
