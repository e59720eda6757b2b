"""On a GPU too a sample is a function of its index alone, time is the device's, and memory that runs out is handled."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ray_sampler.networks.family import Precision
from ray_sampler.sampling.conditions import listed_labels
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.memory import OutOfDeviceMemoryError
from ray_sampler.sampling.noise import philox_normals
from ray_sampler.sampling.plan import MAIN, SamplePlan, sample_block
from tests.gpu.networks import options_of, plan_of, random_network

BATCH = 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")


@pytest.fixture(scope="module")
def name(device: torch.device) -> str:
    return "digits" if device.type == "cuda" else "tiny"


@pytest.fixture(scope="module")
def networks(device: torch.device, name: str) -> dict[Precision, nn.Module]:
    options = options_of(name)
    return {precision: random_network(options, precision, device, contiguous=True) for precision in PRECISIONS}


@pytest.fixture(scope="module")
def plan(name: str) -> SamplePlan:
    return plan_of(options_of(name), num_samples=64)


def engine(network: nn.Module, device: torch.device, batch: int = BATCH) -> Engine:
    return Engine({MAIN: network}, batch_size=batch, device=device, compile="off")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_place_in_the_batch_and_neighbours_do_not_matter(
    precision: Precision, networks: dict[Precision, nn.Module], plan: SamplePlan, device: torch.device
) -> None:
    def samples(indices: list[int]) -> dict[int, bytes]:
        with torch.inference_mode():
            x, _ = sample_block({MAIN: networks[precision]}, plan, torch.tensor(indices), device)
        return {i: each.cpu().numpy().tobytes() for i, each in zip(indices, x, strict=True)}

    expected = samples([0, 1, 2, 3])
    for others in ([3, 1, 0, 2], [7, 3, 9, 0], [2, 60, 61, 62]):
        for i, found in samples(others).items():
            assert found == expected.get(i, found), f"sample {i} of {others}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_equals_an_undisturbed_one(
    precision: Precision, networks: dict[Precision, nn.Module], plan: SamplePlan, device: torch.device
) -> None:
    """With a padded last block, and two shards in flight."""
    stop = 4 * BATCH + 1
    whole = engine(networks[precision], device).sample(plan, 0, stop)()
    first = engine(networks[precision], device).sample(plan, 0, 2 * BATCH)()
    resumed = engine(networks[precision], device)
    pending = [resumed.sample(plan, 2 * BATCH, 3 * BATCH), resumed.sample(plan, 3 * BATCH, stop)]
    images = [first.columns["image"], *(finish().columns["image"] for finish in pending)]
    assert np.concatenate(images).tobytes() == whole.columns["image"].tobytes()
    assert len({image.tobytes() for image in whole.columns["image"]}) == stop


def test_padding_changes_no_sample(
    networks: dict[Precision, nn.Module], plan: SamplePlan, device: torch.device
) -> None:
    one = engine(networks["fp16"], device)
    assert (
        one.sample(plan, 1, 2)().columns["image"].tobytes()
        == one.sample(plan, 0, BATCH)().columns["image"][1:2].tobytes()
    )


def test_layouts_compute_the_same_picture(device: torch.device, name: str, plan: SamplePlan) -> None:
    images = [
        engine(random_network(options_of(name), "fp32", device, contiguous), device)
        .sample(plan, 0, BATCH)()
        .columns["image"]
        for contiguous in (True, False)
    ]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 1


def test_noise_equals_that_of_the_cpu_to_one_unit_in_the_last_place(device: torch.device) -> None:
    indices = torch.tensor([0, 1, 7, 2**33 + 5, 2**40])
    here = philox_normals(42, indices.to(device), 3, (3, 64, 64)).cpu().numpy()
    expected = philox_normals(42, indices, 3, (3, 64, 64)).numpy()
    assert (np.abs(here - expected) <= np.spacing(np.abs(expected))).all()


def test_no_operation_warns_that_it_is_not_deterministic(
    networks: dict[Precision, nn.Module], plan: SamplePlan, device: torch.device
) -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        engine(networks["fp16"], device).sample(plan, 0, BATCH)()
    assert [str(each.message) for each in warned if "determinis" in str(each.message)] == []


# The host does not wait.


@pytest.mark.parametrize(
    "flags",
    [{}, {"sampler": "onestep"}, {"sampler": "ancestral"}, {"generator": "determ-indiv"}, {"generator": "edm"}],
    ids=str,
)
@pytest.mark.parametrize("listed", [False, True])
def test_nothing_waits_for_the_device_while_work_is_queued(
    flags: dict[str, Any], listed: bool, networks: dict[Precision, nn.Module], name: str, gpu: torch.device
) -> None:
    rule = listed_labels(np.array([3, 1, 4]), 10, "a list") if listed else None
    plan = plan_of(options_of(name), rule, num_samples=16, **flags)
    one = engine(networks["fp16"], gpu)
    one.sample(plan, 0, 2 * BATCH)()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        finish = one.sample(plan, 0, 2 * BATCH)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(finish().columns["image"]) == 2 * BATCH


def test_the_devices_time_sums_to_the_wall_time(
    networks: dict[Precision, nn.Module], plan: SamplePlan, device: torch.device
) -> None:
    """With two shards in flight, which a clock on the host would count twice, and a pause, which is idle time."""
    one, shard, pause_s = engine(networks["fp32"], device), 4 * BATCH, 0.3
    one.sample(plan, 0, shard)()
    one.ended = None
    began = time.perf_counter()
    pending = [one.sample(plan, 0, shard), one.sample(plan, shard, 2 * shard)]
    found = [finish() for finish in pending]
    time.sleep(pause_s)
    found.append(one.sample(plan, 0, shard)())
    wall = time.perf_counter() - began
    idle = sum(pictures.idle_s for pictures in found)
    total = idle + sum(pictures.seconds for pictures in found)
    assert abs(total - wall) <= 0.05 * wall + 0.005
    assert abs(idle - pause_s) <= 0.1 * wall


# Memory.


@pytest.fixture
def little_memory(gpu: torch.device) -> Iterator[None]:
    """A gigabyte beyond what is there."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(gpu).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_halving_a_batch_that_does_not_fit_ends_with_one_that_does(
    networks: dict[Precision, nn.Module], plan: SamplePlan, gpu: torch.device, little_memory: None
) -> None:
    batch, said = 2**14, ""
    while batch:
        try:
            pictures = engine(networks["fp16"], gpu, batch).sample(plan, 0, batch)()
            break
        except OutOfDeviceMemoryError as error:
            batch, said = batch // 2, str(error)
    assert 16 <= batch < 2**14
    assert f"try --batch_size {batch}, or" in said
    assert len(pictures.columns["image"]) == batch


class OutOfMemory(nn.Module):
    """A network whose batches fit up to 2."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor, times: Tensor, y: Tensor | None) -> Tensor:
        if len(x) > 2:
            raise self.error
        return x


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_an_error_of_memory_in_a_library_is_answered_too(
    error: Exception, plan: SamplePlan, device: torch.device
) -> None:
    with pytest.raises(OutOfDeviceMemoryError, match="try --batch_size 2, or --precision fp16"):
        engine(OutOfMemory(error), device).sample(plan, 0, BATCH)
