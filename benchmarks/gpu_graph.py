"""A whole block, solver and all, as one CUDA graph: what that would win for small networks, whose kernels are short."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ray_sampler.sampling.plan import MAIN, SamplePlan, sample_block


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """A function that replays the kernels of `step`, and returns its result in the same memory each time.

    Without a GPU it is `step`.
    """
    if device.type != "cuda":
        return step
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step()  # takes memory, chooses kernels and compiles, none of which can be captured
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@torch.inference_mode()
def whole_block(network: nn.Module, plan: SamplePlan, batch: int, device: torch.device) -> Callable[[int], Tensor]:
    """A function that gives the pictures of block k, (B, H, W, C) on the host."""
    indices = torch.arange(batch, device=device)

    def step() -> Tensor:
        x, _ = sample_block({MAIN: network}, plan, indices)
        return plan.finisher.finish(x, {})["image"]

    replay = captured(step, device)

    @torch.inference_mode()
    def pictures(block: int) -> Tensor:
        torch.arange(block * batch, (block + 1) * batch, out=indices)
        return replay().cpu()

    return pictures


def rate(pictures: Callable[[int], Tensor], batch: int, blocks: int) -> Callable[[], float]:
    """A function that gives images a second."""

    def images_per_second() -> float:
        began = time.perf_counter()
        for block in range(blocks):
            pictures(block)
        return batch * blocks / (time.perf_counter() - began)

    return images_per_second
