"""The command line of a training program: one flag for each field of its recipe."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, fields
from typing import TypeVar

Recipe = TypeVar("Recipe")


def recipe_of(kind: type[Recipe], description: str | None, arguments: list[str] | None = None) -> Recipe:
    """The recipe that the command line asks for; what it does not name has the default, of whose type it must be."""
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for f in fields(kind):  # type: ignore[arg-type]  # any dataclass
        assert f.default is not MISSING
        parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, help=" ")
    return kind(**vars(parser.parse_args(arguments)))
