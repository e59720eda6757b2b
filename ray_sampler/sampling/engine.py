"""A range of sample indices becomes columns, block by block, on a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import local
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ray_sampler.networks.called import Called
from ray_sampler.sampling.finish import SOUND, Finish
from ray_sampler.sampling.memory import OutOfDeviceMemoryError, keep_freed_memory, page_locked, ran_out_of_memory
from ray_sampler.sampling.numerics import INDUCTOR_WITHOUT_TIMING, compiles
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.parameterisation import Network
from ray_sampler.sampling.plan import GUIDE, MAIN, SamplePlan, sample_block

__all__ = ["Engine", "NonFiniteError", "OutOfDeviceMemoryError", "Pictures", "compiled"]

Key = tuple[str, str]
"""A product and one of its columns; the first is OWN for a run's own columns."""
OWN, FAULT = "", ("", "")
"""FAULT: whose the first value of each sample was that is not finite, a place in FAULTS; 0 where all are finite."""
FAULTS = (
    "",
    "the network gave non-finite values for {}",
    "solver {solver} made non-finite values of the network's finite ones for {}; give other levels, or --state fp64",
    "the finisher made non-finite values of the solver's finite results for {}",
)
NETWORK, SOLVER, FINISHER = 1, 2, 3


class NonFiniteError(RuntimeError):
    """Some samples have infinities or NaN; says whether the network made them, the solver, or the finisher."""


@dataclass(frozen=True)
class Pictures:
    """Samples [start, stop) and what it took to compute them."""

    columns: Mapping[str, np.ndarray]
    """By name, each (n, ...): image, the condition (for example label), and what the finisher adds."""
    seconds: float
    """That the device computed them."""
    idle_s: float = 0.0
    """Seconds that the device had nothing to do before; 0 for the first."""
    products: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    """Columns of what else was made of the solver's results, by product."""


class Engine:
    """Networks on one device. Images are computed in fixed blocks [k B, (k + 1) B), so that shapes never change.

    Args:
        networks: by role, each F in the precision of the run, on `device`; those that a finisher asks have roles of
            their own.
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
        self.networks = networks
        """By role, as they are."""
        self.asked = {role: network for role, network in networks.items() if role in (MAIN, GUIDE)}
        """Those that a solver asks, by role."""
        self.mode: Compile = compile
        self.called = {role: self._compiled(network) for role, network in self.asked.items()}
        self.mine = local()
        """What a thread calls: separate copies of networks that may keep state between calls."""
        # CUDA graphs come with chosen kernels: they are recorded at the second call, and reuse the memory of results.
        self.graphs = compile == "on" and device.type == "cuda"
        self.batch_size = batch_size
        self.device = device
        self.evaluations = 0
        """Calls of the network so far, about: several threads count. A rising number shows progress."""
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

    def sample(
        self, plan: SamplePlan, start: int, stop: int, products: Mapping[str, Finish] | None = None
    ) -> Callable[[], Pictures]:
        """Begin to compute the samples [start, stop) of a plan; the returned function waits for them.

        On a GPU the work is only queued here, so the next call can queue more while an earlier result is
        awaited on another thread; all calls must come from one thread. Blocks that stick out of the range are
        computed whole and cut.

        Args:
            products: what else to make of the solver's results, by name.

        Raises:
            OutOfDeviceMemoryError: names the batch size and what to try, or says that the host lacks memory.
            NonFiniteError: names the samples; from the returned function.
        """
        size = self.batch_size
        try:
            before, began = self.ended, mark(self.device)
            arrive = self._compute(plan, products or {}, range(start // size, -(-stop // size)))
            self.ended = ended = mark(self.device)
        except Exception as error:
            self.ended = None
            if isinstance(error, OutOfDeviceMemoryError) or not ran_out_of_memory(error):
                raise
            # What is raised below must not hold this error: its frames hold the tensors that took the memory.
            arrive = None
        if arrive is None:
            less, device = (
                (f"--batch_size {size // 2}, or ", "") if size > 1 else ("", ", or a device with more memory")
            )
            raise OutOfDeviceMemoryError(
                f"{self.device} ran out of memory with --batch_size {size}; try {less}--precision fp16 if this is "
                f"fp32{device}"
            )

        def finish() -> Pictures:
            first = start // size * size
            arrays = {key: array[start - first : stop - first] for key, array in arrive().items()}
            if (fault := arrays.pop(FAULT)).any():
                wrong = start + np.flatnonzero(fault)
                shown = ", ".join(map(str, wrong[:8])) + (", ..." if len(wrong) > 8 else "")
                samples = f"{len(wrong)} of the samples {start} to {stop - 1}: {shown}"
                raise NonFiniteError(FAULTS[fault[fault > 0].min()].format(samples, solver=plan.sampler))
            made: dict[str, dict[str, np.ndarray]] = {name: {} for name in (OWN, *(products or ()))}
            for (product, column), array in arrays.items():
                made[product][column] = array
            idle_s = 0.0 if before is None else seconds_between(before, began)
            return Pictures(made.pop(OWN), seconds_between(began, ended), idle_s, made)

        return finish

    def warm_up(self, plan: SamplePlan) -> None:
        """Compute a batch for nothing where networks are compiled, so that they are when this returns.

        Raises:
            OutOfDeviceMemoryError: as of `sample`.
        """
        if self.compiles:
            for _ in range(2 if self.graphs else 1):
                with suppress(NonFiniteError):
                    self.sample(plan, 0, self.batch_size)()
            self.ended = None

    def _compute(
        self, plan: SamplePlan, products: Mapping[str, Finish], blocks: Sequence[int]
    ) -> Callable[[], Mapping[Key, np.ndarray]]:
        """Compute blocks, or queue them on a GPU; the returned function waits for them, padding and all."""
        if self.workers is None:
            return self._queue(plan, products, blocks)
        parts = list(self.workers.map(lambda block: self._block(plan, products, block), blocks))
        joined = {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}
        return lambda: joined

    def _queue(
        self, plan: SamplePlan, products: Mapping[str, Finish], blocks: Sequence[int]
    ) -> Callable[[], Mapping[Key, np.ndarray]]:
        """Queue blocks on a GPU; each comes back on a separate stream while the next is computed."""
        assert self.copies is not None
        size, host = self.batch_size, dict[Key, Tensor]()
        for place, block in enumerate(blocks):
            tensors = self._block(plan, products, block)
            if not host:
                host = {key: page_locked((size * len(blocks), *t.shape[1:]), t.dtype) for key, t in tensors.items()}
            self.copies.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.copies):
                for key, source in tensors.items():
                    host[key][place * size : (place + 1) * size].copy_(source, non_blocking=True)
                    source.record_stream(self.copies)
        arrived = torch.cuda.Event(blocking=True)  # so that a thread that waits for it leaves its core to others
        arrived.record(self.copies)

        def wait() -> Mapping[Key, np.ndarray]:
            arrived.synchronize()
            return {key: tensor.numpy() for key, tensor in host.items()}

        return wait

    def _called(self) -> Mapping[str, Network]:
        """The networks that this thread calls, by role, as they were after loading."""
        if not hasattr(self.mine, "called"):
            stateful = {role: network for role, network in self.asked.items() if isinstance(network, Called)}
            if self.workers is not None:
                stateful = {role: network.another() for role, network in stateful.items()}
            self.mine.stateful = stateful.values()
            own = {role: self._compiled(network) for role, network in stateful.items() if self.workers is not None}
            self.mine.called = {**self.called, **own}
        for network in self.mine.stateful:
            network.begin()
        called: Mapping[str, Network] = self.mine.called
        return called

    def _compiled(self, network: nn.Module) -> Network:
        return compiled(network, self.mode) if self.compiles else network

    @torch.inference_mode()
    def _block(self, plan: SamplePlan, products: Mapping[str, Finish], block: int) -> dict[Key, Tensor]:
        """All columns of one block, each (B, ...), and whose fault values are that are not finite, (B,)."""
        indices = torch.arange(block * self.batch_size, (block + 1) * self.batch_size)
        fault = torch.zeros(self.batch_size, dtype=torch.uint8, device=self.device)

        def blame(whose: int, values: Tensor, sound: Tensor | None = None) -> None:
            """For the first values of a sample that are not finite, where `sound`, which they are made of, are."""
            bad = ~finite(values, len(fault)) & (fault == 0)
            fault.masked_fill_(bad if sound is None else bad & finite(sound, len(fault)), whose)

        def watched(network: Network) -> Network:
            def watch(x: Tensor, times: Tensor, y: Tensor | None = None, *more: Any, **named: Any) -> Tensor:
                # A compiler takes another layout of x for another network.
                output = network(x.contiguous() if self.compiles else x, times, y, *more, **named)
                self.evaluations += 1
                batched = isinstance(output, Tensor) and output.ndim > 0
                if not batched or len(output) % len(fault) or len(x) % len(fault):
                    return output  # a parameterisation of the user's own knows what to do with it
                if self.graphs:
                    output = output.clone()
                blame(NETWORK, output, x)
                blame(SOLVER, output)
                return output

            return watch

        x, y = sample_block(
            {role: watched(network) for role, network in self._called().items()}, plan, indices, self.device
        )
        blame(SOLVER, x)
        stored = plan.condition.stored(y) if plan.condition and y is not None else {}
        finished = dict(plan.finisher.finish(x, self.networks))
        if (sound := finished.pop(SOUND, None)) is not None:
            fault.masked_fill_(~sound & (fault == 0), FINISHER)
        made: dict[str, Mapping[str, Tensor]] = {OWN: {**finished, **stored}}
        made |= {name: finish(x, self.networks) for name, finish in products.items()}
        tensors = {(name, column): t for name, columns in made.items() for column, t in columns.items()}
        for tensor in tensors.values():
            if tensor.is_floating_point():
                blame(FINISHER, tensor)
        return tensors | {FAULT: fault}


def finite(values: Tensor, count: int) -> Tensor:
    """Whether all values of each of `count` samples are finite, (count,); a doubled batch holds every sample twice."""
    return values.isfinite().reshape(len(values), -1).all(dim=1).view(-1, count).all(dim=0)


Mark = float | torch.cuda.Event
"""A moment: seconds of the host's clock, or an event in the queue of a GPU's current stream."""


def mark(device: torch.device) -> Mark:
    """The moment at which the device gets to this place in its queue. Waiting for it lets other threads run."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(begin: Mark, end: Mark) -> float:
    """Seconds from one mark to a later one of the same device, which is waited for: what the host knows to be done may
    have been queued before it."""
    if isinstance(begin, float) or isinstance(end, float):
        return float(end) - float(begin)  # type: ignore[arg-type]  # both are of the host's clock
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def why_not_compiled(error: Exception) -> str | None:
    """What torch.compile says in its first line where it failed, as without a C compiler; None for another error."""
    cause = getattr(error, "inner_exception", None)  # which torch.compile's errors have, and no others
    if not isinstance(cause, Exception):
        return None
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def compiled(network: nn.Module, mode: Compile) -> Network:
    """The network under torch.compile: with kernels chosen by timing (on), or without (auto)."""
    if mode == "on":
        return torch.compile(network, mode="max-autotune", dynamic=False)
    return torch.compile(network, options=INDUCTOR_WITHOUT_TIMING, dynamic=False)
