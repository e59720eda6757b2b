"""How a component declares its options: a frozen dataclass whose fields are made by `option`.

Name, type, default, help and the checks of a value are there once, beside the code that reads them. A `Request` is
composed of such classes by inheritance: `ray_sampler.config.RunConfig` is one. This module imports no torch, and option
classes must not either, so that a wrong value is refused at once.
"""

from __future__ import annotations

import math
import numbers
import os
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from ray_sampler.errors import require

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}

Options = TypeVar("Options")
Asked = TypeVar("Asked", bound="Request")


def option(
    default: Any, help: str, *, recorded: bool = True, numbers: bool = False, common: bool = False, inert: bool = False
) -> Any:
    """A field of an options dataclass.

    Args:
        default: the value where neither the user nor a preset nor the model gives one.
        help: one sentence for `--help`.
        recorded: whether run.json holds it even at its default; others are left out, so that existing run
            directories keep their content.
        numbers: whether the text may be numbers between commas, for which Python has sequences.
        common: whether most runs use it, so that `--help` shows it; `--help-all` shows every option.
        inert: whether it is accepted without effect, for published command lines.
    """
    told = {"help": help, "recorded": recorded, "numbers": numbers, "common": common, "inert": inert}
    return field(default=default, metadata=told | {"default": default})


@dataclass(frozen=True)
class Flag:
    """One option as the command line sees it."""

    name: str
    kind: type
    """bool, int, float or str."""
    choices: tuple[str, ...]
    """The allowed values; empty where anything of its kind may be given."""
    default: Any
    help: str
    recorded: bool
    numbers: bool
    common: bool
    inert: bool
    objects: bool
    """Whether Python may give an object in place of text."""

    def taken(self, value: Any) -> Any:
        """A value from Python as the command line would have it: numpy's and torch's numbers, paths, sequences.

        Raises:
            RequestError: it is not of the option's kind, or not one of its choices.
        """
        if self.objects and (callable(value) or hasattr(value, "network")):
            return value
        result = self._text(value) if self.kind is str else self._number(value)
        right = isinstance(result, self.kind) and (self.kind is bool or not isinstance(result, bool))
        wanted = KINDS[self.kind] + (" or a list of numbers" if self.numbers else "")
        require(right, f"--{self.name} is {reprlib.repr(result)}; it must be {wanted}")
        if self.choices:
            require(result in self.choices, f"--{self.name} is {result!r}; it must be one of {', '.join(self.choices)}")
        return result

    def _number(self, value: Any) -> Any:
        if not isinstance(value, (str, bytes)) and getattr(value, "shape", None) == ():
            value = value.item()
        if self.kind is bool:
            return bool(value) if isinstance(value, int) and value in (0, 1) else value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return value
        try:
            return float(value) if self.kind is float else math.floor(value) if value == math.floor(value) else value
        except (OverflowError, ValueError):  # too large for a float, or NaN
            return value

    def _text(self, value: Any) -> Any:
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if not self.numbers or isinstance(value, str):
            return value
        items = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(items, (Sequence, range)) or isinstance(items, bytes) or not items:
            return value
        if not all(isinstance(each, numbers.Real) and not isinstance(each, bool) for each in items):
            return value
        return ",".join(str(int(each) if each == each // 1 else float(each)) for each in items)


def flags_of(component: type) -> Mapping[str, Flag]:
    """The options that a dataclass has, its own and those of its bases, by name."""
    return _flags_of(cast(Any, component))  # to mypy the class of a frozen dataclass is not hashable


@cache
def _flags_of(component: type) -> dict[str, Flag]:
    hints = get_type_hints(component)
    return {f.name: _flag(f.name, hints[f.name], f.metadata) for f in fields(component) if "help" in f.metadata}


def _flag(name: str, hint: Any, metadata: Mapping[str, Any]) -> Flag:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = tuple(choice for part in parts if get_origin(part) is Literal for choice in get_args(part))
    kinds = [str if get_origin(part) is Literal else part for part in parts if part is not type(None)]
    return Flag(name, kinds[0], choices, **metadata, objects=len(set(kinds)) > 1)


def of(component: type[Options], settings: Any) -> Options:
    """The options of one component: from a mapping by name, or from an object that has them as attributes.

    What is absent or None has the component's default.
    """
    values = settings if isinstance(settings, Mapping) else vars(settings)
    names = (f.name for f in fields(component))  # type: ignore[arg-type]  # any dataclass
    return component(**{name: values[name] for name in names if values.get(name) is not None})


class Request:
    """A dataclass composed of option classes by inheritance, in which an option is None until somebody sets it."""

    given: frozenset[str]
    """Names of the options that the user gave; they stay when the others are filled in."""

    def __init_subclass__(cls) -> None:
        for component in cls.__bases__:
            hints = get_type_hints(component)
            for each in fields(component) if component is not Request else ():
                if "help" in each.metadata:
                    setattr(cls, each.name, field(default=None, metadata=each.metadata))
                    cls.__annotations__[each.name] = hints[each.name]

    def __post_init__(self) -> None:
        flags = flags_of(type(self))
        given = {name: flags[name].taken(value) for name, value in vars(self).items() if value is not None}
        vars(self).update(given, given=frozenset(given))

    def __repr__(self) -> str:
        options = (f"{name}={getattr(self, name)!r}" for name in flags_of(type(self)) if name in self.given)
        return f"{type(self).__name__}({', '.join(options)})"

    def check(self) -> None:
        """Check every value by itself and beside the others of its component; what is None is not checked.

        Raises:
            RequestError: one is wrong; names it, its value and what would be right.
        """
        for component in type(self).__mro__:
            if "check" in vars(component) and not issubclass(component, Request):
                of(component, self).check()  # type: ignore[attr-defined]  # looked up above

    def filled(self: Asked, values: Mapping[str, Any]) -> Asked:
        """The same request with further values, those that the user gave told apart as before."""
        result = replace(self, **values)  # type: ignore[type-var]  # what derives from this is a dataclass
        vars(result)["given"] = self.given
        return result
