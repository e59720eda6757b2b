"""How networks travel: the module without its tensors, and the tensors once per node in Ray's object store.

The driver takes the tensors out of a network one by one, so that what is in the store need not be in its own memory
too. A worker maps them from the node's one copy.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from torch import Tensor, nn

from ray_sampler.errors import require
from ray_sampler.networks.family import Network, Precision, beside_user, lay_out_contiguously

CHUNK_BYTES = 64 * 2**20
"""Tensors are put into the object store in groups of about this size."""


@dataclass(frozen=True)
class Stored:
    """Where the bytes of a tensor are, and how they make it."""

    chunk: int
    position: int
    """In the chunk's list of arrays."""
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    parameter: bool


@dataclass(frozen=True)
class Shipped:
    """A network on its way."""

    module: bytes
    """Pickled, with numbers in place of its tensors."""
    tensors: tuple[Stored, ...]
    chunks: tuple[ray.ObjectRef[list[np.ndarray]], ...]
    """Bytes of tensors, in groups."""
    prepare: Callable[[nn.Module, Precision], nn.Module]
    precision: Precision


def ship(network: Network, precision: Precision, contiguous: bool = False) -> Shipped:
    """Put a network into the object store; its tensors are taken out of it on the way.

    Args:
        contiguous: lay filters out in the order of their dimensions, whatever the family prefers.

    Raises:
        RequestError: a user's network cannot travel to another process.
    """
    with beside_user() if network.by_value else nullcontext():  # pickling may call code of a user's network
        return _ship(network, precision, contiguous)


def _ship(network: Network, precision: Precision, contiguous: bool) -> Shipped:
    for name in network.by_value:
        cloudpickle.register_pickle_by_value(sys.modules[name])
    module = network.build(precision)
    if contiguous:
        lay_out_contiguously(module)
    names = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
    loader = _Loader(network.tensors, names, network.as_stored)
    pickled = io.BytesIO()
    try:
        _TensorPickler(pickled, loader.take).dump(module)  # type: ignore[no-untyped-call]  # Ray ships no types
    except Exception as error:  # whatever the attributes of a user's network raise
        require(not network.by_value, f"--model's network cannot be sent to an actor: {said(error)}")
        raise
    loader.flush()
    return Shipped(pickled.getvalue(), tuple(loader.stored), tuple(loader.chunks), network.prepare, precision)


def said(error: Exception) -> str:
    """An exception in one line, with what pickle adds to it."""
    notes = getattr(error, "__notes__", [])
    return f"{type(error).__name__}: {' '.join(' '.join((str(error), *notes)).split())}"


class _Loader:
    """Puts tensors into the object store, in the order in which they are met."""

    def __init__(self, tensors: dict[str, Tensor], names: Mapping[int, str], as_stored: bool) -> None:
        self.tensors = tensors
        self.names = names
        self.as_stored = as_stored
        self.stored: list[Stored] = []
        self.chunks: list[ray.ObjectRef[list[np.ndarray]]] = []
        self.known: dict[int, int] = {}
        self.waiting: list[np.ndarray] = []

    def take(self, tensor: Tensor) -> int:
        """The number of a tensor of the module."""
        if id(tensor) not in self.known:
            self.known[id(tensor)] = len(self.stored)
            self._store(tensor)
        return self.known[id(tensor)]

    def _store(self, wanted: Tensor) -> None:
        source = self.tensors.pop(self.names[id(wanted)]) if wanted.is_meta else wanted.detach()
        layout = wanted if is_dense(wanted) else wanted.contiguous()
        data, dtype = source.detach(), source.dtype if self.as_stored else wanted.dtype
        if (source.dtype, source.stride()) != (dtype, layout.stride()):
            data = torch.empty_strided(layout.shape, layout.stride(), dtype=dtype, device="cpu").copy_(data)
        flat = data.as_strided((data.numel(),), (1,)).view(torch.uint8).numpy()
        self.stored.append(
            Stored(
                len(self.chunks),
                len(self.waiting),
                str(data.dtype).removeprefix("torch."),
                tuple(data.shape),
                data.stride(),
                isinstance(wanted, nn.Parameter),
            )
        )
        self.waiting.append(flat)
        if sum(array.nbytes for array in self.waiting) >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.chunks.append(ray.put(self.waiting))
            self.waiting = []
            give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Return what was freed to the kernel, where the C library is glibc, which keeps it for later."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie side by side in memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


class _TensorPickler(cloudpickle.Pickler):
    """A pickler that takes every tensor out."""

    def __init__(self, file: io.BytesIO, take: Callable[[Tensor], int]) -> None:
        super().__init__(file)  # type: ignore[no-untyped-call]  # Ray ships no types
        self.take = take

    def persistent_id(self, obj: Any) -> int | None:
        return self.take(obj) if isinstance(obj, Tensor) else None


class _TensorUnpickler(pickle.Unpickler):
    """An unpickler that puts tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def unpack(shipped: Shipped) -> nn.Module:
    """The module; its parameters are views of the node's copy, which is shared memory and must not be written to.

    Nothing writes parameters here. A buffer, or a tensor that is neither, is copied: a user's network may change it in
    its forward, and what torch makes of the memory is writable whatever numpy says.
    """
    chunks = ray.get(list(shipped.chunks))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [_restored(chunks[stored.chunk][stored.position], stored) for stored in shipped.tensors]
    module: nn.Module = _TensorUnpickler(io.BytesIO(shipped.module), tensors).load()
    return module


def _restored(data: np.ndarray, stored: Stored) -> Tensor:
    flat = torch.from_numpy(data).view(getattr(torch, stored.dtype))
    tensor = flat.as_strided(stored.shape, stored.stride)
    return nn.Parameter(tensor, requires_grad=False) if stored.parameter else tensor.clone()


def load(shipped: Shipped, device: torch.device) -> nn.Module:
    """The network, ready to compute on `device`; on a CPU with the node's one copy of the parameters."""
    module = unpack(shipped).to(device).requires_grad_(False).eval()
    return shipped.prepare(module, shipped.precision)
