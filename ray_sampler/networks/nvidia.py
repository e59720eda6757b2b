"""Network snapshots of NVlabs/edm and NVlabs/edm2, read without running anything in them.

Such a file is a pickle of {"ema": network, "loss_fn": ..., ...}. Each object in it is stored with the source text of
its class, which their own reader executes. Here the state of the objects is read as plain data, and the source text is
compared with what was published, and never run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ray_sampler.networks.formats import KNOWN, Stored, load
from ray_sampler.networks.inert import Foreign, Known, Refused, damage_refused, unpickle
from ray_sampler.networks.source_text import changed

__all__ = ["Arguments", "Refused", "SavedNetwork", "check_sizes", "looks_like_nvidia", "read_pickle", "stripped"]

T = TypeVar("T")
S = TypeVar("S", bound=str)

MOST = 2**20
"""No width, size or number of classes of a network comes near."""
LEAST = 2**-10
MOST_VALUES = 16
MOST_BLOCKS = 64

MAX_DEPTH = 16
"""Of modules and arguments inside one another, which may be circles in a damaged file."""

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
NAMES = re.compile(
    rf"{re.escape(PERSISTENT)}|torch\.nn\.modules\.\w+\.[A-Z]\w*|dnnlib\.util\.EasyDict|collections\.OrderedDict"
    r"|torch\._utils\._rebuild_(parameter|tensor_v2)|torch\.storage\._load_from_bytes|_codecs\.encode"
    r"|(builtins|__builtin__)\.set|numpy\._?core\.multiarray\.(scalar|_reconstruct)|numpy\.(ndarray|dtype)"
)
"""All that a snapshot may name; each is a stand-in."""

ARRAY = "multiarray._reconstruct"
"""How the name of what makes an array of a pickle ends."""

SETS = {(module, "set"): Known(set) for module in ("builtins", "__builtin__")}


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
    each in separate memory."""
    parameters: int = 0
    """Numbers in all parameters; buffers do not count."""
    changed: tuple[str, ...] = ()
    """Names in the source text of its classes, used by them, that are not as published."""


class _Placed(NamedTuple):
    """A tensor of a module, by its dotted name there."""

    kind: str
    """_parameters or _buffers."""
    name: str
    stored: Stored


def looks_like_nvidia(head: bytes) -> bool:
    """Whether a file that begins with `head` is a snapshot of NVlabs/edm or NVlabs/edm2; some kilobytes are enough."""
    return head[:1] == b"\x80" and b"torch_utils.persistence" in head and b"_reconstruct_persistent_obj" in head


def read_pickle(file: BinaryIO) -> dict[str, SavedNetwork]:
    """The objects of a snapshot by their key in it ("ema", "encoder", ...), as plain data and tensors.

    Reads the file once, from its beginning to its end. Memory at the peak: the file, and its largest tensor once more.

    Raises:
        Refused: the file names something that a snapshot does not need, is damaged, or holds no network.
    """
    file.seek(0)
    with damage_refused():
        content = unpickle(file, KNOWN | SETS, allowed=lambda name: NAMES.fullmatch(name) is not None)
        items = content if isinstance(content, dict) else {}
        objects = {key: value for key, value in items.items() if _is_saved(value)}
        if not objects or not all(isinstance(key, str) for key in objects):
            raise Refused(
                "it is a pickle without a network; a snapshot of NVlabs/edm or NVlabs/edm2 holds one under 'ema'"
            )
        placed = {key: list(_tensors(saved)) for key, saved in objects.items()}
        described = {key: (_class_and_state(saved)[0], _arguments(saved)) for key, saved in objects.items()}
        parameters = {
            key: sum(each.stored.like.numel() for each in tensors if each.kind == "_parameters")
            for key, tensors in placed.items()
        }
        differing = {key: _changed(saved) for key, saved in objects.items()}
        loaded = load({(key, each.name): each.stored for key, tensors in placed.items() for each in tensors})
        tensors: dict[str, dict[str, Tensor]] = {key: {} for key in objects}
        for key, name in list(loaded):
            tensors[key][name] = _own(loaded.pop((key, name)))
    return {key: SavedNetwork(*described[key], tensors[key], parameters[key], differing[key]) for key in objects}


def stripped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A snapshot's tensors under a network's names: without its prefix and what lies beside it.

    What sampling does not use is left out: filters, which follow from the options, and weights of the loss.
    """
    begin = prefix if any(name.startswith(prefix) for name in tensors) else ""
    kept = {name.removeprefix(begin): tensor for name, tensor in tensors.items() if name.startswith(begin)}
    return {n: t for n, t in kept.items() if not (n.endswith("resample_filter") or n.startswith("logvar_"))}


def _own(tensor: Tensor) -> Tensor:
    """The tensor, copied unless it fills its memory in order."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _is_saved(value: Any) -> bool:
    return isinstance(value, Foreign) and value.name == PERSISTENT


def _class_and_state(value: Foreign) -> tuple[str, dict[str, Any]]:
    """The class name and the attributes of an object of theirs, or of torch.nn."""
    if not _is_saved(value):
        return value.name, value.state
    (meta,) = value.args
    if not isinstance(meta["class_name"], str):
        raise TypeError("the name of a class is not text")
    return meta["class_name"], meta["state"]


def _arguments(saved: Foreign) -> dict[str, Any]:
    modules = _class_and_state(saved)[1].get("_modules") or {}
    inner = next((modules[name] for name in ("model", "unet") if _is_saved(modules.get(name))), None)
    arguments = {} if inner is None else {"model_type": _class_and_state(inner)[0]}
    for part in (inner, saved):
        if part is not None:
            state = _class_and_state(part)[1]
            attributes = {k: v for k, v in state.items() if not k.startswith("_") and k != "training"}
            arguments |= _plain(attributes) | _plain(state.get("_init_kwargs") or {})
    return arguments


def _changed(saved: Foreign) -> tuple[str, ...]:
    """What differs from what was published, in the source text of an object's class and of the modules in it."""
    sources: dict[str, dict[str, None]] = {}
    modules = [saved]
    for module in modules:  # a finite tree, as its tensors were listed
        name, state = _class_and_state(module)
        if _is_saved(module) and isinstance(text := module.args[0].get("module_src"), str):
            sources.setdefault(text, {})[name] = None
        modules += filter(None, (state.get("_modules") or {}).values())
    return tuple(dict.fromkeys(name for text, classes in sources.items() for name in changed(text, classes)))


_NOT_PLAIN = object()


def _plain(value: Any, depth: int = 0) -> Any:
    """Numbers, texts, and lists and dictionaries of them; other items of a dictionary are left out."""
    if depth > MAX_DEPTH:
        raise Refused("it is damaged, or no snapshot: a network in it was made with too many arguments")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Foreign) and value.name.endswith("multiarray.scalar"):
        dtype, data = value.args
        return np.frombuffer(data, _number_type(dtype)).item()
    if isinstance(value, Foreign) and value.name.endswith(ARRAY):
        return array_of(value).tolist()
    if isinstance(value, Foreign) and value.name.endswith("EasyDict"):
        value = value.items
    if isinstance(value, dict):
        plain = {name: _plain(each, depth + 1) for name, each in value.items() if isinstance(name, str)}
        return {name: each for name, each in plain.items() if each is not _NOT_PLAIN}
    if isinstance(value, (list, tuple)):
        items = [_plain(each, depth + 1) for each in value]
        return _NOT_PLAIN if any(each is _NOT_PLAIN for each in items) else items
    return _NOT_PLAIN


def array_of(value: Foreign) -> np.ndarray:
    """An array of numbers, as numpy pickles it."""
    _, shape, dtype, fortran, data = value.state
    return np.frombuffer(data, _number_type(dtype)).reshape(shape, order="F" if fortran else "C")


def _number_type(dtype: Foreign) -> np.dtype[Any]:
    """numpy's dtype(code, align, copy), whose state holds the byte order."""
    code = dtype.args[0]
    order = dtype.state[1] if dtype.state else "|"
    if not re.fullmatch(r"[fiu][248]|[iu]1|b1", code) or order not in ("<", ">", "|"):
        raise TypeError("no type of numbers")
    return np.dtype(order + code)


def _tensors(module: Foreign | None, prefix: str = "", depth: int = 0) -> Iterator[_Placed]:
    """All parameters and persistent buffers of a module, in a state dict's order."""
    if depth > MAX_DEPTH:
        raise Refused("it is damaged, or no snapshot: the modules of its network have no end")
    if module is None:
        return
    state = _class_and_state(module)[1]
    hidden = state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, stored in (state.get(kind) or {}).items():
            if stored is None or (kind == "_buffers" and name in hidden):
                continue
            if not isinstance(stored, Stored) or stored.like.nbytes > stored.storage.size:
                raise TypeError("a tensor whose elements are not all in the file")
            yield _Placed(kind, prefix + name, stored)
    for name, part in (state.get("_modules") or {}).items():
        yield from _tensors(part, f"{prefix}{name}.", depth + 1)


class Arguments:
    """Recorded arguments by name, each checked, with the default of those that are absent or None."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded

    def taken(self, name: str, default: Any, right: str, is_right: Callable[[Any], bool]) -> Any:
        """A value that satisfies `is_right`; `right` says in words what does."""
        value = self.recorded.get(name)
        value = default if value is None else value
        if value is None:
            raise Refused(f"its network does not say what its {name} is")
        if not is_right(value):
            raise self.refused(name, value, right)
        return value

    def number(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number."""
        right = f"a whole number from {least} to {most}"
        return int(self.taken(name, default, right, lambda n: type(n) is int and least <= n <= most))

    def numbers(self, name: str, default: tuple[float, ...], even: bool = False) -> tuple[float, ...]:
        """A few positive numbers; an even number of them if `even`, as a filter must have that doubles."""
        right = f"a list of {'an even number of' if even else f'1 to {MOST_VALUES}'} positive numbers"
        step = 2 if even else 1
        value = self.taken(name, default, right, lambda v: is_list(v, positive) and v and len(v) % step == 0)
        return tuple(map(float, value))

    def resolutions(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels a side, any number of them."""
        whole = self.taken(name, default, "a list of whole numbers", lambda v: is_list(v, lambda n: type(n) is int))
        return tuple(whole)

    def factor(self, name: str, default: T) -> float | T:
        """A positive number."""
        given = self.recorded.get(name) is not None
        return float(self.taken(name, default, "a positive number", positive)) if given else default

    def fraction(self, name: str, default: float) -> float:
        """A number from 0 to 1."""
        right = "a number from 0 to 1"
        return float(self.taken(name, default, right, lambda n: type(n) in (int, float) and 0 <= n <= 1))

    def choice(self, name: str, choices: tuple[S, ...]) -> S:
        """One of `choices`, the first where it is absent."""
        value = self.taken(name, choices[0], " or ".join(choices), lambda each: each in choices)
        return choices[choices.index(value)]

    @staticmethod
    def refused(name: str, value: Any, right: str) -> Refused:
        return Refused(f"its network has {name} {ascii(value)[:60]}; only {right} can be sampled")


def positive(value: Any) -> bool:
    """Whether it is a number that a network can have."""
    return type(value) in (int, float) and LEAST <= value <= MOST


def is_list(value: Any, each: Callable[[Any], bool]) -> bool:
    """Whether it is a list of a few such values."""
    return isinstance(value, (list, tuple)) and len(value) <= MOST_VALUES and all(map(each, value))


def check_sizes(resolution: int, channels: tuple[int, ...], *embedded: int) -> None:
    """Refuses levels that do not halve the resolution, and widths that no network has."""
    if resolution % 2 ** (len(channels) - 1):
        raise Refused(f"its network has {len(channels)} levels, but {resolution} pixels a side")
    for width in (*channels, *embedded):
        if not 1 <= width <= MOST:
            raise Refused(f"its network has a layer of {width} channels")
