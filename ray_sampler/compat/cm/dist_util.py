"""The processes of a script: one, or the ranks that torchrun started. No MPI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ray_sampler.compat.cm.logger import log
from ray_sampler.compat.ranks import rank, ranks_given
from ray_sampler.errors import require
from ray_sampler.networks.weights import read_checkpoint


def setup_dist() -> None:
    """Start torch.distributed, unless it runs: the ranks of RANK and WORLD_SIZE, as torchrun sets them, or one process.

    The backend is nccl where each process of a node has a separate GPU, else gloo.
    """
    if dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    own_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= torch.cuda.device_count()
    backend = "nccl" if own_gpu and dist.is_nccl_available() else "gloo"
    if ranks_given():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def dev() -> torch.device:
    """The GPU of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", rank()))
    return torch.device("cuda", local % torch.cuda.device_count())


def load_state_dict(path: str | os.PathLike[str], map_location: Any = None, **ignored: Any) -> dict[str, Tensor]:
    """The weights in a file, of any layout and container that `ray-sampler sample --model` reads, by canonical name.

    Args:
        path: a local path or a URL.
        map_location: a device, to which the tensors are moved. With None, a function or a table they stay on the CPU.
        ignored: other arguments of torch.load, which say how to run what is in a file. Nothing in it is run here.

    Raises:
        RequestError: there is no such file, or it holds no weights.
    """
    require(os.fspath(path) != "", "--model_path is empty; give the path of a checkpoint")
    checkpoint = read_checkpoint(os.fspath(path), flag="--model_path")
    require(
        checkpoint.saved is None,
        f"--model_path is {checkpoint.shown}, a snapshot of NVlabs/edm or edm2 and no ADM network; "
        "ray-sampler sample --model reads it",
    )
    if checkpoint.note:
        log(checkpoint.note)
    if map_location is None or callable(map_location) or isinstance(map_location, Mapping):
        return checkpoint.tensors
    return {name: tensor.to(map_location) for name, tensor in checkpoint.tensors.items()}
