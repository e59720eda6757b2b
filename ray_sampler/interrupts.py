"""Ctrl-C and SIGTERM: a run winds up within seconds, whatever a library makes of the signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

WIND_UP_S = 10.0
"""What an interrupted run may take to end its actors and its Ray."""


@contextmanager
def interruptible(received: list[int], sentence: str) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into KeyboardInterrupt, and note in `received` which came.

    Winding up may take WIND_UP_S; when they are over, or at a second signal, the process says `sentence` and ends at
    once. That is safe, as a run may be killed anywhere. Only a main thread hears signals.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received:
            end_now()
        received.append(number)
        patience.start()
        raise KeyboardInterrupt

    def end_now() -> None:
        cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
        with suppress(OSError):  # a log that is closed or full
            os.write(2, f"{cursor}ray-sampler: {sentence}\n".encode())
        for process in psutil.Process().children(recursive=True):  # a local Ray's
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(128 + received[0])

    patience = threading.Timer(WIND_UP_S, end_now)
    patience.daemon = True
    handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    earlier = [signal.signal(each, interrupt) for each in handled]
    try:
        yield
    finally:
        patience.cancel()
        for each, handler in zip(handled, earlier, strict=True):
            signal.signal(each, handler)
