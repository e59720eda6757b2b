"""This process: standard streams that may be closed, full or broken, and Ctrl-C and SIGTERM.

What happens to a log never decides what happens to a run, and a run winds up within seconds of a signal, whatever a
library makes of it.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, TextIO, cast

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


JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in a submitted Ray job, whose driver is killed three seconds after it was asked to stop."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

END = b"\0"
"""What the pipe says when nothing needs to be watched any more; no signal has this number."""

SAME_SIGNAL_S = 0.5
"""Some senders signal a process and then its group, so that the same request comes twice."""


def wind_up_s() -> float:
    """What an interrupted run may take to end its actors and its Ray."""
    return 2.0 if JOB_VARIABLE in os.environ else 3.0


@contextmanager
def interruptible(received: list[int], sentence: str) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and note in `received` which came.

    Winding up may take `wind_up_s()`; when they are over, or at a second signal, the process says `sentence` and ends
    at once. That is safe, as a run may be killed anywhere. Only a main thread hears signals.

    The exception may be lost: Python drops what is raised in a hook of fork or a destructor, with a traceback that is
    not shown here, and does not come to raise it while the main thread is in C. So a thread watches a pipe into which
    the system's own handler writes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked child that does not run its program yet
            os._exit(128 + number)
        signal.alarm(0)  # which Ray's C++ part may have set while it started, to abort this process
        if not received:
            received.append(number)
            raise KeyboardInterrupt

    dropped = sys.unraisablehook

    def say_dropped(lost: sys.UnraisableHookArgs) -> None:
        if not (received and isinstance(lost.exc_value, KeyboardInterrupt)):
            dropped(lost)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=watch, args=(reader, sentence), name="signals", daemon=True)
    watcher.start()
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    earlier = [signal.signal(each, interrupt) for each in SIGNALS]
    sys.unraisablehook = say_dropped
    try:
        yield
    finally:
        sys.unraisablehook = dropped
        for each, handler in zip(SIGNALS, earlier, strict=True):
            signal.signal(each, handler)
        signal.set_wakeup_fd(woken)
        os.write(writer, END)
        watcher.join()
        os.close(writer)
        os.close(reader)


def watch(reader: int, sentence: str) -> None:
    """End the process if it does not end by itself in time after a signal, or at a second one."""
    byte = b""
    while byte != END and not is_ours(byte):  # others have handlers too
        byte = os.read(reader, 1)
    if byte == END:
        return
    number, began = byte[0], time.monotonic()
    while (left := began + wind_up_s() - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        byte = os.read(reader, 1)
        if byte == END:
            return
        if is_ours(byte) and time.monotonic() - began > SAME_SIGNAL_S:
            break
    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
    with suppress(OSError):  # it may have no reader
        os.write(2, f"{cursor}ray-sampler: {sentence}\n".encode())
    end_now(128 + number)


def is_ours(byte: bytes) -> bool:
    """Whether the pipe says that one of our signals came."""
    return byte != b"" and byte[0] in SIGNALS


def end_now(code: int) -> NoReturn:
    """End this process at once; a local Ray ends with it."""
    os._exit(code)
