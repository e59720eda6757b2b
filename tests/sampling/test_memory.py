"""Running out of memory, wherever it happens, becomes one sentence with what to try."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.memory import (
    CONTEXT_BYTES,
    OutOfDeviceMemoryError,
    page_locked,
    ran_out_of_memory,
    share_of,
)
from ray_sampler.sampling.plan import MAIN, SamplePlan
from tests.gpu.networks import plan_of, tiny

CPU = torch.device("cpu")
GIB = 2**30


class Limited(nn.Module):
    """A network whose batches fit up to `largest`."""

    def __init__(self, largest: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.largest = largest
        self.error = error
        self.sizes: list[int] = []

    def forward(self, x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.largest:
            raise self.error("CUDA out of memory")
        return x


def engine(network: nn.Module, batch_size: int) -> Engine:
    return Engine({MAIN: network}, batch_size=batch_size, device=CPU, compile="off")


@pytest.fixture(scope="module")
def plan() -> SamplePlan:
    return plan_of(tiny(), num_samples=64, steps=4)


def test_half_of_a_batch_size_that_does_not_fit_is_advised_without_a_trial(plan: SamplePlan) -> None:
    network = Limited(63)
    with pytest.raises(OutOfDeviceMemoryError, match=r"--batch_size 64; try --batch_size 32, or --precision fp16"):
        engine(network, 64).sample(plan, 0, 64)
    assert network.sizes == [64]
    with pytest.raises(OutOfDeviceMemoryError, match=r"--batch_size 1; try --precision fp16 .*more memory"):
        engine(Limited(0), 1).sample(plan, 0, 1)


def test_an_engine_continues_after_a_batch_that_did_not_fit(plan: SamplePlan) -> None:
    network = Limited(0)
    one = engine(network, 4)
    with pytest.raises(OutOfDeviceMemoryError):
        one.sample(plan, 0, 4)
    network.largest = 4
    assert len(one.sample(plan, 0, 4)().columns["image"]) == 4


def test_other_errors_stay_what_they_are(plan: SamplePlan) -> None:
    with pytest.raises(ZeroDivisionError):
        engine(Limited(0, ZeroDivisionError), 4).sample(plan, 0, 4)


def no_room(*shape: Any, **options: Any) -> Tensor:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


def test_a_host_without_room_for_a_shard_is_not_told_of_batch_sizes(
    plan: SamplePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A smaller batch would fit on the device, and the next run would end in the same way."""
    one = engine(Limited(64), 64)
    monkeypatch.setattr(one, "_compute", lambda plan, products, blocks: page_locked((512, 256, 256, 3), torch.uint8))
    monkeypatch.setattr(torch, "empty", no_room)
    with pytest.raises(OutOfDeviceMemoryError, match=r"page-lock 96 MiB .* 512 samples .*smaller --shard_size"):
        one.sample(plan, 0, 512)


def caused(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


class Wrapped(RuntimeError):
    """As Dynamo wraps what its backend raises."""

    def __init__(self, inner: Exception) -> None:
        super().__init__("backend='inductor' raised")
        self.inner_exception = inner


@pytest.mark.parametrize(
    ("error", "of_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),  # pinned memory
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), True),
        (caused(RuntimeError("the compiler failed"), torch.OutOfMemoryError("CUDA out of memory")), True),
        (Wrapped(torch.OutOfMemoryError("CUDA out of memory")), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
        (ValueError("labels are out of memory"), False),
    ],
)
def test_an_error_of_memory_is_known_however_it_is_wrapped(error: Any, of_memory: bool) -> None:
    assert ran_out_of_memory(error) is of_memory


def test_errors_that_cause_each_other_end() -> None:
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not ran_out_of_memory(first)


@pytest.mark.parametrize("total", [16 * GIB, 80 * GIB])
@pytest.mark.parametrize("gpus", [0.5, 0.25, 0.1])
def test_actors_that_share_a_gpu_fit_beside_each_other(gpus: float, total: int) -> None:
    actors = int(1 / gpus)
    share = share_of(gpus, total)
    assert 0 < share < gpus
    if gpus * total >= 2 * CONTEXT_BYTES:
        assert actors * (share * total + CONTEXT_BYTES) <= total
