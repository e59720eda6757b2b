"""Say so when a Ray of our own dies under a run: Ray 2.60 ends this process then, without a word of what to do."""

from __future__ import annotations

import logging
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import ray

from ray_sampler import streams

logger = logging.getLogger(__name__)

VITAL = ("raylet", "gcs_server")
"""Processes of Ray without which a run cannot go on."""

SENTENCE = (
    "the local Ray ended unexpectedly ({name} is gone: killed, or out of memory); what was finished is kept: "
    "run the same command again to go on"
)


@contextmanager
def watched() -> Iterator[None]:
    """While a Ray of our own is used: where it dies, a command ends with one sentence and exit code 1.

    From Python the sentence is logged; what Ray raises, or its end of the process, follows.
    """
    processes = ray._private.worker._global_node.all_processes  # type: ignore[attr-defined]  # no public way in Ray 2.60
    pids = {info.process.pid: name for name in VITAL for info in processes.get(name, [])}
    pids |= {pid: "an agent" for raylet in processes.get("raylet", []) for pid in agents_of(raylet.process.pid)}
    over, stop = os.pipe()
    watcher = threading.Thread(target=watch, args=(pids, over), name="watch-ray", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.close(stop)
        watcher.join()
        os.close(over)


def agents_of(raylet: int) -> list[int]:
    """The agents of a raylet, which ends when one of them does, slowly, and ends this process before."""
    found = []
    with suppress(psutil.Error):
        for process in psutil.Process(raylet).children():
            with suppress(psutil.Error):
                if "agent" in " ".join(process.cmdline()[:4]).lower():  # a worker's first words hold no such thing
                    found.append(process.pid)
    return found


def watch(pids: dict[int, str], over: int) -> None:
    """Wait for one of the processes to end, or for the other end of the pipe `over` to be closed."""
    poll = select.poll()
    poll.register(over, select.POLLIN | select.POLLHUP)
    names: dict[int, str] = {}
    for pid, name in pids.items():
        with suppress(OSError, AttributeError):  # it is gone already, or this system tells of no process's end
            descriptor = os.pidfd_open(pid)
            names[descriptor] = name
            poll.register(descriptor, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll()]
    for descriptor in names:
        os.close(descriptor)
    if over not in ready:
        end(SENTENCE.format(name=names[ready[0]]))


def end(sentence: str) -> None:
    if not streams.of_command():
        logger.error(sentence)
        return
    cursor = "\033[?25h" if sys.stderr.isatty() else ""  # which a progress bar hides
    with suppress(OSError):
        os.write(2, f"{cursor}ray-sampler: {sentence}\n".encode())
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # Ray is about to say pages
            os.dup2(null, descriptor)
    for process in psutil.Process().children(recursive=True):  # what is left of Ray
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)
