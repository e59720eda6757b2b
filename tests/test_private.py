"""Names of other packages that they do not promise to keep: three of Ray's, in one file, with what to do without."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray._private import ray_constants
from ray._private.state import state as cluster_state

from tests.syntax import tree_of

PRODUCT = Path(__file__).resolve().parents[1] / "ray_sampler"
FILE = PRODUCT / "cluster" / "private.py"

MOST = 3

PROMISED = {"_replace", "_asdict", "_fields", "_exit"}
"""Of named tuples and of os: public in spite of how they begin."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PROMISED


def names_of_its_own(tree: ast.AST) -> set[str]:
    """What a file defines itself, or sets on its own objects."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names of others that a file imports, reads, sets or passes."""
    own = names_of_its_own(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value):
            named = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            named = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            named = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.keyword):
            named = [node.arg or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            named = [str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant)]
        else:
            continue
        if any(private(name) and name not in own for name in named):
            yield ast.unparse(node)


def test_no_private_name_of_another_package_is_used_but_in_one_file():
    others = {str(path.relative_to(PRODUCT)): path for path in PRODUCT.rglob("*.py") if path != FILE}
    found = {name: list(private_names(tree_of(path))) for name, path in others.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_that_file_has_at_most_three():
    imports = [node for node in ast.walk(tree_of(FILE)) if isinstance(node, ast.ImportFrom)]
    assert sum(len(node.names) for node in imports if (node.module or "").startswith("ray.")) <= MOST


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private import worker",
        "import torch._inductor.config",
        "handle._actor_id",
        "ray.init(_temp_dir='/x')",
        "getattr(parser, '_actions')",
        "filesystem.session._retry_connection = False",
    ],
)
def test_the_search_finds_what_it_is_for(line: str):
    assert list(private_names(ast.parse(line)))


def test_the_search_passes_what_is_ours():
    assert not list(private_names(ast.parse("class A:\n def _f(self): return self._g\n\nA()._f(); pair._replace(a=1)")))


def needed(there: bool, remedy: str) -> None:
    assert there, f"ray {ray.__version__} lacks it: {remedy}"


def test_ray_still_has_one_place_for_all_actors_and_for_the_nodes_that_go():
    needed(
        callable(cluster_state.actor_table) and callable(cluster_state.get_draining_nodes),
        "RayCalls.places, place and draining need another way to ask; ray.util.state.list_actors answers the first "
        "where a dashboard runs, and without the last a run only notices nodes that go when they are gone",
    )


def test_ray_can_still_be_told_to_read_its_settings_again():
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without types

    needed(
        callable(Config.initialize),
        "see whether ray.init reads RAY_AUTH_MODE by itself now; else set it before Ray is imported, and refuse a "
        "local run in a process that imported Ray before",
    )


def test_ray_still_has_a_switch_for_uv():
    needed(
        isinstance(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, bool),
        "look what decides now whether workers are started by `uv run`; test_uv_run_samples fails where they are",
    )
