"""Two processes that share no cache, and have different memory to work in, write equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp32", "fp16", "bf16")
LIMIT_S = 150


class Process:
    """`tests.gpu.compute` with separate caches."""

    def __init__(self, folder: Path, device: torch.device, *arguments: str) -> None:
        folder.mkdir()
        caches = {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        self.errors = folder / "errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.compute", "--device", device.type, *arguments],
                cwd=ROOT,
                env=os.environ | caches,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def result(self) -> dict[str, str]:
        try:
            printed, _ = self.process.communicate(timeout=LIMIT_S)
        finally:
            self.process.kill()
        assert self.process.returncode == 0, self.errors.read_text()[-3000:]
        found: dict[str, str] = json.loads(printed.splitlines()[-1])
        return found


def network(device: torch.device) -> str:
    return "digits" if device.type == "cuda" else "tiny"


def test_eager_processes_write_equal_bytes(device: torch.device, tmp_path: Path) -> None:
    arguments = ("--network", network(device), "--compile", "off")
    first = Process(tmp_path / "1", device, *arguments)
    second = Process(tmp_path / "2", device, *arguments, "--memory", "0.05")
    found = first.result(), second.result()
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(PRECISIONS)  # equal bytes would mean nothing if all were alike


def test_compiled_processes_write_equal_bytes(device: torch.device, tmp_path: Path) -> None:
    """At once, so that neither finds the other's kernels, and with other work to disturb whoever would time them."""
    precisions = PRECISIONS if device.type == "cuda" else ("fp32",)
    pairs = {
        precision: [
            Process(
                tmp_path / f"{precision}-{i}", device,
                "--network", network(device), "--compile", "auto", "--precisions", precision, "--memory", memory,
            )
            for i, memory in enumerate(("1.0", "0.05"))
        ]
        for precision in precisions
    }  # fmt: skip
    found = {precision: [each.result() for each in pair] for precision, pair in pairs.items()}
    for first, second in found.values():
        assert first == second


@pytest.mark.parametrize("precision", ["fp16"])
def test_the_published_network_compiled_in_two_processes_writes_equal_bytes(
    gpu: torch.device, tmp_path: Path, precision: str
) -> None:
    """Its reductions are of other sizes than a small network's, and meet other choices of the compiler."""
    if (os.cpu_count() or 1) < 8:
        pytest.skip(f"{os.cpu_count()} CPU cores compile it too slowly")
    arguments = ("--network", "imagenet64", "--compile", "auto", "--precisions", precision, "--batch", "16")
    first, second = (Process(tmp_path / name, gpu, *arguments) for name in "12")
    assert first.result() == second.result()
