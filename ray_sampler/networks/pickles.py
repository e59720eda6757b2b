"""A reader of pickles that runs nothing in them.

Python's own unpickler can be stopped from importing what a file names, but not from using memory: one opcode of five
bytes makes its memo 2^32 entries long, another a buffer of any length, and a dictionary key of nested tuples takes
for ever to hash. This one executes the opcodes itself and counts them. It calls nothing but the stand-ins that it is
given, and never allocates more than the file has bytes for.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

codecs.lookup("raw-unicode-escape")  # so that reading a file imports nothing

MAX_OPCODES = 10_000_000
"""A checkpoint has some 30 for each tensor, and as many for each tensor of an optimizer."""

MAX_TEXT = 2**24
"""Bytes of one string."""

MAX_TEXTS = 2**28
"""Bytes of all strings."""

MAX_LONG = 2**10
"""Bytes of one integer."""

PROTOCOL = 5


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
    """An object that stands in for one in the file. It only records what the file does to it."""

    __slots__ = ("args", "items", "state")

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None
        """What BUILD brings: an object's attributes, as a rule."""
        self.items: dict[Any, Any] = {}
        """What an object that is a kind of dictionary holds."""


Lookup = Callable[[str, str], Callable[..., Any] | None]
"""(module, name) -> the stand-in, or None where the name is refused."""

_MARK = object()
_CUT = "it is truncated or damaged: its pickle goes on past the end of the file"
_DAMAGED = "it is truncated or damaged: its pickle cannot be read"
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q", b"\x96": "<Q"}
_TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
_OLD_TEXTS = {b"U": "<B", b"T": "<i"}
"""What Python 2 wrote: bytes that are text as a rule."""
_LONGS = {b"\x8a": "<B", b"\x8b": "<I"}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}


def read(file: BinaryIO, size: int, lookup: Lookup, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object of the pickle that begins at the position of `file`, which is left after its end.

    Lists, tuples, dictionaries, texts and numbers come as such, sets as lists, bytes as `Blob`, and objects as what the
    stand-ins make. Items under a key that is no text, number or None are left out.

    Args:
        file: a seekable, buffered binary file.
        size: bytes from the file's position to its end.
        lookup: gives the stand-in for a global.
        persistent: turns a persistent id into an object; without it there may be none.

    Raises:
        Refused: a global without a stand-in, or bytes that make no pickle.
    """
    with damage_refused():
        return _Machine(file, size, lookup, persistent).run()


@contextmanager
def damage_refused() -> Iterator[None]:
    """Turn what damaged bytes lead to, such as an empty stack or text that is no UTF-8, into Refused."""
    try:
        yield
    except Refused:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error) as error:
        raise Refused(_DAMAGED) from error


class _Machine:
    """The stack machine of the pickle protocol, versions 0 to 5, without what needs code or buffers of other files."""

    def __init__(self, file: BinaryIO, size: int, lookup: Lookup, persistent: Callable[[Any], Any] | None) -> None:
        self.file = file
        self.left = size
        self.lookup = lookup
        self.persistent = persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.text_left = MAX_TEXTS
        push = self.stack.append
        self.others: Mapping[bytes, Callable[[], None]] = {
            b"}": lambda: push({}),
            b"]": lambda: push([]),
            b")": lambda: push(()),
            b"\x8f": lambda: push([]),
            b"(": lambda: push(_MARK),
            b"t": lambda: push(tuple(self.marked())),
            b"l": lambda: push(self.marked()),
            b"d": self.dictionary,
            b"\x91": lambda: push(self.marked()),
            b"a": lambda: self.extend([self.pop()]),
            b"e": lambda: self.extend(self.marked()),
            b"\x90": lambda: self.extend(self.marked()),
            b"s": lambda: self.set_items([self.pop(), self.pop()][::-1]),
            b"u": lambda: self.set_items(self.marked()),
            b"0": self.drop,
            b"1": self.drop_marked,
            b"2": lambda: push(self.top()),
            b"\x80": lambda: self.protocol(self.number("<B")),
            b"\x95": lambda: self.frame(self.number("<Q")),
            b"\x94": lambda: self.put(len(self.memo)),
            b"p": lambda: self.put(int(self.line())),
            b"g": lambda: push(self.memo[int(self.line())]),
            b"c": lambda: self.global_(self.line(), self.line()),
            b"\x93": lambda: self.global_(*[self.pop(), self.pop()][::-1]),
            b"i": self.instance,
            b"o": self.made_object,
            b"R": self.reduce,
            b"\x81": self.reduce,
            b"\x92": self.reduce_keywords,
            b"b": self.build,
            b"P": lambda: self.persistent_id(self.line()),
            b"Q": lambda: self.persistent_id(self.pop()),
            b"I": lambda: push(self.old_integer()),
            b"L": lambda: push(int(self.line().rstrip("L"))),
            b"F": lambda: push(float(self.line())),
            b"S": lambda: push(self.quoted()),
            b"V": lambda: push(self.line().encode("latin-1").decode("raw-unicode-escape")),
        }

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                result = self.pop()
                self.memo.clear()  # what it held goes with its last user, and not with the next collection of cycles
                return result
            self.step(opcode)
        raise Refused(
            f"its pickle has more than {MAX_OPCODES:,} instructions, which no weights need; save the state dict alone"
        )

    def step(self, opcode: bytes) -> None:
        if opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _NUMBERS:
            self.stack.append(self.number(_NUMBERS[opcode]))
        elif opcode in _BYTES:
            self.stack.append(Blob(self.take(self.number(_BYTES[opcode]))))
        elif opcode in _TEXTS:
            self.stack.append(self.text(self.number(_TEXTS[opcode])).decode("utf-8", "surrogatepass"))
        elif opcode in _OLD_TEXTS:
            self.stack.append(self.text(self.number(_OLD_TEXTS[opcode])).decode("latin-1"))
        elif opcode in _LONGS:
            self.stack.append(self.long(self.number(_LONGS[opcode])))
        elif opcode in _PUTS:
            self.put(self.number(_PUTS[opcode]))
        elif opcode in _GETS:
            self.stack.append(self.memo[self.number(_GETS[opcode])])
        elif opcode in _TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(_TUPLES[opcode])][::-1]))
        elif opcode in self.others:
            self.others[opcode]()
        else:
            raise Refused(f"it is damaged: its pickle has the instruction {opcode!r}")

    def take(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise Refused(_CUT)
        data = self.file.read(count)
        if len(data) != count:
            raise Refused("it is truncated: it became shorter while it was read")
        self.left -= count
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> bytes:
        self.text_left -= count
        if count > MAX_TEXT or self.text_left < 0:
            raise Refused(f"it is damaged, or no checkpoint: it has a text of more than {MAX_TEXT:,} bytes")
        return self.take(count)

    def line(self) -> str:
        line = self.file.readline(min(self.left, 2**16))
        self.left -= len(line)
        if not line.endswith(b"\n"):
            raise Refused(_CUT)
        return line[:-1].decode("latin-1")

    def quoted(self) -> str:
        line = self.line()
        if len(line) < 2 or line[0] not in "'\"" or line[-1] != line[0]:
            raise TypeError("a text in quotes is expected")
        return line[1:-1].encode("latin-1").decode("unicode_escape")

    def old_integer(self) -> int | bool:
        line = self.line()
        return line == "01" if line in ("00", "01") else int(line)

    def long(self, count: int) -> int:
        if count > MAX_LONG:
            raise Refused(_DAMAGED)
        return int.from_bytes(self.take(count), "little", signed=True)

    def protocol(self, version: int) -> None:
        if version > PROTOCOL:
            raise Refused(f"it is damaged, or written by a later Python: its pickle has protocol {version}")

    def frame(self, length: int) -> None:
        if length > self.left:
            raise Refused(_CUT)

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Refused(_DAMAGED)
        return value

    def drop(self) -> None:
        self.stack.pop()

    def drop_marked(self) -> None:
        self.marked()

    def marked(self) -> list[Any]:
        """What lies above the last mark; both leave the stack."""
        for start in range(len(self.stack) - 1, -1, -1):
            if self.stack[start] is _MARK:
                items = self.stack[start + 1 :]
                del self.stack[start:]
                return items
        raise Refused(_DAMAGED)

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif not isinstance(target, Inert):
            raise TypeError("only a list is appended to")

    def dictionary(self) -> None:
        items = self.marked()
        self.stack.append({})
        self.set_items(items)

    def set_items(self, items: list[Any]) -> None:
        top = self.top()
        target = top.items if isinstance(top, Inert) else top
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError("only a dictionary has items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if is_key(key):
                target[key] = value

    def global_(self, module: Any, name: Any) -> None:
        self.stack.append(self.named(module, name))

    def named(self, module: Any, name: Any) -> Name:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a global is named by two texts")
        make = self.lookup(module, name)
        if make is None:
            shown = ascii(f"{module}.{name}")[1:-1][:100]
            raise Refused(
                f"it asks for {shown}, which no known network needs; loading it would run code, so it is refused"
            )
        return Name(f"{module}.{name}", make)

    def made(self, function: Any, args: Any) -> Any:
        if type(args) is not tuple:
            raise TypeError("arguments are a tuple")
        if isinstance(function, Name):
            return function.make(*args)
        return Inert(function, *args)  # a call of something that the file has made: recorded, as all else

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        self.stack.append(self.made(function, args))

    def reduce_keywords(self) -> None:
        _, args, function = self.pop(), self.pop(), self.pop()
        self.stack.append(self.made(function, args))

    def instance(self) -> None:
        function = self.named(self.line(), self.line())
        self.stack.append(self.made(function, tuple(self.marked())))

    def made_object(self) -> None:
        function, *args = self.marked()
        self.stack.append(self.made(function, tuple(args)))

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state

    def persistent_id(self, value: Any) -> None:
        if self.persistent is None:
            raise Refused("it is damaged, or no checkpoint: its pickle refers to another file")
        self.stack.append(self.persistent(value))


def is_key(value: Any) -> bool:
    """Whether a value may be a key of a dictionary: its hash is quick, while that of nested tuples may never end."""
    return value is None or type(value) in (str, int, float, bool)
