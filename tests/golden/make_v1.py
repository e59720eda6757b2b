"""Write tests/golden/v1: `python -m tests.golden.make_v1`, with the code of version 1.

The files say what version 1 did. A later version must reproduce them, so it never writes them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
import torch
from safetensors.torch import save_file

from tests.golden import adapter
from tests.golden.machine import cpu
from tests.golden.requests import COMMAND_LINES, CONFIGURATIONS, FLOAT_SAMPLES, FLOATS, HERE, KEPT, RUNS, TINY


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def make_tables() -> None:
    table = {}
    for name, each in CONFIGURATIONS.items():
        identity = adapter.identity_of(*each)
        table[name] = each._asdict() | {"identity": identity, "fingerprint": adapter.fingerprint_of(identity)}
    write(HERE / "fingerprints.json", table)
    lines = {name: {"arguments": line, "resolved": adapter.dry_run_of(line)} for name, line in COMMAND_LINES.items()}
    write(HERE / "dry_run.json", lines)
    write_machine(HERE)


def write_machine(here: Path) -> None:
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pyarrow": pyarrow.__version__}
    write(here / "machine.json", {"cpu": cpu(), "numerics_key": adapter.numerics_key(4), "versions": versions})


def make_floats() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(HERE / "tiny.safetensors", folder)
        floats = {name: adapter.samples_of(flags, FLOAT_SAMPLES)[0].clip(-1, 1) for name, flags in FLOATS.items()}
        os.chdir(HERE.parent)
    np.savez(HERE / "floats.npz", allow_pickle=False, **floats)


def make_run(name: str) -> None:
    """Do the whole run, and keep its archive and what was there when only the shards of KEPT were done."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(HERE / "tiny.safetensors", folder)
        archive = leave(HERE, name, RUNS[name], KEPT[name])
        if name == "finished":
            shutil.copy(archive, HERE / name)
            shutil.copy("run/summary.json", HERE / name)
        os.chdir(HERE.parent)


def leave(here: Path, name: str, flags: dict[str, Any], kept: list[int]) -> Path:
    """Do a run in the current directory; copy its archive and, of its directory, the shards `kept` to `here`.

    Returns:
        Where the archive is.
    """
    archive, _ = adapter.run(flags)
    (here / "archives").mkdir(exist_ok=True)
    shutil.copy(archive, here / "archives" / f"{name}.npz")
    target = here / name
    (target / "fragments").mkdir(parents=True)
    shutil.copy("run/run.json", target)
    for each in kept:
        path = sorted(Path("run/fragments").iterdir())[each]
        content = adapter.read_fragment(path)
        content["computed_by"]["host"] = "host"  # the only thing in a run directory that names the machine
        data = adapter.fragment_bytes(**content, format=path.suffix[1:])
        (target / "fragments" / path.name).write_bytes(data)
    return archive


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    save_file(adapter.weights_of_tiny(TINY), HERE / "tiny.safetensors")
    make_tables()
    make_floats()
    start_ray()
    for name in RUNS:
        make_run(name)
    ray.shutdown()
    sum_up(HERE)


def start_ray() -> None:
    os.environ["PYTHONPATH"] = str(HERE.parents[2])  # for Ray's workers
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)


def sum_up(here: Path) -> None:
    files = sorted(path for path in here.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(here)}\n" for path in files)
    (here / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
