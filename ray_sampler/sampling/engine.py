"""A range of sample indices becomes pictures, block by block, on a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.sampling.clock import Mark, mark, seconds_between
from ray_sampler.sampling.memory import (
    OutOfDeviceMemoryError,
    keep_freed_memory,
    page_locked,
    ran_out_of_memory,
    release,
)
from ray_sampler.sampling.numerics import compiles
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.parameterisation import Network
from ray_sampler.sampling.plan import SamplePlan, sample_block

__all__ = ["Engine", "NonFiniteError", "OutOfDeviceMemoryError", "Pictures", "compiled"]

PROBED_CALLS = 2
"""Calls of the network after which a batch that is tried for its memory is known to fit: no later one takes more."""


class NonFiniteError(RuntimeError):
    """The network gave infinities or NaN for some samples."""


@dataclass(frozen=True)
class Pictures:
    """Samples [start, stop) and what it took to compute them."""

    images: np.ndarray
    """(n, H, W, C), uint8 or float32 as the decoder says."""
    labels: np.ndarray | None
    """(n,) int32; None for an unconditional model."""
    seconds: float
    """That the device computed them."""
    idle_s: float = 0.0
    """Seconds that the device had nothing to do before; 0 for the first."""


class _Enough(Exception):
    """A batch that was tried has been computed as far as was wanted."""


Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray]
"""Images, labels, and whether all values were finite."""


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
        self.plain: Mapping[str, Network] = networks
        self.networks: Mapping[str, Network] = (
            {role: compiled(network, compile) for role, network in networks.items()} if self.compiles else networks
        )
        # CUDA graphs come with chosen kernels: they are recorded at the second call, and reuse the memory of results.
        self.graphs = compile == "on" and device.type == "cuda"
        self.batch_size = batch_size
        self.device = device
        self.evaluations = 0
        """Calls of the network so far, about: several threads count. A number that rises shows that work goes on."""
        self.ended: Mark | None = None
        """When the device is done with what was queued last; None before that."""
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Splitting an operation among threads changes its last bits (seen in convolution, GroupNorm and SiLU), so
        # a CPU's cores work on a block each. A GPU's work is queued by the one thread that calls `sample`: grad mode
        # and CUDA graph pools are per thread.
        self.workers: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            keep_freed_memory()
            self.workers = ThreadPoolExecutor(cores, "compute", initializer=torch.set_num_threads, initargs=(1,))

    def sample(self, plan: SamplePlan, start: int, stop: int) -> Callable[[], Pictures]:
        """Begin to compute the samples [start, stop) of a plan; the returned function waits for them.

        On a GPU the work is only queued here, so the next call can queue more while an earlier result is
        awaited on another thread; all calls must come from one thread. Blocks that stick out of the range are
        computed whole and cut.

        Raises:
            OutOfDeviceMemoryError: names the batch size and one that fits, or says that the host lacks memory.
            NonFiniteError: names the samples; from the returned function.
        """
        size = self.batch_size
        try:
            before, began = self.ended, mark(self.device)
            arrive = self._compute(plan, range(start // size, -(-stop // size)))
            self.ended = ended = mark(self.device)
        except Exception as error:
            self.ended = None
            if isinstance(error, OutOfDeviceMemoryError) or not ran_out_of_memory(error):
                raise
            # What is raised below must not hold this error: its frames hold the tensors that took the memory.
            arrive = None
        if arrive is None:
            raise OutOfDeviceMemoryError(self._advice(plan))
        first = start // size * size

        def finish() -> Pictures:
            images, labels, finite = arrive()
            images, finite = images[start - first : stop - first], finite[start - first : stop - first]
            labels = None if labels is None else labels[start - first : stop - first]
            if not finite.all():
                wrong = start + np.flatnonzero(~finite)
                shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
                raise NonFiniteError(
                    f"the network gave non-finite values for {len(wrong)} of the samples {start} to {stop - 1}: {shown}"
                )
            idle_s = 0.0 if before is None else seconds_between(before, began)
            return Pictures(images, labels, seconds_between(began, ended), idle_s)

        return finish

    def warm_up(self, plan: SamplePlan) -> None:
        """Compute a batch for nothing where networks are compiled, so that they are when this returns.

        Raises:
            OutOfDeviceMemoryError: names the batch size and one that fits.
        """
        if self.compiles:
            for _ in range(2 if self.graphs else 1):
                with suppress(NonFiniteError):
                    self.sample(plan, 0, self.batch_size)()
            self.ended = None

    def _compute(self, plan: SamplePlan, blocks: Sequence[int]) -> Callable[[], Arrays]:
        """Compute blocks, or queue them on a GPU; the returned function waits for them, padding and all."""
        if self.workers is None:
            return self._queue(plan, blocks)
        parts = self.workers.map(lambda block: self._block(plan, block), blocks)
        joined = [None if tensors[0] is None else torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True)]
        return lambda: tuple(joined)  # type: ignore[return-value]

    def _queue(self, plan: SamplePlan, blocks: Sequence[int]) -> Callable[[], Arrays]:
        """Queue blocks on a GPU; each comes back on a stream of its own while the next is computed."""
        assert self.copies is not None
        size, host = self.batch_size, list[Tensor | None]()
        for place, block in enumerate(blocks):
            tensors = self._block(plan, block)
            if not host:
                host = [
                    None if t is None else page_locked((size * len(blocks), *t.shape[1:]), t.dtype) for t in tensors
                ]
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                for source, target in zip(tensors, host, strict=True):
                    if source is not None and target is not None:
                        target[place * size : (place + 1) * size].copy_(source, non_blocking=True)
                        source.record_stream(self.copies)
        arrived = torch.cuda.Event(blocking=True)  # so that a thread that waits for it leaves its core to others
        arrived.record(self.copies)

        def wait() -> Arrays:
            arrived.synchronize()
            return tuple(None if t is None else t.numpy() for t in host)  # type: ignore[return-value]

        return wait

    @torch.inference_mode()
    def _block(self, plan: SamplePlan, block: int, probe: int | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images (B, H, W, C), labels (B,) int32 and whether all values were finite (B,), of one block.

        Args:
            probe: try this batch size instead, without compiling, as far as memory is concerned.

        Raises:
            _Enough: that fits.
        """
        size = probe or self.batch_size
        indices = torch.arange(block * size, (block + 1) * size)
        finite = torch.ones(size, dtype=torch.bool, device=self.device)
        # Where only some levels are guided, the doubled batch may come late.
        enough = self.evaluations + PROBED_CALLS if probe and plan.guidance.guidance == 1 else None

        def watched(network: Network) -> Network:
            def watch(x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
                # A compiler takes another layout of x for another network.
                output = network(x.contiguous() if self.compiles else x, times, y)
                if self.graphs:
                    output = output.clone()
                self.evaluations += 1
                # A doubled batch, for guidance, holds every sample twice.
                finite.logical_and_(output.isfinite().flatten(1).all(dim=1).view(-1, len(finite)).all(dim=0))
                if enough is not None and self.evaluations >= enough:
                    raise _Enough
                return output

            return watch

        networks = self.plain if probe else self.networks
        watches = {role: watched(network) for role, network in networks.items()}
        x, labels = sample_block(watches, plan, indices, self.device)
        finite.logical_and_(x.isfinite().flatten(1).all(dim=1))
        return plan.decoder.decode(x), None if labels is None else labels.int(), finite

    def _advice(self, plan: SamplePlan) -> str:
        """What to do about a batch that does not fit."""
        size = self.batch_size
        said = f"{self.device} ran out of memory with --batch_size {size}"
        fits = size // 2
        while fits and not self._fits(plan, fits):
            fits //= 2
        if fits:
            return f"{said}; try --batch_size {fits}, which fits, or --precision fp16 if this is fp32"
        smaller = ", and with every smaller one that was tried" if size > 1 else ""
        return f"{said}{smaller}; try --precision fp16 if this is fp32, or a device with more memory"

    def _fits(self, plan: SamplePlan, size: int) -> bool:
        """Whether a batch of this size fits; it is tried."""
        release(self.device)
        try:
            self._block(plan, 0, size)
            release(self.device)  # what was only queued has run
        except _Enough:
            pass
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            return False
        return True


def why_not_compiled(error: Exception) -> str | None:
    """What torch.compile says in its first line where it failed, as without a C compiler; None for another error."""
    if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return None
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def compiled(network: nn.Module, mode: Compile) -> Network:
    """The network under torch.compile: with kernels chosen by timing (on), or without (auto)."""
    return torch.compile(network, mode="max-autotune" if mode == "on" else "default", dynamic=False)
