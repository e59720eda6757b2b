"""Ctrl-C and SIGTERM: a run winds up within seconds, whatever a library makes of the signal."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

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
