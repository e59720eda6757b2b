"""Values of a request that come from Python: what has one meaning is taken, the rest is refused."""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from ray_sampler.errors import require
from ray_sampler.options import Flag

LISTS = ("labels", "ts", "guidance_interval", "sigmas", "channel_mult", "attention_resolutions")
"""Text options that hold numbers between commas, for which Python has sequences."""

KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def taken(flag: Flag, value: Any) -> Any:
    """A value as the command line would have it; one without a single meaning as it is, for `check_kinds` to refuse."""
    if flag.kind is str:
        return text_of(flag, value)
    if not isinstance(value, (str, bytes)) and getattr(value, "shape", None) == ():
        value = value.item()  # a scalar of numpy or torch
    if flag.kind is bool:
        return bool(value) if isinstance(value, int) and value in (0, 1) else value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    try:
        if flag.kind is float:
            return float(value)
        return math.floor(value) if isinstance(value, int) or value == math.floor(value) else value
    except (OverflowError, ValueError):  # too large for a float, or no number
        return value


def text_of(flag: Flag, value: Any) -> Any:
    """A path, or a list of numbers, as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if flag.name not in LISTS or isinstance(value, str):
        return value
    values = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
    if not isinstance(values, (Sequence, range)) or isinstance(values, bytes) or not values:
        return value
    if not all(isinstance(each, numbers.Real) and not isinstance(each, bool) for each in values):
        return tuple(values)
    return ",".join(str(int(each) if each == each // 1 else float(each)) for each in values)


def check_kinds(flags: Mapping[str, Flag], given: Mapping[str, Any]) -> None:
    """Check that each value is of its option's kind.

    Raises:
        RequestError: one is not.
    """
    for name, flag in flags.items():
        value = given.get(name)
        if value is None:
            continue
        right = isinstance(value, flag.kind) and (flag.kind is bool or not isinstance(value, bool))
        wanted = KINDS[flag.kind] + (" or a list of numbers" if name in LISTS else "")
        require(right, f"--{name} is {reprlib.repr(value)}; it must be {wanted}")
