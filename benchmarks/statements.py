"""How much code is there? Statements, docstrings left out, of each folder and of named files, at one commit or several.

A statement is an `ast.stmt`; a string that stands alone is a docstring. Without a commit the working tree is counted:
    python benchmarks/statements.py 29926fd . --of request=config.py,options.py,flags.py,values.py,resolved.py
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "ray_sampler"
TOP, OF = "top-level files", "of these, "


def statements(source: str) -> int:
    """Statements in a file's source, docstrings left out."""
    return sum(isinstance(node, ast.stmt) and not is_docstring(node) for node in ast.walk(ast.parse(source)))


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def sources(commit: str) -> dict[str, str]:
    """The package's files by their paths in it; "." is the working tree."""
    if commit == ".":
        folder = ROOT / PACKAGE
        return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}
    listed = git("ls-tree", "-r", "--name-only", commit, f"{PACKAGE}/").splitlines()
    return {
        name.removeprefix(f"{PACKAGE}/"): git("show", f"{commit}:{name}") for name in listed if name.endswith(".py")
    }


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout


def by_wing(counts: dict[str, int], groups: dict[str, list[str]]) -> Counter[str]:
    """Statements of each folder, of all, and of each named group of files or folders."""
    found: Counter[str] = Counter()
    for name, count in counts.items():
        folder, separator, _ = name.partition("/")
        found[folder if separator else TOP] += count
        found["all"] += count
        for group, members in groups.items():
            if any(name == member or name.startswith(f"{member}/") for member in members):
                found[OF + group] += count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commits", nargs="*", default=["."], help="commits, or . for the working tree")
    parser.add_argument("--of", action="append", default=[], metavar="NAME=PATHS", help="a group of files to count too")
    parser.add_argument("--files", action="store_true", help="a line for every file as well")
    arguments = parser.parse_args()
    groups = {name: paths.split(",") for name, _, paths in (each.partition("=") for each in arguments.of)}
    counted = [{name: statements(text) for name, text in sources(commit).items()} for commit in arguments.commits]
    columns = [by_wing(counts, groups) for counts in counted]
    found = sorted({name for column in columns for name in column} - {"all"})
    names = [
        *(name for name in found if not name.startswith(OF)),
        "all",
        *(name for name in found if name.startswith(OF)),
    ]
    rows = {name: [column[name] for column in columns] for name in names}
    if arguments.files:
        every = sorted({name for counts in counted for name in counts})
        rows |= {name: [counts.get(name, 0) for counts in counted] for name in every}
    width = max(map(len, rows))
    print("statements".ljust(width), *(commit[:10].rjust(10) for commit in arguments.commits))
    for name, values in rows.items():
        print(name.ljust(width), *(f"{value:10,}" for value in values))


if __name__ == "__main__":
    main()
