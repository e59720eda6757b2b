"""What `--help` and `presets` list is complete, and fits the terminal."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest

from ray_sampler.cli import COMMANDS, main
from ray_sampler.config import RunConfig
from ray_sampler.presets import BUNDLED, PRESETS
from ray_sampler.sampling.solvers import SOLVERS


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        main(["sample", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(f"--{f.name}" in out for f in fields(RunConfig))
    assert all(name in out for name in SOLVERS)
    assert out.count("--") < 1.5 * len(fields(RunConfig)), "the usage does not list them again"


@pytest.mark.parametrize("columns", [80, 200])
def test_the_list_of_commands_fits_the_terminal(columns: int, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(len(line) <= columns for line in out.splitlines())
    assert all(command.help in " ".join(out.split()) for command in COMMANDS.values())


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview", "export", "reference", "spot", "presets"])
def test_each_command_has_help(command: str, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"usage: ray-sampler {command}" in capsys.readouterr().out


def test_presets_lists_every_model_that_is_known_by_name(capsys):
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    for name in [*PRESETS, *BUNDLED]:
        assert f"{name} " in out
    assert all(preset.file in out for preset in PRESETS.values())


@pytest.mark.parametrize("columns", [80, 100, 120, 170])
def test_presets_cuts_nothing_on_a_terminal(columns: int, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    assert all(f"{preset.score} " in out for preset in PRESETS.values())
    assert "--preset NAME --model FILE" in " ".join(out.split())
