"""Tensors that are still in their file: what the file says of them, and their values when they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch
from isal import isal_zlib
from torch import Tensor

from ray_sampler.networks.pickles import Refused

CHUNK = 2**22
"""Bytes that one read asks for: they are still in the processor's cache when their CRC is taken."""

MAX_DIMENSIONS = 64
LARGEST = 2**48
"""Of sizes, strides and offsets: torch counts in 64 bits."""
SLACK = 2**26
SHARED = 8
"""How many times a file's bytes its tensors may have together, since they may share memory."""

CUT = "it is truncated: it became shorter while it was read"
DAMAGED = "it is truncated or damaged"


class Storage:
    """The memory of one or more tensors, in the file."""

    def __init__(self, size: int, load: Callable[[], Tensor] | None = None, position: int = 0) -> None:
        self.size = size
        """In bytes."""
        self.load = load
        """Reads it, as uint8."""
        self.position = position
        """In the file, where storages are read in this order."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A dense tensor in the file."""

    storage: Storage = field(repr=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """In elements, as strides are."""

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Odd:
    """A tensor that is not dense and in the file."""

    what: str
    """As in "a sparse tensor"."""


Entry = Stored | Odd


class Budget:
    """Keeps the tensors of a damaged file from being larger than any file of its size could make them."""

    def __init__(self, size: int) -> None:
        self.left = SHARED * size + SLACK

    def tensor(self, storage: Any, dtype: torch.dtype, shape: Any, strides: Any, offset: Any, start: int = 0) -> Stored:
        """The tensor, if it lies in its storage. `start` is where in the storage element 0 is, in bytes."""
        numbers = (*shape, *strides, offset)
        whole = all(type(number) is int and 0 <= number < LARGEST for number in numbers)
        if not (isinstance(storage, Storage) and whole and len(shape) == len(strides) <= MAX_DIMENSIONS):
            raise Refused(f"{DAMAGED}: a tensor in it has no size")
        if start % dtype.itemsize:
            raise Refused(f"{DAMAGED}: a tensor in it begins between two numbers")
        stored = Stored(storage, dtype, tuple(shape), tuple(strides), offset + start // dtype.itemsize)
        last = stored.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        self.left -= stored.size
        too_long = (
            (last + 1) * dtype.itemsize > storage.size if stored.size else math.prod(n or 1 for n in shape) > LARGEST
        )
        if too_long or self.left < 0:
            raise Refused(f"{DAMAGED}: it is too short for the tensors that it lists")
        return stored


def read_bytes(file: BinaryIO, position: int, count: int, crc: int = 0) -> Tensor:
    """Bytes of the file, (count,) uint8, in memory of their own. A `crc` other than 0 is compared with their CRC-32."""
    data = torch.empty(count, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs know no Buffer before 3.12
    file.seek(position)
    done = computed = 0
    while done < count:
        part = view[done : done + CHUNK]
        arrived: int = file.readinto(part)  # type: ignore[attr-defined]  # every binary file has it
        if not arrived:
            raise Refused(CUT)
        if crc:
            computed = isal_zlib.crc32(part[:arrived], computed)
        done += arrived
    if computed != crc:
        raise Refused("it is damaged: the CRC-32 of its tensors is another than it says")
    return data


def load(tensors: Mapping[str, Stored]) -> dict[str, Tensor]:
    """The tensors by name, each storage read once, in the order of the file.

    Tensors share memory where they do in the file, and with no others.
    """
    names: dict[Storage, list[str]] = {}
    for name, stored in tensors.items():
        names.setdefault(stored.storage, []).append(name)
    loaded = {}
    for storage in sorted(names, key=lambda storage: storage.position):
        assert storage.load is not None
        data = storage.load()
        for name in names[storage]:
            stored = tensors[name]
            whole = data[: len(data) // stored.dtype.itemsize * stored.dtype.itemsize].view(stored.dtype)
            loaded[name] = whole.as_strided(stored.shape, stored.strides, stored.offset)
    return {name: loaded[name] for name in tensors}
