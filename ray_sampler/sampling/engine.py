"""A range of sample indices becomes pictures."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.config import Architecture, Compile, Precision, Rounding, Sampling
from ray_sampler.sampling.denoiser import Network, make_denoiser
from ray_sampler.sampling.labels import LabelRule
from ray_sampler.sampling.noise import make_noise
from ray_sampler.sampling.solvers import solve


class NonFiniteError(RuntimeError):
    """The network gave infinities or NaN for some samples."""


class OutOfDeviceMemoryError(RuntimeError):
    """A batch does not fit on the device."""


@dataclass(frozen=True)
class Pictures:
    """Samples [start, stop) and what it took to compute them."""

    images: np.ndarray
    """(n, H, W, 3) uint8."""
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


def to_uint8(x: Tensor, rounding: Rounding) -> Tensor:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, truncated as guided-diffusion does or rounded as EDM2 does."""
    scaled = (x + 1) * 127.5 if rounding == "truncate" else x * 127.5 + 128
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class Engine:
    """One network on one device. Images are computed in fixed blocks [k B, (k + 1) B), so that shapes never change.

    Args:
        network: F, in the precision of the run, on `device`.
        num_samples: of the whole run; the original's generators depend on it.
        cores: CPU cores to use; a GPU ignores it.
    """

    def __init__(
        self,
        network: nn.Module,
        architecture: Architecture,
        sampling: Sampling,
        labels: LabelRule | None,
        *,
        num_samples: int,
        batch_size: int,
        device: torch.device,
        compile: Compile,
        cores: int = 1,
    ) -> None:
        self.compiles = compiles(compile, device.type == "cuda")
        self.network: Network = compiled(network, compile) if self.compiles else network
        self.architecture = architecture
        self.sampling = sampling
        self.labels = labels
        self.num_samples = num_samples
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

    def sample(self, start: int, stop: int) -> Callable[[], Pictures]:
        """Begin to compute the samples [start, stop); the returned function waits for them.

        On a GPU the work is only queued here, so the next call can queue more while an earlier result is
        awaited on another thread. Blocks that stick out of the range are computed whole and cut.

        Raises:
            OutOfDeviceMemoryError: names the batch size and what to do.
            NonFiniteError: names the samples; from the returned function.
        """
        began = time.perf_counter()
        size = self.batch_size
        try:
            blocks = list(self.workers.map(self._block, range(start // size, -(-stop // size))))
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

    def warm_up(self) -> None:
        """Compute a batch for nothing where the network is compiled, so that it is when this returns.

        Raises:
            OutOfDeviceMemoryError: names the batch size and what to do.
        """
        if self.compiles:
            with suppress(NonFiniteError):
                self.sample(0, self.batch_size)()

    @torch.inference_mode()
    def _block(self, block: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images (B, H, W, 3) uint8, labels (B,) int32 and whether all values were finite (B,), of one block."""
        sampling, shape = self.sampling, (3, self.architecture.image_size, self.architecture.image_size)
        indices = torch.arange(block * self.batch_size, (block + 1) * self.batch_size, device=self.device)
        labels = self.labels.labels(sampling.seed, indices) if self.labels else None
        finite = torch.ones(len(indices), dtype=torch.bool, device=self.device)

        def watched(x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
            output = self.network(x, times, y)
            self.evaluations += 1
            finite.logical_and_(output.isfinite().flatten(1).all(dim=1))
            return output

        denoise = make_denoiser(
            watched,
            labels,
            consistency=sampling.consistency,
            sigma_min=sampling.sigma_min,
            clip=sampling.clip_denoised,
        )
        noise = make_noise(sampling.generator, sampling.seed, self.num_samples, indices, shape)
        x = solve(sampling, denoise, noise)
        finite.logical_and_(x.isfinite().flatten(1).all(dim=1))
        return to_uint8(x, sampling.rounding), None if labels is None else labels.int(), finite

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


def numerics_key(device: torch.device, batch_size: int, precision: Precision, compile: Compile) -> str:
    """What decides a sample's last bits: runs under one key give equal bytes."""
    if device.type == "cuda":
        hardware = (
            f"{torch.cuda.get_device_name(device)}, cuda {torch.version.cuda}, cudnn {torch.backends.cudnn.version()}"
        )
    else:
        hardware = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return f"{hardware}, torch {torch.__version__}, batch {batch_size}, {precision}, compile {compile}"
