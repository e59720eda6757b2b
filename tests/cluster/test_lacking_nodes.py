"""An actor whose node lacks something says what, and what to do, without torch's internals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ray_sampler.cluster import worker
from ray_sampler.cluster.worker import Loaded, RunSpec, Worker
from ray_sampler.errors import RunError
from ray_sampler.sampling import engine
from ray_sampler.sampling.plan import MAIN
from tests.gpu.networks import plan_of, random_network, tiny

CPU = torch.device("cpu")


def without_a_compiler(*arguments: Any) -> Any:
    """A backend of torch.compile on a machine that lacks what it calls."""
    raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore of that.")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """An actor that is about to build its engine, outside of Ray."""
    torch.compiler.reset()
    monkeypatch.setattr(worker, "pin", lambda device, compile: None)
    monkeypatch.setattr(Worker, "_load", lambda self: {MAIN: random_network(tiny(), "fp32", CPU)})
    made = Worker.__new__(Worker)
    made.loaded = Loaded({}, "fp32", 2, "on", 1)
    made.runs = [RunSpec("", "", plan_of(tiny(), num_samples=4, sampler="onestep"), "parquet", "")]
    made.device = CPU
    return made


def compile_with(backend: Any) -> Any:
    return lambda network, mode: torch.compile(network, backend=backend, dynamic=False)


def test_a_node_without_a_compiler_is_named_with_what_to_do(builds: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compiled", compile_with(without_a_compiler))
    with pytest.raises(RunError) as failed:
        builds._build()
    said = str(failed.value)
    assert "cannot compile the network (RuntimeError: Failed to find C compiler. Please specify via CC" in said
    assert said.endswith("variable.); give --compile off, or install there what is missing")


def test_what_a_network_raises_itself_is_not_blamed_on_the_compiler(
    builds: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(network: nn.Module, mode: str) -> Any:
        def call(*arguments: Any) -> Any:
            raise ZeroDivisionError("of its own")

        return call

    monkeypatch.setattr(engine, "compiled", broken)
    with pytest.raises(ZeroDivisionError, match="of its own"):
        builds._build()


@pytest.mark.parametrize(
    "error",
    [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("Found no NVIDIA driver.\nPlease check.")],
)
def test_a_node_whose_torch_cannot_use_its_gpu_is_named_with_what_to_do(
    error: Exception, builds: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init() -> None:
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    builds.device = torch.device("cuda")
    with pytest.raises(RunError) as failed:
        builds._build()
    said = str(failed.value)
    assert f"has a GPU, but torch {torch.__version__} cannot use it there ({str(error).splitlines()[0]}); inst" in said
    assert said.endswith("or give --gpus_per_actor 0")
