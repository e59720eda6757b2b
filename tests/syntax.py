"""Sources as syntax trees."""

from __future__ import annotations

import ast
import functools
from pathlib import Path


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a source file, which callers must not change.

    Up to Python 3.12 the parser keeps its depth per interpreter: where another thread parses at the same moment (a
    test's leftover, torch), `ast.parse` raises SystemError although the source is right. It is then parsed again.
    """
    for _ in range(10):
        try:
            return ast.parse(path.read_text())
        except SystemError:
            continue
    return ast.parse(path.read_text())
