"""What `--help` and `presets` list is complete, and fits the terminal."""

from __future__ import annotations

import re
import sys

import pytest

from ray_sampler.cli import COMMANDS, main, parse
from ray_sampler.commands import request_of
from ray_sampler.config import RunConfig
from ray_sampler.options import flags_of
from ray_sampler.presets import BUNDLED, PRESETS, model_of
from ray_sampler.sampling.solvers import SOLVERS


def helped(arguments: list[str], capsys) -> tuple[list[str], str]:
    """The flags that a command's help lists, in order, and all that it prints."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    out = capsys.readouterr().out
    return re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", out, re.MULTILINE), out


def shown(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def test_help_lists_what_most_runs_use_and_help_all_every_flag_once(capsys):
    brief, out = helped(["sample", "--help"], capsys)
    flags = flags_of(RunConfig)
    assert set(brief) == {shown(name) for name, flag in flags.items() if flag.common} | {"--help", "--help-all"}
    assert 15 <= len(brief) <= 28
    assert all(name in out for name in SOLVERS)
    assert out.count("\n  ray-sampler sample ") == 4
    every, _ = helped(["sample", "--help-all"], capsys)
    assert sorted(every) == sorted([*map(shown, flags), "--help", "--help-all"])
    inert = [shown(name) for name, flag in flags.items() if flag.inert]
    assert every[-len(inert) - 2 : -2] == inert


def test_help_shows_the_defaults_of_the_plain_command(capsys):
    _, out = helped(["sample", "--help-all"], capsys)
    _, brought = model_of(RunConfig())
    for name in ("sampler", "steps"):
        text = out[out.index(f"\n  {shown(name)} ") :]
        assert f"(default: {brought[name]})" in " ".join(text[: text.index("\n  --", 1)].split())


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_of_sample_fits_the_terminal(columns: int, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, out = helped(["sample", "--help-all"], capsys)
    assert max(map(len, out.splitlines())) <= columns


def test_the_examples_of_the_help_are_commands_that_are_taken(capsys):
    _, out = helped(["sample", "--help"], capsys)
    for example in out.partition("examples:")[2].replace("\\\n", " ").splitlines():
        if example.strip().startswith("ray-sampler "):
            _, arguments = parse(example.split()[1:])
            request_of(arguments).check()


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
