"""The wheel holds all that a run needs, and works from any folder with nothing else of the checkout."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import ray_sampler
from ray_sampler.presets import BUNDLED

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m build --wheel` makes of the part of the checkout that .dockerignore lets into an image."""
    pytest.importorskip("build", reason="build is not installed")
    source = tmp_path_factory.mktemp("source") / "checkout"
    source.mkdir()
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    for path in [ROOT / line.removeprefix("!") for line in lines if line.startswith("!")]:
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    isolation = ["--no-isolation"] if importlib.util.find_spec("setuptools") else []
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(source.parent / "dist")],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (source.parent / "dist").iterdir()
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return folder


def called(installed: Path, elsewhere: Path, *arguments: str) -> str:
    """What the installed command prints, called in another folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(installed / "bin" / "ray-sampler"), *arguments]
    done = subprocess.run(
        command, cwd=elsewhere, env=environment | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lower_bounds_are_the_versions_that_the_tests_run_with() -> None:
    """Of what a user installs; earlier ones may lack what is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = [line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pins = {name.lower().replace("_", "-"): Version(version) for name, version in pinned}
    extras = [each for name, extra in project["optional-dependencies"].items() if name != "dev" for each in extra]
    for requirement in map(Requirement, project["dependencies"] + extras):
        (bound,) = requirement.specifier
        pin, least = pins[requirement.name.lower()], Version(bound.version.removesuffix(".*"))
        assert pin in requirement.specifier, requirement
        assert pin.release[: len(least.release)] == least.release, f"{requirement}, but the tests run with {pin}"
    assert project["requires-python"] == ">=3.11"
    assert "(3, 11)" in (ROOT / "Makefile").read_text()


def test_the_wheel_holds_models_templates_and_types_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "ray_sampler"
    wanted = {
        str(path.relative_to(ROOT))
        for pattern in ("**/*.py", "**/py.typed", "**/*.safetensors", "**/*.md", "**/templates/*")
        for path in package.glob(pattern)
    }
    assert len(wanted) > 40
    assert wanted <= names
    assert {"ray_sampler/py.typed", "ray_sampler/networks/digits/digits.safetensors"} <= wanted
    others = {name.split("/")[0] for name in names} - {"ray_sampler"}
    assert all(name.endswith(".dist-info") for name in others)
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_every_folder_of_weights_has_a_card_with_a_licence() -> None:
    folders = {path.parent for path in (ROOT / "ray_sampler").rglob("*.safetensors")}
    assert len(folders) > 1
    for folder in folders:
        assert "\n## Licence\n" in (folder / "MODEL_CARD.md").read_text(), folder


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {version} == {ray_sampler.__version__, citation["version"]}
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert f":{version}" in (ROOT / "deploy" / "kuberay-rayjob.yaml").read_text()


def test_its_metadata_names_the_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
    lines = archive.read(name).decode().splitlines()
    assert {"s3", "gcs", "azure", "examples"} <= {line[16:] for line in lines if line.startswith("Provides-Extra: ")}
    assert "License-Expression: MIT" in lines


def test_the_installed_command_plans_a_run_from_any_folder(installed: Path, tmp_path: Path) -> None:
    shown = json.loads(called(installed, tmp_path, "sample", "--num_samples", "20", "--dry_run"))
    assert (shown["model"], shown["num_samples"], shown["image_size"]) == ("digits", 20, 32)
    assert list(tmp_path.iterdir()) == []
    assert "cd-imagenet64-lpips" in called(installed, tmp_path, "presets")


def test_the_installed_command_reads_the_weights_of_its_own_package(installed: Path, tmp_path: Path) -> None:
    found = json.loads(called(installed, tmp_path, "inspect", "digits-cd", "--json"))
    assert found["parameters"] == BUNDLED["digits-cd"].parameters
    (installed / "ray_sampler" / "networks" / "digits" / "digits-cd.safetensors").unlink()
    with pytest.raises(AssertionError, match="there is no such file"):
        called(installed, tmp_path, "inspect", "digits-cd")
