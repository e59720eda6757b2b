"""Run a script that was written for the consistency-models repository, without one edit."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch.distributed as dist

from ray_sampler.compat import cm
from ray_sampler.compat.cm import logger
from ray_sampler.errors import RequestError, require

USAGE = """usage: python -m ray_sampler.compat SCRIPT [ARGS]

Run a sampling script that was written for the consistency-models repository, without one edit: its imports from cm
find the modules of this package. One process runs it; several GPUs are used with
torchrun --nproc_per_node N -m ray_sampler.compat SCRIPT [ARGS]
OPENAI_LOGDIR names the folder that the script writes to."""

LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Variables in which MPI launchers give the number of processes."""


def main(argv: Sequence[str]) -> int:
    """Run argv[0] as __main__ with the arguments that follow it.

    Returns:
        0, or 2 where the request is wrong, which one sentence on stderr explains. The script's own exceptions and
        SystemExit pass through.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    script = argv[0]
    try:
        check_launcher(script)
        there = os.path.isfile(script) and os.access(script, os.R_OK)
        require(there, f"SCRIPT is {script}; it must be the path of a Python script that can be read")
        run_script(script, argv[1:])
    except RequestError as error:
        print(f"ray_sampler.compat: {error}{place(error, script)}", file=sys.stderr)
        return 2
    return 0


def check_launcher(script: str) -> None:
    """Raises RequestError: an MPI launcher started several processes, and each would take itself for the only one."""
    if "RANK" in os.environ:
        return
    for name in LAUNCHERS:
        size = os.environ.get(name, "1")
        require(
            size == "1",
            f"{name} is {size}: an MPI launcher started this process, and MPI is not used here; "
            f"start it with torchrun --nproc_per_node {size} -m ray_sampler.compat {script}",
        )


def place(error: RequestError, script: str) -> str:
    """The last line of the script on the way to an error, in parentheses; nothing where it had not begun."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == script]
    return f" ({script}, line {lines[-1]})" if lines else ""


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a file as Python runs a script: as __main__, with its arguments in sys.argv and its folder on sys.path."""
    argv, path = sys.argv, sys.path.copy()
    distributed = dist.is_initialized()
    logger.forget()
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        with standing_in(stand_ins()):
            runpy.run_path(script, run_name="__main__")
        if dist.is_initialized() and not distributed:
            # After a failure this could wait for the other ranks, which torchrun is about to end.
            dist.destroy_process_group()
    finally:
        sys.argv, sys.path[:] = argv, path


def stand_ins() -> dict[str, ModuleType]:
    """The modules that a script finds under other names: ours of `cm`, and of mpi4py where that is not installed."""
    found = {"cm": cm}
    for module in pkgutil.iter_modules(cm.__path__):
        found[f"cm.{module.name}"] = importlib.import_module(f"{cm.__name__}.{module.name}")
    if importlib.util.find_spec("mpi4py") is None:
        mpi4py = ModuleType("mpi4py", "A stand-in for mpi4py, which is not installed.")
        mpi4py.MPI = found["mpi4py.MPI"] = importlib.import_module("ray_sampler.compat.mpi")  # type: ignore[attr-defined]
        found["mpi4py"] = mpi4py
    return found


@contextmanager
def standing_in(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Within this context imports of the names of `modules`, and of what would be inside them, find these alone."""
    packages = {name.partition(".")[0] for name in modules}

    def loaded() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in packages}

    def replace(by: dict[str, ModuleType]) -> None:
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(by)

    before = loaded()
    replace(modules)
    try:
        yield
    finally:
        replace(before)
