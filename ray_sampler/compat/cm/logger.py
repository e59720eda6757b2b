"""Where a script writes: a folder, and lines on the terminal and in a file of that folder."""

from __future__ import annotations

import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_sampler.compat.ranks import rank

_folder: Path | None = None


def configure(dir: str | os.PathLike[str] | None = None, *args: Any, **kwargs: Any) -> None:
    """Choose and create the folder: `dir`, else OPENAI_LOGDIR, else a new dated one in the system's temporary folder.

    Formats and what else is given are accepted and not used: text goes to the terminal (of rank 0) and to a file.
    """
    global _folder
    chosen = dir or os.environ.get("OPENAI_LOGDIR")
    if chosen:
        folder = Path(chosen).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix=datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f-")))
    _folder = folder
    if rank() == 0:
        print(f"Logging to {folder}", flush=True)


def get_dir() -> str:
    """The folder; one is chosen where `configure` was not called."""
    if _folder is None:
        configure()
    return str(_folder)


def forget() -> None:
    """Choose anew when a folder is next asked for. Called before each script."""
    global _folder
    _folder = None


def log(*args: object, level: int = 0) -> None:
    """One line, of the arguments with spaces between, on rank 0's terminal and in log.txt (log-rank001.txt, ...).

    Args:
        level: accepted and not used.
    """
    line = " ".join(map(str, args))
    name = f"log-rank{rank():03}.txt" if rank() else "log.txt"
    with open(Path(get_dir()) / name, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    if rank() == 0:
        print(line, flush=True)
