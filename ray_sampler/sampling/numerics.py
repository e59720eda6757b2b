"""What decides the last bits of a sample, in one place: how torch is set before it computes, and the numerics key."""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ray_sampler.sampling.options import Compile

CUBLAS_WORKSPACE = ":4096:8"
"""Buffers that cuBLAS works in; a fixed set of them makes it give equal bits (cuBLAS manual, "Reproducibility")."""

INDUCTOR_WITHOUT_TIMING: dict[str, Any] = {
    "deterministic": True,
    "dynamic_scale_rblock": False,
    "shape_padding": False,
    "benchmark_fusion": False,
    "benchmark_epilogue_fusion": False,
    "max_autotune": False,
    "coordinate_descent_tuning": False,
}
"""Options of torch.compile under which no kernel that changes bits is chosen by timing."""

CPU_FIELDS = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU part")
"""What names a CPU's kind in /proc/cpuinfo, on x86 and on Arm."""


def compiles(mode: Compile, gpu: bool) -> bool:
    """Whether the network is compiled on a device of this kind."""
    return mode == "on" or (mode == "auto" and gpu)


def pin(device: torch.device, compile: Compile) -> None:
    """Set torch so that equal work gives equal bits on equal devices, or with compile "on" as fast as it can be.

    To be called once, before anything touches a GPU. Operations without a deterministic form, which a user's network
    may have, warn and continue.
    """
    timed = compile == "on"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = False
    cudnn.allow_tf32 = False
    cudnn.benchmark = timed
    cudnn.deterministic = not timed
    if device.type != "cuda":
        return
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_accumulation = False
    torch.use_deterministic_algorithms(not timed, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module property
    if not timed:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
        # Its plans depend on the memory that is free; flash attention has one.
        torch.backends.cuda.enable_cudnn_sdp(False)


def numerics_key(device: torch.device, batch_size: int, precision: str, compile: Compile) -> str:
    """What decides a sample's last bits: runs under one key give equal bytes, unless it says "timed"."""
    gpu = device.type == "cuda"
    how = f"compile {compile}" if compiles(compile, gpu) else "compile off"
    if gpu and compile == "on":
        how += ", timed"
    hardware = gpu_kind(device, how) if gpu else cpu_kind()
    return f"{hardware}, torch {torch.__version__}, batch {batch_size}, {precision}, {how}"


def gpu_kind(device: torch.device, how: str = "") -> str:
    """Model and compute capability of a GPU, and the libraries that compute on it."""
    properties = torch.cuda.get_device_properties(device)
    made_by = [f"cuda {torch.version.cuda}", f"cudnn {torch.backends.cudnn.version()}"]
    if how != "compile off":
        made_by.append(f"triton {triton_version()}")
    return ", ".join([properties.name, f"capability {properties.major}.{properties.minor}", *made_by])


def triton_version() -> str:
    """Of the compiler that Inductor writes for; none where it is missing."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@lru_cache
def cpu_kind(cpuinfo: str = "/proc/cpuinfo") -> str:
    """A CPU's model and the kernels that torch takes on it; other libraries choose theirs by the model."""
    path = Path(cpuinfo)
    first = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first)}
    numbers = " ".join(found[name] for name in CPU_FIELDS if name in found)
    model = found.get("model name") or platform.processor() or platform.machine()
    kernels = torch.backends.cpu.get_cpu_capability()
    if "amx_tile" in found.get("flags", "").split():
        kernels += " with AMX"
    return f"cpu {model}{f' ({numbers})' if numbers else ''}, {kernels}"
