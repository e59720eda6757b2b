"""Who may only read, or not even that, is told about what was refused; and what `--version` says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import ray_sampler
from ray_sampler.cli import main


@pytest.fixture
def another_user() -> Iterator[None]:
    if os.getuid() != 0:
        pytest.skip("only root may become another user")
    yield
    os.seteuid(0)


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview"])
def test_a_reader_without_the_right_to_read_is_told_of_reading(command: str, tmp_path: Path, capsys, another_user):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "run.json").chmod(0o600)
    for folder in (run, tmp_path, *tmp_path.parents):
        if folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(4242)
    code = main([command, str(run)])
    os.seteuid(0)
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("ray-sampler: cannot read ")
    assert "permission denied" in said
    assert "write" not in said.replace("run.json", "")


def test_the_version_names_what_computes(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"ray-sampler {ray_sampler.__version__} (")
    for name in ("torch", "ray"):
        assert f"{name} {metadata.version(name)}" in said
