"""A stand-in for mpi4py.MPI where that is not installed, over the ranks of torch.distributed."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from ray_sampler.compat.cm.dist_util import setup_dist
from ray_sampler.compat.ranks import rank, world_size


class Communicator:
    """All processes of the script."""

    Get_rank = staticmethod(rank)
    Get_size = staticmethod(world_size)
    rank = property(lambda self: self.Get_rank())
    size = property(lambda self: self.Get_size())

    def barrier(self) -> None:
        """Return once every rank has called it."""
        setup_dist()
        dist.barrier()

    Barrier = barrier

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """`obj` of the rank `root`, on every rank."""
        setup_dist()
        box = [obj]
        dist.broadcast_object_list(box, src=root)
        return box[0]


COMM_WORLD = Communicator()
