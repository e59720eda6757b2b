"""Write tests/golden/v2: `python -m tests.golden.make_v2`, with the code of version 2 (commit 29926fd).

The files say what version 2 did. A later version must reproduce them, so it never writes them again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray

from tests.golden import adapter
from tests.golden.make_v1 import leave, start_ray, sum_up, write, write_machine
from tests.golden.requests import HERE as V1
from tests.golden.requests_v2 import (
    COMMAND_LINES,
    COUNT,
    FRAGMENTS,
    HERE,
    INPUTS,
    KEPT,
    PICTURES,
    REFERENCE,
    RUN_JSONS,
    RUNS,
)


def place(folder: Path) -> None:
    """Put into a folder what the requests name: checkpoints, own.py, levels and labels."""
    shutil.copy(V1 / "tiny.safetensors", folder)
    for path in (*REFERENCE.iterdir(), *INPUTS.glob("*.*")):
        (folder / path.name).symlink_to(path)


def digest(array: np.ndarray) -> str:
    """SHA-256 of an array's dtype, shape and bytes."""
    return hashlib.sha256(f"{array.dtype} {array.shape} ".encode() + array.tobytes()).hexdigest()


def make_pictures() -> None:
    table: dict[str, Any] = {}
    floats = {}
    (HERE / "fragments").mkdir()
    for name, flags in PICTURES.items():
        run = adapter.run_json_of(flags)
        x, images, labels = adapter.samples_of(flags, COUNT)
        table[name] = {
            "flags": flags,
            "identity": run["identity"],
            "fingerprint": run["fingerprint"],
            "images": digest(images),
            "labels": None if labels is None else labels.tolist(),
        }
        floats[name] = x[:1]
        if name in RUN_JSONS:
            table[name]["run.json"] = run
        if name in FRAGMENTS:
            drawn = None if labels is None else labels.astype(np.int32)
            by = {"numerics_key": "a key", "device": "cpu"}
            data = adapter.fragment_bytes(8, images, drawn, run["fingerprint"], by, FRAGMENTS[name])
            folder = HERE / "fragments" / name.replace(" ", "-")
            folder.mkdir()
            (folder / f"{8:012}-{8 + COUNT:012}.{FRAGMENTS[name]}").write_bytes(data)
    write(HERE / "pictures.json", table)
    np.savez(HERE / "floats.npz", allow_pickle=False, **floats)


def main() -> None:
    if HERE.exists():
        shutil.rmtree(HERE)
    HERE.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        place(Path(folder))
        make_pictures()
        lines = {
            name: {"arguments": line, "resolved": adapter.dry_run_of(line)} for name, line in COMMAND_LINES.items()
        }
        write(HERE / "dry_run.json", lines)
        write_machine(HERE)
        start_ray()
        for name, flags in RUNS.items():
            leave(HERE, name, flags, KEPT[name])
            shutil.rmtree("run")
        ray.shutdown()
        os.chdir(HERE.parent)
    sum_up(HERE)


if __name__ == "__main__":
    main()
