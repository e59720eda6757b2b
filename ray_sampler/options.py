"""How a component declares its options: a frozen dataclass whose fields are made by `option`.

Name, type, default and help stand there once, beside the code that reads them. `ray_sampler.config` composes the
options of all components into one request; the command line and `RunConfig` follow from it.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ray_sampler.errors import require

Options = TypeVar("Options")


def option(default: Any, help: str, *, recorded: bool = True) -> Any:
    """A field of an options dataclass.

    Args:
        default: the value where neither the user nor a model nor a preset gives one.
        help: one sentence for `--help`.
        recorded: whether run.json holds it even at its default; options that came after the first version are left
            out there, so that a run directory reads the same as before.
    """
    return field(default=default, metadata={"help": help, "recorded": recorded})


@dataclass(frozen=True)
class Flag:
    """One option as the command line sees it."""

    name: str
    kind: Any
    """bool, int, float or str."""
    choices: tuple[str, ...]
    """What a value may be; empty where anything of its kind may be given."""
    default: Any
    help: str
    recorded: bool


def flags_of(component: type) -> dict[str, Flag]:
    """The options that a dataclass declares, by name."""
    hints = get_type_hints(component)
    return {f.name: _flag(f, hints[f.name]) for f in fields(component) if "help" in f.metadata}


def _flag(f: Field[Any], hint: Any) -> Flag:
    choices: tuple[str, ...] = ()
    kinds: list[Any] = []
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(part) is Literal:
            choices += get_args(part)
            kinds.append(str)
        elif part is not type(None):
            kinds.append(part)
    default = None if f.default is MISSING else f.default
    return Flag(f.name, kinds[0], choices, default, f.metadata["help"], f.metadata["recorded"])


def check_choices(flags: Mapping[str, Flag], given: Mapping[str, Any]) -> None:
    """Check what the command line checks by itself; a caller in Python may have written anything.

    Raises:
        RequestError: a value is none of its option's choices.
    """
    for name, flag in flags.items():
        value = given.get(name)
        if flag.choices and value is not None:
            require(value in flag.choices, f"--{name} is {value!r}; it must be one of {', '.join(flag.choices)}")


def pick(component: type[Options], settings: Mapping[str, Any]) -> Options:
    """The options of `component` that `settings` give, by name; the others at their defaults."""
    names = {f.name for f in fields(component)}  # type: ignore[arg-type]  # any dataclass
    return component(**{name: value for name, value in settings.items() if name in names and value is not None})
