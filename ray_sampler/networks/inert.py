"""Pickles as data: stand-ins take the place of all that one names, and nothing is imported, looked up or called."""

from __future__ import annotations

import codecs
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from safetensors import SafetensorError

codecs.lookup("raw-unicode-escape")  # of pickletools, so that reading a file imports nothing

DAMAGED = "it is truncated or damaged"

BROKEN = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError, EOFError, MemoryError, RuntimeError, ValueError),
    *(TypeError, LookupError, AttributeError, OverflowError, struct.error, zlib.error),
)
"""What pickle, zipfile, safetensors and torch raise where bytes are not what they should be."""

RECONSTRUCTORS = ("copyreg._reconstructor", "copy_reg._reconstructor")


class Refused(ValueError):
    """A file that is not read. The message is what follows "--model is FILE; "."""


class Known:
    """A stand-in for a function of torch or Python: it calls `make` with the arguments in the file."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        """Without it, a file could set attributes of the stand-in."""


class Items(dict[Any, Any]):
    """A stand-in for OrderedDict and defaultdict."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*(pairs for pairs in args if isinstance(pairs, list)))  # as Python 2 wrote the items

    def __setstate__(self, state: Any) -> None:
        """Attributes beside the items, such as `_metadata` of a state dict, are left out."""


class Foreign:
    """An object of a class that a file names, or the result of a function. It only records what is done to it.

    For each name there is a subclass, as a pickle makes objects of classes only.
    """

    name = ""
    """Of the class or function, with its module."""
    args: tuple[Any, ...]
    state: Any
    """The object's attributes, as a rule."""
    items: dict[Any, Any]
    """What an object that is a kind of dictionary holds."""

    def __new__(cls, *args: Any, **_: Any) -> Foreign:
        # Pickles of protocols 0 and 1 name the class in the arguments.
        named = args[0] if args and cls.name in RECONSTRUCTORS else None
        made = super().__new__(named if isinstance(named, type) and issubclass(named, Foreign) else cls)
        made.args, made.state, made.items = args, None, {}
        return made

    def __call__(self, *args: Any) -> Foreign:
        return Foreign(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def extend(self, values: Any) -> None:
        """What an object that is a kind of list holds is left out."""

    def add(self, value: Any) -> None:
        """And what a set holds."""


class _Unpickler(pickle.Unpickler):
    """Python's own, which calls nothing but what `find_class` and `persistent_load` give it."""

    known: Mapping[tuple[str, str], Any]
    allowed: Callable[[str], bool]

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if not self.allowed(full):
            raise Refused(f"it references {ascii(full)[1:-1][:100]}; loading it could execute code, so it is refused")
        return self.known.get((module, name)) or type("Foreign", (Foreign,), {"name": full})


def unpickle(
    file: BinaryIO,
    known: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any] | None = None,
    allowed: Callable[[str], bool] = lambda name: True,
) -> Any:
    """The object of the pickle that begins at the position of `file`, which is left after its end.

    Args:
        known: stand-ins by (module, name). Every other name becomes a subclass of `Foreign`.
        persistent: turns a persistent id into an object; without it there may be none.
        allowed: whether a pickle may have a name, module.name.

    Raises:
        Refused: a name that is not allowed.
        One of `BROKEN`: bytes that are not a pickle.
    """
    _check_memo(file)
    unpickler = _Unpickler(file, encoding="latin1")
    unpickler.known, unpickler.allowed = known, allowed
    if persistent is not None:
        unpickler.persistent_load = persistent  # type: ignore[method-assign]  # as torch.load does
    return unpickler.load()


def _check_memo(file: BinaryIO) -> None:
    """Refuse a pickle that numbers an object higher than it has objects: Python makes room for all before it."""
    begin = file.tell()
    with suppress(UnicodeDecodeError):  # names in other alphabets, which pickletools does not read
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
                raise Refused(f"{DAMAGED}: its pickle has fewer objects than it says")
    file.seek(begin)


@contextmanager
def damage_refused() -> Iterator[None]:
    """Turn what damaged bytes lead to into Refused, with the word of the library that met them."""
    try:
        yield
    except Refused:
        raise
    except BROKEN as error:
        said = ascii(str(error))[1:-1][:150] or type(error).__name__
        raise Refused(f"{DAMAGED}, and cannot be read to its end ({said})") from error
