"""The request is one type: what an editor, a type checker and the run itself know of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from ray_sampler import RequestError, RunConfig
from ray_sampler.config import HEADINGS
from ray_sampler.options import flags_of, option
from ray_sampler.resolve import check, resolve
from ray_sampler.sampling.options import EngineOptions
from tests.syntax import tree_of

ROOT = Path(__file__).resolve().parents[1]
FAMILY_NAMES = {"adm", "edm", "edm2", "dit", "dhariwal", "songunet"}


def test_every_option_has_a_real_type():
    hints = get_type_hints(RunConfig)
    assert {name: hints[name] for name in ("steps", "sigma_max", "overwrite", "sampler")} == {
        "steps": int,
        "sigma_max": float,
        "overwrite": bool,
        "sampler": str,
    }
    assert hints["max_actors"] == int | None
    assert all(hints[name] is not Any for name in flags_of(RunConfig))


CALLER = """
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from ray_sampler import Archive, DamagedFragment, Fragment, Model, RequestError, RunConfig, RunError, RunResult
from ray_sampler import read_archive, read_fragment, run, score
from ray_sampler.compat import create_model_and_diffusion, get_generator, karras_sample, model_and_diffusion_defaults


def build(weights: str | None) -> Model:
    return Model(nn.Conv2d(3, 3, 1), "eps", (3, 8, 8), sigma_max=20.0, alphas=[0.9, 0.5])


config = RunConfig(model=build, steps=18, max_actors=None, output="run", labels="3,1")
more: int = replace(config, num_samples=100).steps + 1
try:
    result: RunResult = run(config)
    paths: list[str] = [result.archive, result.report, result.preview]
    archive, summary = result
    scores: dict[str, Any] = score(result.archive, "digits", metrics="fid")
except (RequestError, RunError, DamagedFragment):
    raise
fragment: Fragment = read_fragment("f.parquet")
labels: np.ndarray | None = fragment.samples.labels
whole: Archive = read_archive("a.npz", size=10)
shape: tuple[int, ...] = whole.read(0, 5).images.shape
for start, images, _ in whole:
    first: float = images.mean() + start
model, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults())
x: Tensor = karras_sample(diffusion, model, (1, 3, 64, 64), 2, generator=get_generator("determ", 1))

RunConfig(stesp=18)  # wrong
RunConfig(steps="18")  # wrong
config.overwrit  # wrong
run("digits")  # wrong
run(config).archiv  # wrong
Model(nn.Conv2d(3, 3, 1), 7, (3, 8, 8))  # wrong
Model("network", "eps", (3, 8, 8))  # wrong
score("run")  # wrong
read_fragment(3)  # wrong
fragment.samples.image  # wrong
read_archive("a.npz", size="10")  # wrong
whole.read(0)  # wrong
karras_sample(diffusion, model, (1, 3, 64, 64))  # wrong
get_generator(3)  # wrong
"""
"""A user's file, and what a type checker must find in it."""


@pytest.mark.slow
def test_a_type_checker_takes_a_users_file_and_reports_what_is_wrong(tmp_path: Path):
    (tmp_path / "caller.py").write_text(CALLER)
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(tmp_path / "caller.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = {int(line.split(":")[1]) for line in ran.stdout.splitlines() if "caller.py:" in line and "error" in line}
    wrong = {number for number, line in enumerate(CALLER.splitlines(), 1) if line.endswith("# wrong")}
    assert found == wrong, ran.stdout + ran.stderr


def test_only_what_the_user_gives_counts_as_given():
    config = RunConfig(steps=40, seed=1)
    assert config.given == {"steps", "seed"}
    assert replace(config, rho=5.0).given == {"steps", "seed", "rho"}
    assert replace(config, steps=None).given == {"seed"}  # type: ignore[arg-type]  # a resolved one has no None
    resolved = resolve(config, "m.pt", {"sampler": "euler"}, None)
    assert resolved.given == {"steps", "seed"}
    assert type(resolved) is RunConfig
    assert (resolved.steps, resolved.sampler, resolved.batch_size) == (40, "euler", 16)


def test_help_has_every_flag_once():
    shown = [name for components in HEADINGS.values() for component in components for name in flags_of(component)]
    assert sorted(shown) == sorted(flags_of(RunConfig))


@dataclass(frozen=True, kw_only=True)
class StripeOptions:
    stripes: int = option(3, "How many stripes.")

    def check(self) -> None:
        if self.stripes > 9:
            raise RequestError(f"--stripes is {self.stripes}; it must be at most 9")


@dataclass(frozen=True, kw_only=True)
class StripedConfig(RunConfig, StripeOptions):
    """A request with an option that is declared in one place."""


def test_an_option_of_another_component_is_declared_in_one_place():
    config = StripedConfig(stripes=4, steps=5)
    assert config.given == {"stripes", "steps"}
    assert vars(resolve(StripedConfig(), "m.pt", {}, None))["stripes"] == 3
    with pytest.raises(RequestError, match="--stripes is 10; it must be at most 9"):
        check(StripedConfig(stripes=10))
    with pytest.raises(RequestError, match="--stripes is 'x'; it must be a whole number"):
        StripedConfig(stripes="x")  # type: ignore[arg-type]  # which the type checker says too


def test_an_option_class_by_itself_has_its_defaults():
    assert EngineOptions().batch_size == 16


def test_no_family_is_named_outside_of_networks_presets_and_compat():
    for path in (ROOT / "ray_sampler").rglob("*.py"):
        inside = path.relative_to(ROOT / "ray_sampler")
        if inside.parts[0] in ("networks", "compat") or inside.name.startswith(("preset", "published")):
            continue
        tree = tree_of(path)
        names = {
            part.lower()
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and "networks" in (node.module or "")
            for part in (*(node.module or "").split("."), *(alias.name for alias in node.names))
        }
        compared = {
            str(constant.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Compare)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant)
        }
        assert not names & FAMILY_NAMES, path
        if "sampling" not in inside.parts:  # where a generator and a script have the names of their publications
            assert not compared & FAMILY_NAMES, path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["sample", "--help"], ["presets"], ["sample", "--steps", "0"], ["sample", "--preset", "x"]],
    ids=" ".join,
)
def test_what_needs_no_file_imports_no_torch(arguments: list[str]):
    script = (
        "import sys\n"
        "from ray_sampler.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'ray'} & sys.modules.keys(), 'imported'\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_request_shows_what_was_given():
    assert repr(RunConfig(steps=3, output="run")) in (
        "RunConfig(steps=3, output='run')",
        "RunConfig(output='run', steps=3)",
    )
