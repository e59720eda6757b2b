"""Network snapshots of NVlabs/edm and NVlabs/edm2, read without running anything in them.

Such a file is a pickle of {"ema": network, "loss_fn": ..., ...}. Each object in it is stored with the source text of
its class, which their own reader executes. Here the state of the objects is read as plain data, and the source text is
never looked at.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ray_sampler.networks.pickles import Blob, Inert, Name, Refused, damage_refused, read
from ray_sampler.networks.torch_files import MAGIC, NUMBERS, PROTOCOL

__all__ = ["Refused", "SavedNetwork", "looks_like_nvidia", "read_pickle"]

MAX_DEPTH = 16
MAX_MODULES = 20_000
MAX_TENSORS = 20_000
MAX_PLAIN = 10_000
"""Numbers and texts among the arguments of one network."""


@dataclass(frozen=True)
class SavedNetwork:
    """One object of a snapshot, as data."""

    class_name: str
    """Of the object itself, as in the file: "EDMPrecond", "Precond", "StabilityVAEEncoder"."""
    arguments: dict[str, Any]
    """Numbers, texts and lists of them, by name: what the object and the network in it (`model`, `unet`) were made
    with, and their attributes. "model_type" is the class name of the network in it."""
    tensors: dict[str, Tensor] = field(repr=False)
    """Parameters and persistent buffers by dotted name, on the CPU, in the dtype in which they are stored, contiguous,
    each in memory of its own."""
    parameters: int = 0
    """Numbers in all parameters; buffers do not count."""


def looks_like_nvidia(head: bytes) -> bool:
    """Whether a file that begins with `head` is a snapshot of NVlabs/edm or NVlabs/edm2; some kilobytes are enough."""
    return head[:1] == b"\x80" and b"torch_utils.persistence" in head and b"_reconstruct_persistent_obj" in head


def read_pickle(file: BinaryIO) -> dict[str, SavedNetwork]:
    """The objects of a snapshot by their key in it ("ema", "encoder", ...), as plain data and tensors.

    Reads the file once, from its beginning to its end. Memory at the peak: all tensors, and the largest once more.

    Raises:
        Refused: the file names something that a snapshot does not need, is damaged, or holds no network.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    content = read(file, size, _Stands(size).lookup)
    objects = (
        {key: value for key, value in content.items() if isinstance(value, _Saved)} if type(content) is dict else {}
    )
    if not objects or not all(isinstance(key, str) for key in objects):
        raise Refused("it is a pickle without a network; a snapshot of NVlabs/edm or NVlabs/edm2 holds one under 'ema'")
    with damage_refused():
        return {key: _network(saved) for key, saved in objects.items()}


class _Saved:
    """An object of a class of theirs, or of torch.nn: its class's name and its attributes."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name = class_name
        self.state = state


class _Module(Inert):
    """An instance of a class of torch.nn."""


class _Dtype(Inert):
    """numpy's dtype(code, align, copy); its state holds the byte order."""


class _Array(Inert):
    """A numpy array, whose state is (version, shape, dtype, Fortran order, bytes)."""


class _Stands:
    """The stand-ins for the names in one file of `size` bytes."""

    def __init__(self, size: int) -> None:
        self.copyable = size
        """Bytes of tensors that may yet be copied out of a storage which they do not fill; without a bound, a few bytes
        of the file could ask for any number of copies."""

    def lookup(self, module: str, name: str) -> Callable[..., Any] | None:
        if re.fullmatch(r"torch\.nn\.modules\.\w+", module) and re.fullmatch(r"[A-Z]\w*", name):
            return _Module
        return self.by_name.get((re.sub(r"^numpy\._core", "numpy.core", module), name))

    @property
    def by_name(self) -> Mapping[tuple[str, str], Callable[..., Any]]:
        return {
            ("torch_utils.persistence", "_reconstruct_persistent_obj"): _saved,
            ("collections", "OrderedDict"): _dictionary,
            ("builtins", "set"): _set,
            ("__builtin__", "set"): _set,  # its name in protocol 2
            ("_codecs", "encode"): lambda text, code: Blob(_of(str, text).encode("latin-1")),  # bytes, in protocol 2
            ("dnnlib.util", "EasyDict"): _dictionary,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: _of(Tensor, data),
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("numpy.core.multiarray", "scalar"): _scalar,
            ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Dtype,
        }

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        """A tensor of a storage; a copy, unless it fills the storage in order."""
        values = _of(_Storage, storage).values
        whole = [offset, *_of(tuple, size), *_of(tuple, stride)]
        sound = len(size) == len(stride) <= MAX_DEPTH and all(type(n) is int and 0 <= n < 2**60 for n in whole)
        count = math.prod(size) if sound else 0
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else 0
        if not sound or count > values.numel() or (count and last >= values.numel()):
            raise Refused("it is damaged: a tensor goes past the end of its values")
        if not count:
            return values.new_empty(size)
        view = values.as_strided(size, stride, offset)
        if count == values.numel() and view.is_contiguous():
            return view
        self.copyable -= count * values.element_size()
        if self.copyable < 0:
            raise Refused("it is damaged: its tensors have more values than the file has bytes for")
        return view.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class _Storage:
    values: Tensor


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value


def _saved(meta: dict[str, Any]) -> _Saved:
    """The stand-in for what would execute meta["module_src"]."""
    return _Saved(_of(str, meta["class_name"]), _of(dict, meta["state"]))


def _dictionary(*args: Any) -> dict[Any, Any]:
    if args:
        raise TypeError("a dictionary that is not empty at first")
    return {}


def _set(items: list[Any]) -> set[str]:
    return {_of(str, item) for item in _of(list, items)}


def _storage(blob: Blob) -> _Storage:
    """Values that torch.save wrote, in its format of before zip files: four pickles, the count, the bytes."""
    if blob.made is None:
        data = _of(bytes, blob.data)
        file = io.BytesIO(data)

        def part() -> Any:
            return read(file, len(data) - file.tell(), _storage_class, _described)

        if part() != MAGIC or part() != PROTOCOL or _of(dict, part()).get("little_endian") is not True:
            raise Refused("it is damaged, or stores tensors as no snapshot does")
        dtype, key, count = _of(tuple, part())
        if part() != [key]:
            raise Refused("it is damaged, or stores tensors as no snapshot does")
        blob.made = _Storage(_values(data, file.tell(), dtype, count))
        blob.data = None
    return _of(_Storage, blob.made)


def _storage_class(module: str, name: str) -> Callable[..., Any] | None:
    return (lambda: NUMBERS[name]) if module == "torch" and name in NUMBERS else None


def _described(description: Any) -> tuple[torch.dtype, str, int]:
    """A storage's persistent id -> its dtype, its key and how many values it has."""
    kind, storage, key, _, count, view = _of(tuple, description)
    if kind != "storage" or view is not None or type(count) is not int:
        raise TypeError("no storage")
    return _of(torch.dtype, _of(Name, storage).make()), _of(str, key), count


def _values(data: bytes, begin: int, dtype: torch.dtype, count: int) -> Tensor:
    """What stands in `data` from `begin` on: the count (int64), then the values."""
    begin += 8
    if (
        count < 0
        or len(data) - begin != count * dtype.itemsize
        or data[begin - 8 : begin] != count.to_bytes(8, "little")
    ):
        raise Refused("it is damaged: a tensor has another number of values than it says")
    values = torch.empty(count, dtype=dtype)
    if count:
        values.view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8, offset=begin)
    if dtype == torch.bool and bool((values.view(torch.uint8) > 1).any()):
        raise Refused("it is damaged: a truth value is neither 0 nor 1")
    return values


def _numpy_dtype(dtype: Any) -> np.dtype[Any]:
    code = _of(str, _of(_Dtype, dtype).args[0])
    order = dtype.state[1] if type(dtype.state) is tuple and len(dtype.state) > 1 else "|"
    if not re.fullmatch(r"[fiu][1248]|b1", code) or code == "f1" or order not in ("<", ">", "|"):
        raise TypeError("no type of numbers")
    return np.dtype(order + code)


def _scalar(dtype: Any, value: Blob) -> float | int | bool:
    return np.frombuffer(_of(bytes, _of(Blob, value).data), _numpy_dtype(dtype)).item()


def _array(array: _Array) -> list[Any]:
    _, shape, dtype, fortran, blob = _of(tuple, array.state)
    flat = np.frombuffer(_of(bytes, _of(Blob, blob).data), _numpy_dtype(dtype))
    if flat.size > MAX_PLAIN or len(shape) > MAX_DEPTH:
        raise TypeError("too large for an argument")
    return flat.reshape(shape, order="F" if fortran else "C").tolist()


def _network(saved: _Saved) -> SavedNetwork:
    modules = saved.state.get("_modules") or {}
    inner = next((modules[name] for name in ("model", "unet") if isinstance(modules.get(name), _Saved)), None)
    arguments = {} if inner is None else {"model_type": inner.class_name}
    left = [MAX_PLAIN]
    for part in (inner, saved):
        if part is not None:
            attributes = {k: v for k, v in part.state.items() if not k.startswith("_") and k != "training"}
            for source in (attributes, part.state.get("_init_kwargs") or {}):
                arguments |= _plain_items(source, left)
    tensors, parameters = {}, 0
    for kind, name, tensor in _tensors(saved):
        tensors[name] = tensor
        parameters += tensor.numel() * (kind == "_parameters")
    return SavedNetwork(saved.class_name, arguments, tensors, parameters)


def _plain_items(source: dict[Any, Any], left: list[int], depth: int = 0) -> dict[str, Any]:
    """Those items of `source` that are plain data."""
    plain = {name: _plain(value, left, depth + 1) for name, value in source.items() if isinstance(name, str)}
    return {name: value for name, value in plain.items() if value is not _NOT_PLAIN}


_NOT_PLAIN = object()


def _plain(value: Any, left: list[int], depth: int) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise Refused("it is damaged, or no snapshot: a network in it was made with too many arguments")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, _Array):
        return _array(value)
    if isinstance(value, dict):
        return _plain_items(value, left, depth)
    if isinstance(value, (list, tuple)):
        items = [_plain(item, left, depth + 1) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else items
    return _NOT_PLAIN


def _tensors(saved: _Saved) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, dotted name, tensor) of all parameters and persistent buffers in a module, in a state dict's order."""
    visited = found = 0
    waiting: list[tuple[str, int, Any]] = [("", 0, saved)]
    while waiting:
        prefix, depth, module = waiting.pop()
        visited += 1
        if depth > MAX_DEPTH or visited > MAX_MODULES or found > MAX_TENSORS:
            raise Refused("it is damaged, or no snapshot: the modules of its network have no end")
        if module is None:
            continue
        state: dict[str, Any] = _of(dict, module.state if isinstance(module, (_Saved, _Module)) else None)
        hidden = state.get("_non_persistent_buffers_set") or ()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in (state.get(kind) or {}).items():
                if tensor is not None and not (kind == "_buffers" and name in hidden):
                    found += 1
                    yield kind, prefix + _part(name), _of(Tensor, tensor)
        inner = [(f"{prefix}{_part(name)}.", depth + 1, part) for name, part in (state.get("_modules") or {}).items()]
        waiting += reversed(inner)


def _part(name: Any) -> str:
    """A part of a dotted name, which must be short: names of names are many times as long."""
    if not re.fullmatch(r"\w{1,100}", _of(str, name), re.ASCII):
        raise TypeError("no module's name")
    return name
