"""A reader of pickles that runs nothing in them.

Python's own unpickler can be kept from calling what a file names, with `find_class`, but not from using memory: one
instruction of five bytes makes a table of 2^32 entries, another a buffer of any length. This one knows the few
instructions that data needs, counts them, and allocates no more than the file has bytes for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

MAX_OPCODES = 1_000_000
"""A published snapshot has fewer than 400,000."""

MAX_TEXT = 2**20
"""Bytes of one string; the longest in a snapshot is a source file."""

MAX_TEXTS = 2**26
"""Bytes of all strings."""


class Refused(ValueError):
    """A file that is not read. The message is what follows "--model is FILE; "."""


class Name:
    """A global that a pickle names: `make` is our stand-in for it, called with the arguments in the file."""

    def __init__(self, name: str, make: Callable[..., Any]) -> None:
        self.name = name
        self.make = make


class Blob:
    """Bytes in a pickle.

    The reader's memo keeps every value to the end, so whoever turns the bytes into something else leaves that in
    `made` and sets `data` to None: then they are freed at once.
    """

    def __init__(self, data: bytes) -> None:
        self.data: bytes | None = data
        self.made: Any = None


class Inert:
    """An instance of a class that stands in for one in the file. What BUILD brings is kept in `state`."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None


Lookup = Callable[[str, str], Callable[..., Any] | None]
"""(module, name) -> the stand-in, or None where the name is refused."""

_MARK = object()
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q"}
_TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def read(file: BinaryIO, size: int, lookup: Lookup, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object of the pickle that begins at the position of `file`, which is left after its end.

    Args:
        file: a seekable binary file.
        size: bytes from the file's position to its end.
        lookup: gives the stand-in for a global.
        persistent: turns a persistent id into an object; without it there may be none.

    Raises:
        Refused: a global without a stand-in, or bytes that make no pickle of plain data.
    """
    with damage_refused():
        return _Machine(file, size, lookup, persistent).run()


@contextmanager
def damage_refused() -> Iterator[None]:
    """Turns what damaged bytes lead to, such as an empty stack or text that is no UTF-8, into Refused."""
    try:
        yield
    except Refused:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error) as error:
        raise Refused("it is truncated or damaged, or no snapshot of a network") from error


class _Machine:
    """The stack machine of the pickle protocol, versions 2 to 5, without what plain data does not need."""

    def __init__(self, file: BinaryIO, size: int, lookup: Lookup, persistent: Callable[[Any], Any] | None) -> None:
        self.file = file
        self.left = size
        self.lookup = lookup
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.text_left = MAX_TEXTS

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                return self.pop()
            self.step(opcode)
        raise Refused(f"it is no snapshot of a network: its pickle has more than {MAX_OPCODES:,} instructions")

    def step(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            self.stack.append(self.number(_NUMBERS[opcode]))
        elif opcode in _BYTES:
            self.stack.append(Blob(self.take(self.number(_BYTES[opcode]))))
        elif opcode in _TEXTS:
            self.stack.append(self.text(self.number(_TEXTS[opcode])))
        elif opcode in _PUTS:
            self.put(self.number(_PUTS[opcode]))
        elif opcode in _GETS:
            self.stack.append(self.memo[self.number(_GETS[opcode])])
        elif opcode in _TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode in _OTHERS:
            _OTHERS[opcode](self)
        else:
            raise Refused(f"it is damaged, or no snapshot of a network: it has the pickle instruction {opcode!r}")

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise Refused("it is truncated or damaged: its pickle goes on past the end of the file")
        data = self.file.read(count)
        if len(data) != count:
            raise Refused("it is truncated: it became shorter while it was read")
        self.left -= count
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        self.text_left -= count
        if count > MAX_TEXT or self.text_left < 0:
            raise Refused(f"it is no snapshot of a network: it has a text of more than {MAX_TEXT:,} bytes")
        return self.take(count).decode("utf-8", "surrogatepass")

    def line(self) -> str:
        line = self.file.readline(min(self.left, 256))
        self.left -= len(line)
        return line[:-1].decode() if line.endswith(b"\n") else ""

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def protocol(self) -> None:
        version = self.number("<B")
        if version > 5:
            raise Refused(f"it is damaged, or written by a later Python: its pickle has protocol {version}")

    def frame(self) -> None:
        if self.number("<Q") > self.left:
            raise Refused("it is truncated or damaged: its pickle goes on past the end of the file")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused("it is truncated or damaged, or no snapshot of a network")
        return value

    def drop(self) -> None:
        self.stack.pop()

    def marked(self) -> list[Any]:
        """What lies above the last mark; both leave the stack."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise Refused("it is truncated or damaged, or no snapshot of a network")

    def put(self, index: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError("only a list is appended to")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("only a dict has items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def add_items(self) -> None:
        items = self.marked()
        target = self.stack[-1]
        if type(target) is not set:
            raise TypeError("only a set is added to")
        target.update(map(_key, items))

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global is named by two texts")
        make = self.lookup(module, name)
        if make is None:
            shown = ascii(f"{module}.{name}")[1:-1][:100]
            raise Refused(
                f"it asks for {shown}, which no known network needs; loading it would run code, so it is refused"
            )
        self.stack.append(Name(f"{module}.{name}", make))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(function, Name) or type(args) is not tuple:
            raise TypeError("only a known name is called")
        self.stack.append(function.make(*args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if not isinstance(target, Inert):
            raise TypeError("only an instance has a state")
        target.state = state

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refused("it is damaged, or no snapshot of a network: its pickle refers to another file")
        self.stack.append(self.persistent(self.pop()))


def _key(value: Any) -> Any:
    """A key of a dict or set, whose hash is quick; that of nested tuples may never end."""
    if value is not None and type(value) not in (str, int, float, bool):
        raise TypeError("not a key")
    return value


_OTHERS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"}": lambda machine: machine.stack.append({}),
    b"]": lambda machine: machine.stack.append([]),
    b")": lambda machine: machine.stack.append(()),
    b"\x8f": lambda machine: machine.stack.append(set()),
    b"(": lambda machine: machine.stack.append(_MARK),
    b"t": lambda machine: machine.stack.append(tuple(machine.marked())),
    b"\x91": lambda machine: machine.stack.append(frozenset(map(_key, machine.marked()))),
    b"a": lambda machine: machine.extend([machine.pop()]),
    b"e": lambda machine: machine.extend(machine.marked()),
    b"s": lambda machine: machine.set_items([machine.pop(), machine.pop()][::-1]),
    b"u": lambda machine: machine.set_items(machine.marked()),
    b"\x90": _Machine.add_items,
    b"0": _Machine.drop,
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"\x94": lambda machine: machine.put(len(machine.memo)),
    b"\x8a": _Machine.long,
    b"c": lambda machine: machine.name(machine.line(), machine.line()),
    b"\x93": lambda machine: machine.name(*[machine.pop(), machine.pop()][::-1]),
    b"R": _Machine.reduce,
    b"\x81": _Machine.reduce,
    b"b": _Machine.build,
    b"Q": _Machine.persistent_id,
}
