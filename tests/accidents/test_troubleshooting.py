"""docs/troubleshooting.md: its commands run, its messages are ours, and .rayignore keeps out what it should."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env import packaging

from ray_sampler.cli import main
from tests.cluster.processes import PATIENCE_S
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = [re.split(r"(?<!\\)\|", line)[1:3] for line in PAGE.splitlines() if line.startswith("| `")]
PROGRAMS = ("ray-sampler ", "ray ", "env ", "mkdir ", "cd ", "ulimit ", "df ", "du ", "cut ", "export ", "RAY_TMPDIR=")
COMMANDS = [
    code.replace("\\|", "|")
    for _, remedy in ROWS
    for code in re.findall(r"`([^`]+)`", remedy)
    if code.startswith(PROGRAMS) and code != "ray job submit"
]
FOREIGN = ("Token authentication", "No available agent", "413", "exceeds the maximum size", "starting: ")
"""How messages begin that are Ray's, or lines of the log."""
SOURCES = re.sub(
    r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sorted((ROOT / "ray_sampler").rglob("*.py")))
)


def test_the_page_has_commands_and_messages():
    assert len(COMMANDS) > 12
    assert len(ROWS) > 40


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In a shell, with `ray` and `ray-sampler` written down in place of being run; ours are then resolved."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    for folder in (programs, home):
        folder.mkdir()
    for name in ("ray", "ray-sampler"):
        (programs / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" > "$HOME/called"\n')
        (programs / name).chmod(0o755)
    (home / "index-and-label.csv").write_text("0,3\n1,1\n")
    variables = {"HOME": str(home), "PATH": f"{programs}:{os.environ['PATH']}", "RAY_ADDRESS": "somewhere:1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=home, env=variables, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    called = (home / "called").read_text().splitlines() if (home / "called").exists() else []
    assert bool(called) == bool(re.search(r"\bray(-sampler)? ", command))
    if called[:1] == ["ray-sampler"]:
        if "--help" in called:
            with pytest.raises(SystemExit, match="0"):
                main(called[1:])
        elif "URL" in called:  # the flags are right where the run that they name is what is missing
            assert main(called[1:]) == 2
            assert "is not a run directory" in capsys.readouterr().err
        else:
            assert main([*called[1:], *(["--dry_run"] if called[1] == "sample" else [])]) == 0
        assert capsys.readouterr().err == ""
    elif called:
        assert_ray_takes(called[1:])


def assert_ray_takes(arguments: list[str]) -> None:
    import click
    from ray.scripts.scripts import cli as ray_cli

    at: Any = ray_cli
    while isinstance(at, click.Group) and arguments:
        assert arguments[0] in at.commands
        at = at.commands[arguments.pop(0)]
    known = {option for parameter in at.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in arguments if word.startswith("--")} <= known


def messages() -> list[str]:
    quoted = [code for message, _ in ROWS for code in re.findall(r"`([^`]+)`", message)]
    return [message for message in quoted if not message.startswith(FOREIGN) and " " in message]


@pytest.mark.parametrize("message", messages())
def test_each_message_is_one_that_is_said(message: str):
    """Some words in a row, between placeholders, are in the code."""
    pieces = re.split(r"\.\.\.|'[^']*'|\b[A-Z]+\b|\b\d[\d.]*\b|--\w+ (?!(?:is|has|holds|ends)\b)\S+|[();,:/]", message)
    rows = [piece.split() for piece in pieces if len(piece.strip()) >= 8]
    said = {" ".join(row[i : i + 3]) for row in rows for i in range(max(1, len(row) - 2))}
    assert any(words in SOURCES for words in said), f"none of {said} is in the code"


def test_what_a_job_need_not_have_stays_at_home(tmp_path: Path):
    (tmp_path / ".rayignore").write_text((ROOT / ".rayignore").read_text())
    out = [
        "runs/digits/samples_9x1x1x3.npz",
        ".venv/lib/torch.so",
        "venv311/x",
        ".git/objects/ab",
        "samples_1x1x1x3.npz",
    ]
    sent = ["ray_sampler/cli.py", "jobs/sample.py", "ray_sampler/networks/digits/digits.safetensors", "weights.pt"]
    for name in out + sent:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (excluded,) = packaging.get_excludes_from_ignore_files(tmp_path, include_gitignore=False)

    def left_out(name: str) -> bool:
        """A folder that is left out takes along all that is in it."""
        path = tmp_path / name
        return any(excluded(each) for each in (path, *path.parents) if tmp_path in each.parents)

    assert [name for name in out + sent if left_out(name)] == out


def test_the_words_of_commands_are_split_as_a_shell_does():
    assert all(shlex.split(command) for command in COMMANDS)
