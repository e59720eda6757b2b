"""A device's memory: a process's share of it, and how it is told that it ran out."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt, from its malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory that a process keeps, and the largest block that is taken from it."""

CONTEXT_BYTES = 2**30
"""What a process has on a GPU outside of torch's allocator, about: CUDA's context, loaded kernels, cuBLAS and cuDNN."""

SIGNS = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "DefaultCPUAllocator: can't allocate")
"""By which libraries say that memory ran out: CUDA's runtime and drivers, cuBLAS, cuDNN 8 and 9, torch on a CPU."""


class OutOfDeviceMemoryError(RuntimeError):
    """Something does not fit on the device; the message says what to do."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of memory, or was caused by one: the compiler and libraries wrap theirs."""
    return any(
        isinstance(each, torch.OutOfMemoryError | MemoryError)
        or (isinstance(each, RuntimeError) and any(sign in str(each) for sign in SIGNS))
        for each in causes(error)
    )


def causes(error: BaseException | None, known: tuple[BaseException, ...] = ()) -> Iterator[BaseException]:
    """An error, and those behind it; `known` are those before it."""
    if error is not None and error not in known:
        yield error
        for behind in {error.__cause__, error.__context__, getattr(error, "inner_exception", None)}:
            yield from causes(behind, (*known, error))


def take_share(device: torch.device, gpus: float) -> None:
    """Keep this process's tensors within its share of a GPU, where it has only a fraction `gpus` of one."""
    if device.type == "cuda" and 0 < gpus < 1:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(share_of(gpus, total))


def share_of(gpus: float, total: int) -> float:
    """The fraction of a GPU of `total` bytes that torch may allocate, so that as many processes as fit by `gpus` do."""
    return max(gpus - CONTEXT_BYTES / total, gpus / 2)


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory of the host that a GPU copies into by itself; the first dimension is a shard's samples.

    Raises:
        OutOfDeviceMemoryError: the host has none left; no other batch size would change that.
    """
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        size = torch.Size(shape).numel() * dtype.itemsize
    raise OutOfDeviceMemoryError(
        f"the host cannot page-lock {size / 2**20:.0f} MiB of memory, into which the GPU copies the {shape[0]} samples "
        "of a shard; try a smaller --shard_size, or a host or container with more memory"
    )


def keep_freed_memory() -> None:
    """Let this process reuse the memory of activations, where the C library is glibc.

    It gives large blocks back to the kernel as soon as they are freed, so every layer would wait for fresh pages to
    be mapped and cleared: up to a sixth of a forward pass. Threads share one heap, since a separate one takes 64 MiB.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
