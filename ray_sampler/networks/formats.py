"""The content of a checkpoint by its format, with tensors that are still in the file until they are wanted."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ray_sampler.networks.inert import DAMAGED, Foreign, Items, Known, Refused, damage_refused, unpickle

CHUNK = 2**20
"""Bytes of one read, which are still in the processor's cache when their CRC is taken."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""With this number, and the next, begins what torch.save wrote before it wrote zip files."""
LEGACY_PROTOCOL = 1001

SHARED = 8
SLACK = 2**26
"""A tensor whose elements share memory may have 8 times the bytes of its storage, or 64 MiB."""

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QUInt8Storage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8,
}
"""Of storages, by the names of their classes. Those of quantised numbers by what lies in memory."""

DTYPES_V3 = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int64, torch.int32, torch.int16, torch.int8),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128),
    )
}
"""Of tensors that name theirs beside a storage of plain bytes."""

SAFE_DTYPES = {
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

ODD = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor of the meta device, that is without values",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_device_tensor_from_numpy": "an array of NumPy",
    "_rebuild_xla_tensor": "an array of NumPy",
    "_rebuild_wrapper_subclass": "a tensor of a custom class",
}


FOREIGN = {
    b"version https://git-lfs": "it is a pointer of Git LFS and not the file itself; fetch that with git lfs pull, or "
    "download it by itself",
    b"<": "it is an HTML page or XML, such as a site shows in place of a download; check the address",
    **dict.fromkeys(
        (b"{", b"["), "it is a JSON text, such as the configuration of a network; name the file with its weights"
    ),
    b"\x1f\x8b": "it is compressed with gzip; unpack it with gunzip",
}
"""What files begin with that people take for checkpoints, after white space, and what is to be said of them."""


@dataclass(eq=False)
class Storage:
    """The memory of one or more tensors, in the file."""

    size: int
    """In bytes."""
    load: Callable[[], Tensor] | None = None
    """Reads it, as uint8, into new memory."""
    position: int = 0
    """In the file, where storages are read in this order."""
    part: int = 0
    """Which of several files."""


@dataclass(frozen=True, eq=False)
class View:
    """A storage as a pickle refers to it: the dtype of its elements, and its first one in a larger storage."""

    storage: Storage
    dtype: torch.dtype
    start: int = 0
    """In bytes."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A dense tensor in the file."""

    storage: Storage = field(repr=False)
    like: Tensor
    """Has its dtype, shape and strides, and no values."""
    start: int
    """Its first byte in the storage."""

    @property
    def end(self) -> int:
        """The byte after its last one in the storage."""
        return self.start + self.like.untyped_storage().nbytes()


@dataclass(frozen=True)
class Odd:
    """A tensor that is not dense and in the file."""

    what: str
    """As in "a sparse tensor"."""


Entry = Stored | Odd


def content_of(file: BinaryIO, head: bytes) -> Any:
    """What a checkpoint holds: dictionaries, lists, `Foreign` objects, and `Entry` for each tensor.

    Args:
        file: seekable and buffered, a file of the system's.
        head: its first kilobytes.

    Raises:
        Refused: it is not a checkpoint, or damaged.
    """
    reader: Callable[[BinaryIO], Any]
    if head.startswith(b"PK\x03\x04"):
        reader = _read_zip
    elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:  # the length of its header, and the header
        reader = _read_safetensors
    elif head.startswith(b"\x80"):
        reader = _read_pickle
    else:
        raise Refused(_foreign_kind(head))
    file.seek(0)
    with damage_refused():
        return reader(file)


def _foreign_kind(head: bytes) -> str:
    """What a file other than a checkpoint is, by its first bytes, and what to do with it."""
    text = head[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    known = next((said for begin, said in FOREIGN.items() if text.startswith(begin)), None)
    if known is None and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in text):
        known = "it is text, not a checkpoint; name a file with weights" if text else "it is empty, or not written yet"
    return known or "it is truncated, damaged, or not a checkpoint (torch.save, safetensors or pickle)"


def _read_zip(file: BinaryIO) -> Any:
    """What torch.save has written since version 1.6: a zip archive of a pickle and the storages."""
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    folder = next((name.partition("/")[0] for name in names if name.count("/") == 1 and name.endswith("/data.pkl")), "")
    if not folder:
        kind = "an archive of NumPy" if any(name.endswith(".npy") for name in names) else "a zip archive"
        raise Refused(f"it is {kind}, and holds no checkpoint of torch.save; unpack it and name the checkpoint in it")
    if f"{folder}/constants.pkl" in names and any(name.startswith(f"{folder}/code/") for name in names):
        raise Refused(
            "it is a TorchScript program, not weights; save its state dict alone, "
            "with torch.save(torch.jit.load(...).state_dict(), ...)"
        )
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in archive.infolist()):
        raise Refused("its records are compressed, as torch.save never has them; unpack it and zip it uncompressed")
    for info in archive.infolist():
        if not info.CRC:
            del info.CRC  # it was saved without one: zipfile compares none then
    swapped = f"{folder}/byteorder" in names and archive.read(f"{folder}/byteorder") == b"big"
    storages: dict[str, Storage] = {}

    def persistent(saved: Any) -> View:
        kind, dtype, key, _location, _count = saved
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise Refused(f"{DAMAGED}: it refers to something that is not a storage of a known type")
        if key not in storages:
            info = archive.getinfo(f"{folder}/data/{key}")
            load = partial(_record, archive, info, dtype if swapped else None)
            storages[key] = Storage(info.file_size, load, info.header_offset)
        return View(storages[key], dtype)

    return unpickle(io.BytesIO(archive.read(f"{folder}/data.pkl")), KNOWN, persistent)


def _record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, swapped: torch.dtype | None) -> Tensor:
    """A record of a zip archive. zipfile compares its CRC-32."""
    with archive.open(info) as record:
        data = _filled(record, info.file_size)
    if swapped is not None:
        data.untyped_storage().byteswap(swapped)
    return data


def _filled(file: Any, count: int) -> Tensor:
    """The next bytes of a file, (count,) uint8, in new memory."""
    data = torch.empty(count, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]  # numpy's stubs know no Buffer before 3.12
    done = 0
    while done < count:
        arrived = file.readinto(view[done : done + CHUNK])
        if not arrived:
            raise Refused("it is truncated: it became shorter while it was read")
        done += arrived
    return data


def _read_safetensors(file: BinaryIO) -> dict[str, Entry]:
    """The tensors by name, read with pread: a mapping would end the process where the file becomes shorter."""
    archive: Any = safe_open(f"/proc/self/fd/{file.fileno()}", "pt", backend="pread")
    tensors: dict[str, Entry] = {}
    for position, name in enumerate(archive.offset_keys()):
        described = archive.get_slice(name)
        dtype = SAFE_DTYPES.get(described.get_dtype())
        if dtype is None:
            tensors[name] = Odd(f"a tensor of {described.get_dtype()}")
            continue
        like = torch.empty(described.get_shape(), dtype=dtype, device="meta")
        tensors[name] = Stored(Storage(like.nbytes, partial(_tensor, archive, name), position), like, 0)
    return tensors


def _tensor(archive: Any, name: str) -> Tensor:
    tensor: Tensor = archive.get_tensor(name).reshape(-1)
    return tensor.view(torch.uint8)


def _read_pickle(file: BinaryIO) -> Any:
    """What torch.save wrote before version 1.6, or writes with _use_new_zipfile_serialization=False, and other pickles.

    Read at the position of `file`.
    """
    first = unpickle(file, KNOWN)
    return _legacy(file) if first == LEGACY_MAGIC and type(first) is int else first


def _legacy(file: BinaryIO) -> Any:
    """The content of a file of the old layout after its magic number: pickles, then the bytes of each storage."""
    storages: dict[str, tuple[Storage, torch.dtype]] = {}

    def persistent(saved: Any) -> Any:
        if saved[0] == "module":  # a class and the text of its source, which is not read
            return saved[1]
        _, dtype, key, _location, count, *views = saved
        storage, _ = storages.setdefault(key, (Storage(count * dtype.itemsize), dtype))
        return View(storage, dtype, views[0][1] * dtype.itemsize if views and views[0] else 0)

    if unpickle(file, KNOWN) != LEGACY_PROTOCOL:
        raise Refused(f"{DAMAGED}, or written by another version of torch.save")
    unpickle(file, KNOWN)  # of the machine that wrote it
    content, keys = unpickle(file, KNOWN, persistent), unpickle(file, KNOWN)
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    for key in keys:
        storage, dtype = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        storage.position = position + 8
        storage.load = partial(_range, file, storage.position, storage.size)
        position = storage.position + storage.size
        if count * dtype.itemsize != storage.size or position > size:
            raise Refused(f"{DAMAGED}: it ends before its tensors do")
    return content


def _range(file: BinaryIO, position: int, count: int) -> Tensor:
    file.seek(position)
    return _filled(file, count)


def load(tensors: Mapping[Any, Stored]) -> dict[Any, Tensor]:
    """The tensors by name, each storage read once, in the order of the file. It cannot be read again.

    Tensors share memory where they do in the file, and with no others.

    Raises:
        Refused: the file is damaged, or became shorter.
    """
    names: dict[Storage, list[Any]] = {}
    for name, stored in tensors.items():
        names.setdefault(stored.storage, []).append(name)
    loaded = {}
    with damage_refused():
        for storage in sorted(names, key=lambda storage: (storage.part, storage.position)):
            if storage.load is None:
                raise Refused(f"{DAMAGED}: a tensor in it has no values")
            data, storage.load = storage.load(), None  # which frees the bytes of a pickle
            for name in names[storage]:
                stored = tensors[name]
                part = data[stored.start : stored.end].view(stored.like.dtype)
                loaded[name] = part.as_strided(stored.like.shape, stored.like.stride())
    return {name: loaded[name] for name in tensors}


def _rebuilt(view: Any, offset: int, shape: Any, strides: Any, *others: Any, dtype: torch.dtype | None = None) -> Entry:
    """The stand-in for torch._utils._rebuild_tensor and its like; `dtype` is None where the storage has it."""
    if not isinstance(view, View):
        raise Refused(f"{DAMAGED}: a tensor in it has no storage")
    if any(isinstance(other, dict) and (other.get("conj") or other.get("neg")) for other in others):
        return Odd("a tensor whose conjugate or negative is meant")
    like = torch.empty_strided(shape, strides, dtype=dtype or view.dtype, device="meta")
    stored = Stored(view.storage, like, view.start + offset * like.dtype.itemsize)
    # In whole numbers of any size, as torch takes a negative stride here, and reads before the storage later.
    last = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if like.numel() else -1
    inside = min(offset, *strides, 0) == 0 and stored.start + (last + 1) * like.dtype.itemsize <= view.storage.size
    if not inside or like.nbytes > max(SHARED * view.storage.size, SLACK):
        raise Refused(f"{DAMAGED}: it is too short for the tensors that it lists")
    return stored


def _rebuilt_v3(
    view: Any, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *others: Any
) -> Entry:
    if not isinstance(dtype, torch.dtype):
        return Odd("a tensor of an unknown dtype")
    return _rebuilt(view, offset, shape, strides, *others, dtype=dtype)


def _called(function: Any, _type: Any, args: Any, *_: Any) -> Any:
    return function(*args) if isinstance(function, Known) else Foreign(args)


def _blob(data: bytes) -> Any:
    """The storage that a plain pickle holds as bytes, which are a file of the old layout."""
    return _read_pickle(io.BytesIO(data))


TENSORS: dict[str, Any] = {
    "_rebuild_tensor": _rebuilt,
    "_rebuild_tensor_v2": _rebuilt,
    "_rebuild_tensor_v3": _rebuilt_v3,
    "_rebuild_parameter": lambda data, *_: data,
    "_rebuild_parameter_with_state": lambda data, *_: data,
    "_rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
    "_rebuild_from_type": _called,
    "_rebuild_from_type_v2": _called,
} | {name: lambda *_, what=what: Odd(what) for name, what in ODD.items()}

KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Items,
    ("collections", "defaultdict"): Items,
    ("torch", "Size"): Known(tuple),
    ("torch.storage", "_load_from_bytes"): Known(_blob),
    ("_codecs", "encode"): Known(lambda text, _code="latin1": text.encode("latin-1")),  # bytes, in protocols 0 to 2
    **{(module, name): dtype for name, dtype in DTYPES.items() for module in ("torch", "torch.storage")},
    **{("torch", name): dtype for name, dtype in DTYPES_V3.items()},
    **{
        (m, name): Known(make)
        for name, make in TENSORS.items()
        for m in ("torch._utils", "torch._tensor", "torch.tensor")
    },
}
"""The names that checkpoints need, and their stand-ins."""
