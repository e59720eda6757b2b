"""Time on the device that computes: by CUDA events on a GPU, where the host only queues, else by the host's clock."""

from __future__ import annotations

import time

import torch

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
    if isinstance(begin, float):
        assert isinstance(end, float), "marks are of one device"
        return end - begin
    assert not isinstance(end, float), "marks are of one device"
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
