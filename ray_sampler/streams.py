"""Standard streams that may be closed, full or broken: what happens to a log never decides what happens to a run."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ray_sampler.errors import printable


class OutputLost(Exception):
    """Standard output takes nothing any more.

    Attributes:
        wanted: whether somebody may still have wanted it: a disk is full. Otherwise it was closed, or the reader of a
            pipe has seen enough.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"cannot write to standard output: {getattr(cause, 'strerror', None) or cause}")
        self.wanted = isinstance(cause, OSError) and cause.errno not in (errno.EPIPE, errno.EBADF)


class Sturdy:
    """A text stream whose failures end neither the process nor what is printed later.

    After the first failure its descriptor leads to the null device, so that what is left in its buffer, and what
    libraries print, goes there.

    Args:
        stream: written to; None where the process was started without it.
        raises: whether the first failure raises OutputLost; otherwise it is passed over.
    """

    def __init__(self, stream: TextIO | None, raises: bool) -> None:
        self.stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 - it lives as long as this
        self.raises = raises
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self._write(text)
        except (OSError, ValueError) as error:  # ValueError: somebody closed it
            self._give_up(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            # A path may hold bytes that are not text, and a stream may know few letters.
            self.stream.flush()
            self.stream.buffer.write(as_on_disk(text))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        first, self.lost = not self.lost, True
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
        if first and self.raises:
            raise OutputLost(error) from error


def as_on_disk(text: str) -> bytes:
    """The bytes of a text, those of a path among it as the file system has them."""
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


@contextmanager
def sturdy_streams() -> Iterator[None]:
    """Standard output and error that can fail: the one raises OutputLost then, the other is passed over.

    Messages without a handler are shown without control characters: a store's answer may hold them.
    """
    occupy_descriptors()
    _commands.append(None)
    earlier = sys.stdout, sys.stderr, logging.lastResort
    sys.stdout = cast(TextIO, Sturdy(earlier[0], raises=True))
    sys.stderr = cast(TextIO, Sturdy(earlier[1], raises=False))
    logging.lastResort = _LastResort(logging.WARNING)
    try:
        yield
    finally:
        sys.stdout, sys.stderr, logging.lastResort = earlier
        _commands.pop()


_commands: list[None] = []


def of_command() -> bool:
    """Whether this process only carries out a command line."""
    return bool(_commands)


class _LastResort(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(printable(record.getMessage(), None), file=sys.stderr)


def occupy_descriptors() -> None:
    """Open the null device as whichever of the descriptors 0, 1 and 2 is closed.

    Otherwise the next file or socket that is opened would get that number, and with it what libraries print.
    """
    for descriptor, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
