"""What holds on GPUs alone, shown by substitutes: queued is not done, and CUDA graphs reuse memory of results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from ray_sampler.sampling.engine import Engine, seconds_between
from ray_sampler.sampling.parameterisation import parameterise
from ray_sampler.sampling.plan import MAIN
from tests.sampling.plans import plan

CPU = torch.device("cpu")


class QueuedEvent:
    """A CUDA event, which has no time until the device has come to it."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms = at_ms
        self.reached = False

    def synchronize(self) -> None:
        self.reached = True

    def elapsed_time(self, end: QueuedEvent) -> float:
        if not end.reached:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return end.at_ms - self.at_ms


def test_a_shards_time_is_told_though_its_last_event_is_still_queued() -> None:
    """Its pictures are there before the event that is queued behind them, where another process has the card."""
    begin, end = QueuedEvent(1000.0), QueuedEvent(1500.0)
    assert seconds_between(cast(Any, begin), cast(Any, end)) == 0.5


class InOnePlace(nn.Module):
    """A denoiser that writes every result to the same memory, as a captured CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.place: Tensor | None = None

    def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
        denoised = (x / (1 + sigma.view(-1, 1, 1, 1) ** 2)).sin()
        self.place = denoised if self.place is None else self.place.copy_(denoised)
        return self.place


@pytest.mark.parametrize("sampler", ["dpmpp_3m", "unipc", "multistep"])
def test_results_that_a_solver_keeps_outlive_the_next_call_of_a_captured_network(sampler: str) -> None:
    made = plan(sampler=sampler, steps=6, ts="0,2,5", clip_denoised=False, num_samples=4)
    made = replace(made, parameterisation=parameterise("denoiser"))

    def pictures(network: nn.Module, graphs: bool) -> bytes:
        engine = Engine({MAIN: network}, batch_size=4, device=CPU, compile="off")
        engine.graphs = graphs
        return engine.sample(made, 0, 4)().columns["image"].tobytes()

    class Anew(InOnePlace):
        def forward(self, x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
            return super().forward(x, sigma, y).clone()

    expected = pictures(Anew(), graphs=False)
    assert pictures(InOnePlace(), graphs=True) == expected
    if sampler != "multistep":  # which keeps none
        assert pictures(InOnePlace(), graphs=False) != expected
