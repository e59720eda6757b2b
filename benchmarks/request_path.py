"""How does a request travel through the package, from run(config) until the first actor is asked for?

A small run of the bundled model, traced on the thread that calls run(). An entry is a call of a function in another
file of the package than the one that called it, through other packages too, as when dataclasses call an __init__; what
imports do is left out. Counted are
    entries     all of them
    stays       the same, but each pair of a calling and a called function once, so that loops count once
    files       that were entered
    climbs      stays in a file on a higher floor than the file that called: a file's floor is one above all that it
                imports when it is loaded
With PYTHONPATH at another checkout its package is traced. --list prints each stay in the order of its first call.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ray.actor

import ray_sampler
import ray_sampler.cluster.driver  # and with it all that a run imports

PACKAGE = Path(ray_sampler.__file__).resolve().parent

Stay = tuple[CodeType | None, CodeType]
"""The calling function, None for the caller of run(), and the called one."""


class Trace:
    """Which function of the package calls which in another file, in the order of the first calls."""

    def __init__(self) -> None:
        self.entries: dict[Stay, int] = {}
        self.path: list[CodeType] = []
        self.importing = 0
        self.ended = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """As sys.setprofile calls it."""
        code = frame.f_code
        if code.co_name == "<module>":
            self.importing += {"call": 1, "return": -1}.get(event, 0)
        elif not (self.importing or self.ended):
            if event == "call" and asks_for_an_actor(frame):
                self.ended = True
            elif event in ("call", "return") and name_of(code.co_filename):
                self.pass_on(code, event)

    def pass_on(self, code: CodeType, event: str) -> None:
        """A function of the package was called, or returns; a generator does both at each of its values."""
        if event == "return":
            if self.path and self.path[-1] is code:
                self.path.pop()
            return
        caller = self.path[-1] if self.path else None
        self.path.append(code)
        if caller is None or caller.co_filename != code.co_filename:
            self.entries[caller, code] = self.entries.get((caller, code), 0) + 1


def asks_for_an_actor(frame: FrameType) -> bool:
    code = frame.f_code
    if code.co_name != "_remote" or code.co_filename != ray.actor.__file__:
        return False
    return isinstance(frame.f_locals.get("self"), ray.actor.ActorClass)


@cache
def name_of(filename: str) -> str:
    """A file of the package by its path in it; empty for any other file."""
    path = Path(filename).resolve()
    return str(path.relative_to(PACKAGE)) if PACKAGE in path.parents else ""


def imported(path: Path) -> set[Path]:
    """The files of the package that a file imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE.name:
            base = PACKAGE.joinpath(*node.module.split(".")[1:])
            candidates = [base.with_suffix(".py"), *(base / f"{name.name}.py" for name in node.names)]
            found |= {candidate for candidate in candidates if candidate.exists()}
    return found


@cache
def floor(path: Path) -> int:
    """1 for a file that imports none of the package, else one above the highest of those."""
    return 1 + max((floor(each) for each in imported(path)), default=0)


def floor_of(code: CodeType) -> int:
    return floor(Path(code.co_filename).resolve())


def climbs(stay: Stay) -> bool:
    caller, called = stay
    return caller is not None and floor_of(called) > floor_of(caller)


def traced() -> Trace:
    """A whole small run; what comes after the first actor is not looked at."""
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        config = ray_sampler.RunConfig(
            num_samples=16, steps=2, gpus_per_actor=0.0, max_actors=1, progress="none", output=str(Path(folder) / "run")
        )
        sys.setprofile(trace)
        try:
            ray_sampler.run(config)
        finally:
            sys.setprofile(None)
    if not trace.ended:
        raise SystemExit("the run asked for no actor")
    return trace


def shown(code: CodeType | None) -> str:
    return f"{name_of(code.co_filename)}:{code.co_qualname} (floor {floor_of(code)})" if code else "the caller"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="every stay")
    arguments = parser.parse_args()
    found = traced().entries
    if arguments.list:
        for number, (stay, times) in enumerate(found.items(), 1):
            print(f"{number:4} {'UP  ' if climbs(stay) else '    '}{shown(stay[0])} -> {shown(stay[1])}, {times} times")
    files = {name_of(called.co_filename) for _, called in found}
    print(f"entries {sum(found.values())}, stays {len(found)}, files {len(files)}, climbs {sum(map(climbs, found))}")


if __name__ == "__main__":
    main()
