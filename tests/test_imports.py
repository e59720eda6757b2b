"""The walls of the house: imports point down only, and no file or function grows beyond what one reads at once."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.syntax import tree_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ray_sampler"

LAYERS = (
    {"errors", "options", "process"},
    {"storage", "networks", "published", "presets"},
    {"sampling"},
    {"scoring"},
    {"reporting"},
    {"config"},
    {"resolve", "planning"},
    {"cluster"},
    {"run_folder", "inspection", "preset_table", "flags", "commands", "cli", "compat", "__main__", "__init__"},
)
"""From the bottom up. A part may import parts of layers below it, or of the same layer."""

FAMILIES = {"adm", "adm_options", "adm_unet", "edm", "edm2", "edm_family", "nvidia", "custom"}
"""Modules of networks/ that know one family."""

LINES, FUNCTION_LINES = 400, 60
LONGER: dict[str, str] = {
    "examples/digits/distill.py:distil": "a training loop, from top to bottom",
    "examples/digits/train.py:train": "a training loop, from top to bottom",
    "tests/faults/disk.py:serve": "one small function for each operation of a file system",
}
"""Files, or functions as file:name, that are longer, with the reason."""


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path, *, all_: bool = True) -> Iterator[str]:
    """Dotted names of what a module imports of the package: modules, or names of packages.

    With `all_` also what it imports within functions; without, only what the import of the module itself needs.
    """
    tree = tree_of(path)
    nodes = ast.walk(tree) if all_ else iter(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "ray_sampler")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray_sampler":
            known = modules()
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else str(node.module)


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: the first name below the package."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def layer_of(part: str) -> int:
    (layer,) = [number for number, parts in enumerate(LAYERS) if part in parts]
    return layer


def test_every_module_has_its_layer() -> None:
    assert {part_of(module) for module in modules()} == set().union(*LAYERS)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down_only(module: str) -> None:
    for imported in imports(modules()[module]):
        assert layer_of(part_of(imported)) <= layer_of(part_of(module)), f"{module} imports {imported}"


def test_storage_and_networks_do_not_know_each_other() -> None:
    for module, path in modules().items():
        parts = {part_of(imported) for imported in imports(path)}
        assert not (part_of(module) == "storage" and "networks" in parts), module
        assert not (part_of(module) == "networks" and "storage" in parts), module


def test_no_import_leads_in_a_circle() -> None:
    graph = {module: set(imports(path, all_=False)) - {module} for module, path in modules().items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_cluster_knows_no_family_of_networks() -> None:
    known = {f"ray_sampler.networks.{family}" for family in FAMILIES}
    for module, path in modules().items():
        if part_of(module) == "cluster":
            assert known.isdisjoint(imports(path)), module


@pytest.mark.parametrize(
    ("part", "foreign"),
    [
        ("storage", {"torch", "ray"}),
        ("networks", {"ray"}),
        ("sampling", {"ray"}),
        ("scoring", {"ray"}),
        ("reporting", {"ray", "torch"}),
    ],
)
def test_what_a_part_must_not_import(part: str, foreign: set[str]) -> None:
    for module, path in modules().items():
        if part_of(module) == part:
            tree = tree_of(path)
            found = {name.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for name in n.names}
            found |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert found.isdisjoint(foreign), f"{module}: {found & foreign}"


@pytest.mark.parametrize("module", ["options", "schedules", "solvers"])
def test_what_is_asked_of_a_sample_is_checked_without_torch_and_numpy(module: str) -> None:
    code = f"import sys, ray_sampler.sampling.{module}; print({{'torch', 'numpy'}} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_and_functions_are_short_enough_to_read() -> None:
    longer = set()
    for folder in ("ray_sampler", "tests", "benchmarks", "examples", "jobs"):
        for path in (ROOT / folder).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if path.read_text().count("\n") > LINES:
                longer.add(name)
            for function in functions(path):
                if (function.end_lineno or 0) - function.lineno + 1 > FUNCTION_LINES:
                    longer.add(f"{name}:{function.name}")
    assert longer == LONGER.keys()
