"""Which of a script's processes this one is, before torch.distributed runs as well."""

from __future__ import annotations

import os

import torch.distributed as dist


def ranks_given() -> bool:
    """Whether a launcher said which rank this process is, as torchrun does."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The rank of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if ranks_given() else 0


def world_size() -> int:
    """The number of processes."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ["WORLD_SIZE"]) if ranks_given() else 1
