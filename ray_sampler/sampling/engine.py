"""A range of sample indices becomes pictures, block by block, on a device."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.errors import require
from ray_sampler.options import option
from ray_sampler.sampling.parameterisation import Network
from ray_sampler.sampling.plan import SamplePlan, sample_block

Compile = Literal["auto", "on", "off"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a device computes."""

    batch_size: int = option(16, "Images that one actor computes at once.")
    compile: Compile = option(
        "auto", "torch.compile: off, on (kernels chosen by timing), or auto (on a GPU, without timing)."
    )

    def validate(self) -> None:
        """Raises RequestError: a value is wrong."""
        require(self.batch_size >= 1, f"--batch_size is {self.batch_size}; it must be at least 1")


class NonFiniteError(RuntimeError):
    """The network gave infinities or NaN for some samples."""


class OutOfDeviceMemoryError(RuntimeError):
    """A batch does not fit on the device."""


@dataclass(frozen=True)
class Pictures:
    """Samples [start, stop) and what it took to compute them."""

    images: np.ndarray
    """(n, H, W, C), uint8 or float32 as the decoder says."""
    labels: np.ndarray | None
    """(n,) int32; None for an unconditional model."""
    seconds: float


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
"""Parameters of glibc's mallopt, from its malloc.h."""
KEPT_BYTES = 2**30
"""Freed memory that a process keeps, and the largest block that is taken from it."""


def keep_freed_memory() -> None:
    """Let this process reuse the memory of activations, where the C library is glibc.

    It gives large blocks back to the kernel as soon as they are freed, so every layer would wait for fresh pages to
    be mapped and cleared: up to a sixth of a forward pass. Threads share one heap, as one of their own holds 64 MiB.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


class Engine:
    """Networks on one device. Images are computed in fixed blocks [k B, (k + 1) B), so that shapes never change.

    Args:
        networks: by role, each F in the precision of the run, on `device`.
        cores: CPU cores to use; a GPU ignores it.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        *,
        batch_size: int,
        device: torch.device,
        compile: Compile,
        cores: int = 1,
    ) -> None:
        self.compiles = compiles(compile, device.type == "cuda")
        self.networks: dict[str, Network] = {
            role: compiled(network, compile) if self.compiles else network for role, network in networks.items()
        }
        self.batch_size = batch_size
        self.device = device
        self.evaluations = 0
        """Calls of the network so far, about: several threads count. A number that rises shows that work goes on."""
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Splitting an operation among threads changes its last bits (seen in convolution, GroupNorm and SiLU), so
        # a CPU's cores work on a block each. A GPU has one thread: grad mode and CUDA graph pools are per thread.
        if device.type == "cpu":
            keep_freed_memory()
        self.workers = (
            ThreadPoolExecutor(1, "compute")
            if self.copies
            else ThreadPoolExecutor(cores, "compute", initializer=torch.set_num_threads, initargs=(1,))
        )

    def sample(self, plan: SamplePlan, start: int, stop: int) -> Callable[[], Pictures]:
        """Begin to compute the samples [start, stop) of a plan; the returned function waits for them.

        On a GPU the work is only queued here, so the next call can queue more while an earlier result is
        awaited on another thread. Blocks that stick out of the range are computed whole and cut.

        Raises:
            OutOfDeviceMemoryError: names the batch size and what to do.
            NonFiniteError: names the samples; from the returned function.
        """
        began = time.perf_counter()
        size = self.batch_size
        try:
            numbers = range(start // size, -(-stop // size))
            blocks = list(self.workers.map(lambda block: self._block(plan, block), numbers))
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemoryError(
                f"{self.device} ran out of memory with --batch_size {size}; "
                + (f"try --batch_size {size // 2}, or " if size > 1 else "try ")
                + "--precision fp16 if this is fp32"
            ) from error
        first = start // size * size
        images, labels, finite = (
            None if parts[0] is None else torch.cat(parts)[start - first : stop - first]
            for parts in zip(*blocks, strict=True)
        )
        on_host = self._copy(images, labels, finite)

        def finish() -> Pictures:
            images, labels, finite = on_host()
            if not finite.all():
                wrong = start + np.flatnonzero(~finite)
                shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
                raise NonFiniteError(
                    f"the network gave non-finite values for {len(wrong)} of the samples {start} to {stop - 1}: {shown}"
                )
            return Pictures(images, None if labels is None else labels, time.perf_counter() - began)

        return finish

    def warm_up(self, plan: SamplePlan) -> None:
        """Compute a batch for nothing where networks are compiled, so that they are when this returns.

        Raises:
            OutOfDeviceMemoryError: names the batch size and what to do.
        """
        if self.compiles:
            with suppress(NonFiniteError):
                self.sample(plan, 0, self.batch_size)()

    @torch.inference_mode()
    def _block(self, plan: SamplePlan, block: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images (B, H, W, C), labels (B,) int32 and whether all values were finite (B,), of one block."""
        indices = torch.arange(block * self.batch_size, (block + 1) * self.batch_size, device=self.device)
        finite = torch.ones(len(indices), dtype=torch.bool, device=self.device)

        def watched(network: Network) -> Network:
            def watch(x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
                output = network(x, times, y)
                self.evaluations += 1
                # A doubled batch, for guidance, holds every sample twice.
                finite.logical_and_(output.isfinite().flatten(1).all(dim=1).view(-1, len(finite)).all(dim=0))
                return output

            return watch

        x, labels = sample_block({role: watched(network) for role, network in self.networks.items()}, plan, indices)
        finite.logical_and_(x.isfinite().flatten(1).all(dim=1))
        return plan.decoder.decode(x), None if labels is None else labels.int(), finite

    def _copy(self, *tensors: Tensor | None) -> Callable[[], tuple[np.ndarray, np.ndarray | None, np.ndarray]]:
        """Bring results to the host without holding up what is queued next; the returned function waits for them."""
        if self.copies is None:
            arrays = tuple(None if t is None else t.numpy() for t in tensors)
            return lambda: arrays  # type: ignore[return-value]
        self.copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copies):
            host = [None if t is None else torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
            for source, target in zip(tensors, host, strict=True):
                if source is not None and target is not None:
                    target.copy_(source, non_blocking=True)
                    source.record_stream(self.copies)
            arrived = self.copies.record_event()

        def wait() -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
            arrived.synchronize()
            return tuple(None if t is None else t.numpy() for t in host)  # type: ignore[return-value]

        return wait


def compiles(mode: Compile, gpu: bool) -> bool:
    """Whether the network is compiled on a device of this kind."""
    return mode == "on" or (mode == "auto" and gpu)


def compiled(network: nn.Module, mode: Compile) -> Network:
    """The network under torch.compile: with kernels chosen by timing (on), or without (auto)."""
    return torch.compile(network, mode="max-autotune" if mode == "on" else "default", dynamic=False)


def numerics_key(device: torch.device, batch_size: int, precision: str, compile: Compile) -> str:
    """What decides a sample's last bits: runs under one key give equal bytes."""
    if device.type == "cuda":
        hardware = (
            f"{torch.cuda.get_device_name(device)}, cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
        )
    else:
        hardware = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{hardware}, torch {torch.__version__}, batch {batch_size}, {precision}, compile {compile}"
