"""How networks travel: the module without its tensors, and the tensors once per node in Ray's object store.

The driver takes the tensors out of a network one by one, so that what is in the store need not be in its own memory
too. A worker maps them from the node's one copy.
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import pickle
import shutil
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial, reduce
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ray_sampler.cluster.machine import ray_folder
from ray_sampler.errors import RequestError, RunError
from ray_sampler.networks.family import Network, Precision, beside_user, lay_out_contiguously

CHUNK_BYTES = 64 * 2**20
"""Tensors are put into the object store in groups of about this size."""


@dataclass(frozen=True)
class ShippedTensor:
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
    tensors: tuple[ShippedTensor, ...]
    chunks: tuple[ray.ObjectRef[list[np.ndarray]], ...]
    """Bytes of tensors, in groups."""
    prepare: Callable[[nn.Module, Precision], nn.Module]
    precision: Precision
    own: bool = False
    """Whether its code is the user's."""


def ship(network: Network, precision: Precision, contiguous: bool = False) -> Shipped:
    """Put a network into the object store; its tensors are taken out of it on the way.

    Args:
        contiguous: lay filters out in the order of their dimensions, whatever the family prefers.

    Raises:
        RequestError: a user's network cannot travel to another process.
        RunError: the object store is full.
    """
    module = network.build(precision)
    if contiguous:
        lay_out_contiguously(module)
    names = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
    loader = _Loader(network.tensors, names, network.as_stored)
    pickled = pickled_by_value(network, module, precision, loader.take)
    loader.flush()
    return Shipped(pickled, tuple(loader.stored), tuple(loader.chunks), network.prepare, precision, network.own)


def pickled_by_value(
    network: Network, module: nn.Module, precision: Precision, take: Callable[[Tensor], int] = id
) -> bytes:
    """A module without its tensors; of a user's that cannot be pickled, the function that makes it.

    Args:
        take: is given each tensor, and returns its number.

    Raises:
        RequestError: a user's network cannot travel to another process; names the obstacle.
    """
    own = network.own or bool(network.by_value)
    with beside_user() if own else nullcontext():  # pickling may call code of a user's network
        send_by_value(network)
        try:
            return dumped(module, take)
        except RunError:  # the object store's, whatever the network
            raise
        except Exception as error:  # whatever the attributes of a user's network raise
            if not own:
                raise
            for remake in network.remakes:
                with suppress(Exception):
                    return dumped(_Remade(module, partial(remake, precision)), take)
            raise RequestError(
                f"--model's network cannot be sent to an actor: {brief(error)}, in {culprit(module)}; make it in "
                "forward, when it is first needed, or give the function that makes the network in place of a Model"
            ) from error


def send_by_value(network: Network) -> None:
    """Have this process pickle the modules of a user's network whole, as workers lack their files."""
    for name in network.by_value:
        cloudpickle.register_pickle_by_value(sys.modules[name])


def dumped(value: Any, take: Callable[[Tensor], int]) -> bytes:
    file = io.BytesIO()
    _TensorPickler(file, take).dump(value)  # type: ignore[no-untyped-call]  # Ray ships no types
    return file.getvalue()


class _Remade:
    """A module that is pickled as the function that makes it, and the tensors of its state dict."""

    def __init__(self, module: nn.Module, remake: Callable[[], nn.Module]) -> None:
        self.made = _remade, (remake, module.state_dict(keep_vars=True))

    def __reduce__(self) -> Any:
        return self.made


def _remade(remake: Callable[[], nn.Module], state: dict[str, Any]) -> nn.Module:
    module = remake()
    module.load_state_dict(state, assign=True)
    return module


def culprit(module: nn.Module) -> str:
    """The path of the attribute of a module that cannot be pickled."""
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            try:
                if name not in ("_parameters", "_buffers", "_modules"):
                    dumped(value, id)
            except Exception:  # as above
                return f"{path}.{name}"
    return "the code of its class"


def brief(error: Exception) -> str:
    """An exception in one line, with what pickle adds to it."""
    notes = getattr(error, "__notes__", [])
    return f"{type(error).__name__}: {' '.join(' '.join((str(error), *notes)).split())}"


class _Loader:
    """Puts tensors into the object store, in the order in which they are met."""

    def __init__(self, tensors: dict[str, Tensor], names: Mapping[int, str], as_stored: bool) -> None:
        self.tensors = tensors
        self.names = names
        self.as_stored = as_stored
        self.stored: list[ShippedTensor] = []
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
            ShippedTensor(
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
            with room_in_store():
                self.chunks.append(ray.put(self.waiting))
            self.waiting = []
            give_back_freed_memory()


@contextmanager
def room_in_store() -> Iterator[None]:
    """Raises RunError where this node's object store takes no more weights; says what to free."""
    try:
        yield
    except (OutOfDiskError, ObjectStoreFullError) as error:
        folder = ray_folder()
        disk = shutil.disk_usage(folder if os.path.isdir(folder) else os.path.dirname(folder))
        raise RunError(
            f"node {socket.gethostname()} has no room for the network's weights: Ray's object store is full, and so is "
            f"the disk to which it spills ({folder}: {disk.free / 1e9:.1f} GB of {disk.total / 1e9:.1f} free, of which "
            "Ray leaves 5% unused); delete files there, or start Ray with RAY_TMPDIR on a larger disk"
        ) from error


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
        return self.take(obj) if isinstance(obj, Tensor) and is_plain(obj) else None

    def reducer_override(self, obj: Any) -> Any:
        """As of cloudpickle, and for what torch does not pickle: TorchScript, parametrised modules and its enums."""
        if isinstance(obj, torch.jit.ScriptModule):
            torch.jit.save(obj, file := io.BytesIO())
            return _scripted, (file.getvalue(),)
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            made = type(obj).__bases__[0]
            return made.__new__, (made,), vars(obj), None, None, _parametrized
        kind = obj if isinstance(obj, type) else type(obj)
        if hasattr(kind, "__members__") and kind.__module__.startswith("torch") and not issubclass(kind, Enum):
            names = [name for name, value in vars(sys.modules[kind.__module__]).items() if value is kind]
            if names:
                return _named, (kind.__module__, names[0], *([] if obj is kind else [obj.name]))
        return super().reducer_override(obj)  # type: ignore[no-untyped-call]  # Ray ships no types


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie in memory as they are; others are pickled as torch does it."""
    wraps_others = hasattr(tensor, "__tensor_flatten__")
    bits = tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or wraps_others
    return tensor.layout == torch.strided and not bits


def _scripted(saved: bytes) -> nn.Module:
    module: nn.Module = torch.jit.load(io.BytesIO(saved))
    return module


def _parametrized(module: nn.Module, state: dict[str, Any]) -> None:
    """Give a module its parametrisations back, which are properties of a class that torch makes for it alone."""
    vars(module).update(state)

    def computed(name: str) -> property:
        return property(lambda self: self.parametrizations[name]())

    made = type(module)
    values = {name: computed(name) for name in module.parametrizations}  # type: ignore[union-attr]  # a ModuleDict
    module.__class__ = type(f"Parametrized{made.__name__}", (made,), values)


def _named(module: str, *names: str) -> Any:
    return reduce(getattr, names, importlib.import_module(module))


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
    with room_in_store():
        chunks = ray.get(list(shipped.chunks))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = [_restored(chunks[stored.chunk][stored.position], stored) for stored in shipped.tensors]
    module: nn.Module = _TensorUnpickler(io.BytesIO(shipped.module), tensors).load()
    return module


def _restored(data: np.ndarray, stored: ShippedTensor) -> Tensor:
    flat = torch.from_numpy(data).view(getattr(torch, stored.dtype))
    tensor = flat.as_strided(stored.shape, stored.stride)
    return nn.Parameter(tensor, requires_grad=False) if stored.parameter else tensor.clone()


def load(shipped: Shipped, device: torch.device) -> nn.Module:
    """The network, ready to compute on `device`; on a CPU with the node's one copy of the parameters."""
    module = unpack(shipped).to(device).requires_grad_(False).eval()
    return shipped.prepare(module, shipped.precision)
