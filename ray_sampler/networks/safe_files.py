"""safetensors files: their tensors, still in the file.

The package of that name maps a file into memory, where a file that becomes shorter ends the process.
"""

from __future__ import annotations

import json
from functools import partial
from typing import BinaryIO

import torch

from ray_sampler.networks.pickles import Refused
from ray_sampler.networks.stored import Budget, Entry, Odd, Storage, read_bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
MAX_HEADER = 2**25
"""Bytes that the header of a safetensors file may have here: room for 200,000 tensors."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with `head` is a safetensors file: the length of its header, and the header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def read_safetensors(file: BinaryIO, size: int) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        Refused: it is damaged.
    """
    file.seek(0)
    begin = 8 + int.from_bytes(file.read(8), "little")
    if begin > size:
        raise Refused("it is truncated: a safetensors file that ends in its header")
    try:
        header = json.loads(file.read(begin - 8))
    except (ValueError, RecursionError) as error:
        raise Refused("it is damaged: a safetensors file whose header is no JSON") from error
    budget, end = Budget(size), begin
    tensors: dict[str, Entry] = {}
    for name, described in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (first, last) = (
                DTYPES.get(described["dtype"]),
                described["shape"],
                described["data_offsets"],
            )
            whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
        except (TypeError, KeyError, ValueError) as error:
            raise Refused("it is damaged: a safetensors file that describes a tensor otherwise") from error
        if dtype is None:
            tensors[name] = Odd(f"a tensor of {ascii(described['dtype'])[:20]}")
            continue
        if not whole or first > last:
            raise Refused("it is damaged: a safetensors file that describes a tensor otherwise")
        storage = Storage(last - first, partial(read_bytes, file, begin + first, last - first), begin + first)
        end = max(end, begin + last)
        stored = budget.tensor(storage, dtype, shape, _contiguous(shape), 0)
        if stored.size != storage.size:
            raise Refused("it is damaged: a tensor in it has another size than it says")
        tensors[name] = stored
    if end > size:
        raise Refused(f"it is truncated: a safetensors file of {end} bytes, of which {size} are there")
    return tensors


def _contiguous(shape: list[int]) -> tuple[int, ...]:
    strides = [1]
    for n in reversed(shape[1:]):
        strides.append(strides[-1] * max(n, 1))
    return tuple(reversed(strides)) if shape else ()
