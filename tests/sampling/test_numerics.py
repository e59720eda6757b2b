"""Equal work gives equal bits where torch is set for it, and the numerics key separates what may not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_sampler.sampling.engine import compiled
from ray_sampler.sampling.numerics import INDUCTOR_WITHOUT_TIMING, cpu_kind, numerics_key

CPU = torch.device("cpu")

CPUINFO = """processor\t: 0
vendor_id\t: {vendor}
cpu family\t: 6
model\t\t: 143
model name\t: {name}
flags\t\t: fpu avx2 avx512f{more}

processor\t: 1
model name\t: another
"""


def kind(tmp_path: Path, vendor: str = "GenuineIntel", name: str = "A Xeon", more: str = "") -> str:
    path = tmp_path / f"cpuinfo-{vendor}-{name}{more}"
    path.write_text(CPUINFO.format(vendor=vendor, name=name, more=more))
    return cpu_kind(str(path))


def test_a_cpu_is_told_by_its_model_and_by_the_kernels_that_it_takes(tmp_path: Path) -> None:
    intel = kind(tmp_path)
    assert "A Xeon" in intel
    assert torch.backends.cpu.get_cpu_capability() in intel
    others = {
        kind(tmp_path, vendor="AuthenticAMD"),
        kind(tmp_path, name="Another Xeon"),
        kind(tmp_path, more=" amx_tile"),
        cpu_kind(str(tmp_path / "missing")),
    }
    assert len(others | {intel}) == 5


def test_the_key_names_what_decides_the_last_bits() -> None:
    key = numerics_key(CPU, 16, "fp32", "off")
    assert torch.__version__ in key
    others = {
        numerics_key(CPU, 8, "fp32", "off"),
        numerics_key(CPU, 16, "bf16", "off"),
        numerics_key(CPU, 16, "fp32", "on"),
    }
    assert len(others | {key}) == 4


def test_on_a_cpu_auto_is_off_and_has_its_key() -> None:
    assert numerics_key(CPU, 16, "fp32", "auto") == numerics_key(CPU, 16, "fp32", "off")


PRINT_SETTINGS = """
import os, torch
from ray_sampler.sampling import numerics
for device, compile in (("cpu", "auto"), ("cuda", "on"), ("cuda", "off"), ("cuda", "auto")):
    numerics.pin(torch.device(device), compile)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    print(device, compile, torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
          matmul.allow_tf32 or cudnn.allow_tf32, matmul.allow_fp16_reduced_precision_reduction,
          os.environ.get("CUBLAS_WORKSPACE_CONFIG"), torch.cuda.is_initialized())
"""


def test_torch_is_set_before_it_touches_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(
        [sys.executable, "-c", PRINT_SETTINGS], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == [
        "cpu auto False True False False True None False",
        "cuda on False False True False False None False",  # as fast as it can be
        "cuda off True True False False False :4096:8 False",
        "cuda auto True True False False False :4096:8 False",
    ], done.stderr


def test_every_option_that_keeps_torch_compile_from_timing_is_one_of_this_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.compile refuses others."""
    compiled(torch.nn.Identity(), "auto")
    monkeypatch.setitem(INDUCTOR_WITHOUT_TIMING, "of_another_torch", True)
    with pytest.raises(RuntimeError, match="of_another_torch"):
        compiled(torch.nn.Identity(), "auto")
