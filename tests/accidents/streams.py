"""Carries out command lines, each in a separate process whose standard streams are closed, full or broken.

Reads a JSON list of cases from a file, `[argv, {"0" | "1" | "2": "close" | "full" | "break"}]` each, and prints what
became of each: `{"code": int, "1": text, "2": text}`, where the texts are those of the streams that were left alone.
Processes are forked, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ray_sampler.cli import main


def spoil(descriptor: int, how: str) -> None:
    """Make a descriptor what a shell makes of it with `>&-`, `>/dev/full` and `| true`."""
    if how == "close":
        os.close(descriptor)
    elif how == "full":
        os.dup2(os.open("/dev/full", os.O_RDWR), descriptor)
    else:
        reader, writer = os.pipe()
        os.dup2(writer if descriptor else reader, descriptor)
        os.close(reader)
        os.close(writer)


def as_python_opens(descriptor: int) -> IO[str] | None:
    """A standard stream as Python makes it when it starts: None where the descriptor is closed."""
    try:
        os.fstat(descriptor)
    except OSError:
        return None
    return open(descriptor, "w" if descriptor else "r", buffering=1 if descriptor == 2 else -1, closefd=False)


def in_child(argv: list[str], spoiled: dict[str, str], texts: Mapping[int, IO[bytes]]) -> int:
    for descriptor, file in texts.items():
        os.dup2(file.fileno(), descriptor)
    for name, how in spoiled.items():
        spoil(int(name), how)
    sys.stdin, sys.stdout, sys.stderr = (as_python_opens(d) for d in (0, 1, 2))
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    for stream in (sys.stdout, sys.stderr):  # as Python does at its end, which exits with 120 where that fails
        if stream is not None:
            stream.flush()
    return code


def outcome(argv: list[str], spoiled: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        texts = {1: out, 2: err}
        child = os.fork()
        if child == 0:
            code = 120
            try:
                code = in_child(argv, spoiled, texts)
            except BaseException as error:
                err.write(f"Traceback: {error!r}".encode())
                err.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in texts.values():
            file.seek(0)
        return {"code": code} | {str(d): file.read().decode() for d, file in texts.items()}


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps([outcome(argv, spoiled) for argv, spoiled in cases]))
