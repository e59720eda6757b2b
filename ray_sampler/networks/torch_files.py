"""What torch.save and pickle write: the content of such a file, with tensors that are still in it."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ray_sampler.networks.pickles import Blob, Inert, Name, Refused, is_key, read
from ray_sampler.networks.stored import DAMAGED, Budget, Entry, Odd, Storage, read_bytes

MAGIC = 0x1950A86A20F9469CFC6C
"""With this number, and the next, begins what torch.save wrote before it wrote zip files."""
PROTOCOL = 1001

NUMBERS = {
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
}
"""Storages of plain numbers, by the names of their classes."""

STORAGES = NUMBERS | {
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QUInt8Storage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QInt32Storage": torch.int32,
    "UntypedStorage": torch.uint8,
}
"""Those of quantised numbers by what lies in memory: a tensor of them is refused where it is rebuilt."""

DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
        *("float8_e5m2fnuz", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("complex64", "complex128"),
    )
    if hasattr(torch, name)
}
ODD = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor of the meta device, that is without values",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_device_tensor_from_numpy": "an array of NumPy",
    "_rebuild_xla_tensor": "an array of NumPy",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
}
SHARDS = ("ShardedTensor", "DTensor", "FlatParameter")
"""Classes of tensors of which each process has a part."""


class Foreign(Inert):
    """An object of a class that the file names, or the result of a function: never looked up, never called."""

    __slots__ = ("name",)

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__(*args)
        # Pickles of protocols 0 and 1 name the class in the arguments.
        first = args[0] if args and name.endswith(("copy_reg._reconstructor", "copyreg._reconstructor")) else None
        self.name = first.name if isinstance(first, Name) else name


class View:
    """A storage as a pickle refers to it: the dtype of its elements, and its first one in a larger storage."""

    def __init__(self, storage: Storage, dtype: torch.dtype, start: int = 0) -> None:
        self.storage = storage
        self.dtype = dtype
        self.start = start
        """In bytes."""


class _Stands:
    """The stand-ins for the names in one file of `size` bytes."""

    def __init__(self, size: int, blobs: bool = False) -> None:
        self.budget = Budget(size)
        self.blobs = blobs

    def lookup(self, module: str, name: str) -> Callable[..., Any]:
        if module in ("torch._utils", "torch._tensor", "torch.tensor"):
            known: dict[str, Callable[..., Any]] = {
                "_rebuild_tensor": self.tensor,
                "_rebuild_tensor_v2": self.tensor,
                "_rebuild_tensor_v3": self.typed_tensor,
                "_rebuild_parameter": lambda data, *_: data,
                "_rebuild_parameter_with_state": lambda data, *_: data,
                "_rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
                "_rebuild_from_type": lambda function, _type, args, *_: _called(function, args),
                "_rebuild_from_type_v2": lambda function, _type, args, *_: _called(function, args),
            }
            if name in known:
                return known[name]
            if name in ODD:
                return lambda *_: Odd(ODD[name])
        elif module == "collections" and name in ("OrderedDict", "defaultdict"):
            return _dictionary if name == "OrderedDict" else lambda *_: {}
        elif (module, name) == ("torch", "Size"):
            return lambda *sizes: tuple(sizes[0]) if sizes else ()
        elif (module, name) == ("torch.storage", "_load_from_bytes") and self.blobs:
            return _blob
        elif (module, name) == ("_codecs", "encode") and self.blobs:
            return lambda text, _code="latin1": Blob(text.encode("latin-1"))  # bytes, in protocols 0 to 2
        return partial(Foreign, f"{module}.{name}")

    def tensor(self, view: Any, offset: Any, shape: Any, strides: Any, *others: Any) -> Entry:
        if not isinstance(view, View):
            raise Refused(f"{DAMAGED}: a tensor in it has no storage")
        if any(type(other) is dict and other.get(bit) for other in others[2:] for bit in ("conj", "neg")):
            return Odd("a tensor whose conjugate or negative is meant")
        return self.budget.tensor(view.storage, view.dtype, shape, strides, offset, view.start)

    def typed_tensor(
        self, view: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *others: Any
    ) -> Entry:
        kind = DTYPES.get(dtype.name) if isinstance(dtype, Name) else None
        if kind is None or not isinstance(view, View):
            return Odd("a tensor of an unknown dtype")
        return self.tensor(View(view.storage, kind, view.start), offset, shape, strides, None, None, *others)


def _called(function: Any, args: Any) -> Any:
    return function.make(*args) if isinstance(function, Name) else Foreign("a call", args)


def _dictionary(*pairs: Any) -> dict[Any, Any]:
    """An OrderedDict. Python 2 wrote its items as an argument, a list of pairs."""
    return {key: value for key, value in pairs[0] if is_key(key)} if pairs else {}


def _text(value: Any) -> str:
    if isinstance(value, Blob) and value.data is not None:  # what Python 2 wrote
        return value.data.decode()
    if not isinstance(value, str):
        raise TypeError("a text is expected")
    return value


def _storage_dtype(kind: Any) -> torch.dtype:
    name = kind.name if isinstance(kind, Name) else ""
    dtype = STORAGES.get(name.rpartition(".")[2]) if name.startswith("torch.") else None
    if dtype is None:
        raise Refused(f"it has numbers of an unknown type, {ascii(name)[:80]}")
    return dtype


def read_zip(file: BinaryIO, size: int) -> Any:
    """What torch.save has written since version 1.6: a zip archive of a pickle and the storages.

    Raises:
        Refused: it is damaged, or another zip archive.
    """
    try:
        records = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    # zipfile raises a RuntimeError where a damaged directory asks for a zip version that it does not know.
    except (zipfile.BadZipFile, ValueError, RuntimeError, struct.error, zlib.error, OverflowError) as error:
        raise Refused("it is truncated or damaged: a zip archive, as torch.save writes, without its end") from error
    folder = next(
        (name.partition("/")[0] for name in records if name.count("/") == 1 and name.endswith("/data.pkl")), None
    )
    if folder is None:
        kind = "an archive of NumPy" if any(name.endswith(".npy") for name in records) else "a zip archive"
        raise Refused(f"it is {kind}, and holds no checkpoint of torch.save; unpack it and name the checkpoint in it")
    if f"{folder}/constants.pkl" in records and any(name.startswith(f"{folder}/code/") for name in records):
        raise Refused(
            "it is a TorchScript program, not weights; save its state dict alone, "
            "with torch.save(torch.jit.load(...).state_dict(), ...)"
        )

    def record(name: str) -> tuple[int, zipfile.ZipInfo]:
        info = records.get(f"{folder}/{name}")
        if info is None:
            raise Refused(f"{DAMAGED}: its record {ascii(name)[:80]} is missing")
        return _position(file, size, info), info

    swapped = f"{folder}/byteorder" in records and _bytes(file, *record("byteorder")) == b"big"
    views: dict[str, Storage] = {}
    left = size

    def load(position: int, info: zipfile.ZipInfo, dtype: torch.dtype) -> Tensor:
        data = read_bytes(file, position, info.file_size, info.CRC)
        if swapped:
            data.untyped_storage().byteswap(dtype)
        return data

    def persistent(saved: Any) -> View:
        nonlocal left
        kind, storage_type, key, _location, _count = saved
        if _text(kind) != "storage":
            raise Refused(f"{DAMAGED}: it refers to something that is no storage")
        dtype, key = _storage_dtype(storage_type), _text(key)
        if key not in views:
            position, info = record(f"data/{key}")
            left -= info.file_size
            if left < 0:  # records that lie on one another
                raise Refused(f"{DAMAGED}: its records are larger than the file")
            views[key] = Storage(info.file_size, partial(load, position, info, dtype), position)
        return View(views[key], dtype)

    position, info = record("data.pkl")
    file.seek(position)
    pickled = io.BytesIO(file.read(info.file_size))  # `record` moves the position of the file
    return read(pickled, info.file_size, _Stands(size).lookup, persistent)


def _position(file: BinaryIO, size: int, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record of a zip archive begin."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise Refused("its records are compressed, as torch.save never has them; unpack it and zip it uncompressed")
    inside = 0 <= info.header_offset <= size
    file.seek(info.header_offset if inside else size)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise Refused(f"{DAMAGED}: its zip records are not where it says")
    position = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
    if position + info.file_size > size:
        raise Refused(f"{DAMAGED}: it ends before its tensors do")
    return position


def _bytes(file: BinaryIO, position: int, info: zipfile.ZipInfo) -> bytes:
    return bytes(read_bytes(file, position, min(info.file_size, 64)).tolist())


def read_pickle(file: BinaryIO, size: int) -> Any:
    """What torch.save wrote before version 1.6, or writes with _use_new_zipfile_serialization=False, and other pickles.

    Raises:
        Refused: it is damaged.
    """
    file.seek(0)
    stands = _Stands(size, blobs=True)
    first = read(file, size, stands.lookup)
    return _legacy(file, size, stands, partial(read_bytes, file)) if first == MAGIC and type(first) is int else first


def _legacy(file: BinaryIO, size: int, stands: _Stands, load: Callable[[int, int], Tensor]) -> Any:
    """The content of a file of the old layout after its magic number: pickles, then the bytes of each storage."""

    def next_pickle(persistent: Callable[[Any], Any] | None = None) -> Any:
        return read(file, size - file.tell(), stands.lookup, persistent)

    storages: dict[str, tuple[Storage, torch.dtype]] = {}

    def persistent(saved: Any) -> Any:
        kind = _text(saved[0])
        if kind == "module":  # a class and the text of its source, which is not read
            return saved[1]
        if kind != "storage":
            raise Refused(f"{DAMAGED}: it refers to something that is no storage")
        _, storage_type, key, _location, count, *views = saved
        dtype, key = _storage_dtype(storage_type), _text(key)
        if type(count) is not int or count < 0:
            raise Refused(f"{DAMAGED}: a storage in it has no size")
        storage, _ = storages.setdefault(key, (Storage(count * dtype.itemsize), dtype))
        start = views[0][1] if views and type(views[0]) is tuple else 0
        if type(start) is not int or start < 0:
            raise Refused(f"{DAMAGED}: a storage in it begins nowhere")
        return View(storage, dtype, start * dtype.itemsize)

    if next_pickle() != PROTOCOL:
        raise Refused(f"{DAMAGED}, or written by another version of torch.save")
    next_pickle()  # of the machine that wrote it
    content = next_pickle(persistent)
    keys = next_pickle()
    position = file.tell()
    if type(keys) is not list or len(keys) != len(storages):
        raise Refused(f"{DAMAGED}: its list of storages is another than its tensors need")
    for key in keys:
        storage, dtype = storages.pop(key, (None, torch.uint8)) if is_key(key) else (None, torch.uint8)
        file.seek(position)
        head = file.read(8)
        if storage is None or len(head) != 8 or position + 8 + storage.size > size:
            raise Refused(f"{DAMAGED}: it ends before its tensors do")
        if struct.unpack("<q", head)[0] * dtype.itemsize != storage.size:
            raise Refused(f"{DAMAGED}: a storage in it has another size than it says")
        storage.position = position + 8
        storage.load = partial(load, storage.position, storage.size)
        position += 8 + storage.size
    return content


def _blob(blob: Any) -> View:
    """The storage that a plain pickle holds as bytes, which are a file of the old layout."""
    if not isinstance(blob, Blob):
        raise TypeError("bytes are expected")
    if blob.data is not None:
        size, held = len(blob.data), [blob.data]
        file, stands = io.BytesIO(blob.data), _Stands(size)
        if read(file, size, stands.lookup) != MAGIC:
            raise Refused(f"{DAMAGED}: a tensor in it is stored in an unknown way")
        # A storage is loaded once, and its bytes are freed then.
        blob.made = _legacy(file, size, stands, lambda at, count: read_bytes(io.BytesIO(held.pop()), at, count))
        blob.data = None
    if not isinstance(blob.made, View):
        raise Refused(f"{DAMAGED}: a tensor in it is stored in an unknown way")
    return blob.made
