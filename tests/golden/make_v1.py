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


def write(name: str, content: Any) -> None:
    (HERE / name).write_text(json.dumps(content, indent=1) + "\n")


def make_tables() -> None:
    table = {}
    for name, each in CONFIGURATIONS.items():
        identity = adapter.identity_of(*each)
        table[name] = each._asdict() | {"identity": identity, "fingerprint": adapter.fingerprint_of(identity)}
    write("fingerprints.json", table)
    lines = {name: {"arguments": line, "resolved": adapter.dry_run_of(line)} for name, line in COMMAND_LINES.items()}
    write("dry_run.json", lines)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pyarrow": pyarrow.__version__}
    write("machine.json", {"cpu": cpu(), "numerics_key": adapter.numerics_key(4), "versions": versions})


def make_floats() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(HERE / "tiny.safetensors", folder)
        floats = {name: adapter.floats_of(flags, FLOAT_SAMPLES) for name, flags in FLOATS.items()}
        os.chdir(HERE.parent)
    np.savez(HERE / "floats.npz", allow_pickle=False, **floats)


def make_run(name: str) -> None:
    """Do the whole run, keep its archive, and leave what stood there when only the shards of KEPT were done."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(HERE / "tiny.safetensors", folder)
        archive, _ = adapter.run(RUNS[name])
        (HERE / "archives").mkdir(exist_ok=True)
        shutil.copy(archive, HERE / "archives" / f"{name}.npz")
        target = HERE / name
        (target / "fragments").mkdir(parents=True)
        shutil.copy("run/run.json", target)
        for kept in KEPT[name]:
            path = sorted(Path("run/fragments").iterdir())[kept]
            content = adapter.read_fragment(path)
            content["computed_by"]["host"] = "host"  # the only thing in a run directory that names the machine
            data = adapter.fragment_bytes(**content, format=path.suffix[1:])
            (target / "fragments" / path.name).write_bytes(data)
        if name == "finished":
            shutil.copy(archive, target)
            shutil.copy("run/summary.json", target)
        os.chdir(HERE.parent)


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    save_file(adapter.weights_of_tiny(TINY), HERE / "tiny.safetensors")
    make_tables()
    make_floats()
    os.environ["PYTHONPATH"] = str(HERE.parents[2])  # for Ray's workers
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    for name in RUNS:
        make_run(name)
    ray.shutdown()
    sum_up()


def sum_up() -> None:
    files = sorted(path for path in HERE.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    sums = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(HERE)}\n" for path in files)
    (HERE / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main()
