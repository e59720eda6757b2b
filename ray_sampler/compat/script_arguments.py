"""Command-line arguments from a dict of defaults, as scripts of the consistency-models repository declare them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any


def args_to_dict(args: object, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes `keys` of an arguments object, by name."""
    return {key: getattr(args, key) for key in keys}


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option --name for each entry, of its default's type; None means text."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 and no, false, f, n, 0, in any case."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is not a boolean; write True or False")
