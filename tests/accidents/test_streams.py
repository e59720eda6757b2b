"""Standard streams that are closed, full or broken: a run continues without its log, others end silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.cli import COMMANDS
from ray_sampler.reporting.progress import reporter
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, flags_of, leave, savez
from tests.conftest import ROOT, Configure

WHOLE = [(0, 16), (16, 32), (32, 40)]

ALL_CLOSED = {"0": "close", "1": "close", "2": "close"}
SPOILED: list[dict[str, str]] = [
    *({stream: how} for stream in "012" for how in ("close", "full", "break")),
    {"1": "break", "2": "break"},
    {"1": "full", "2": "full"},
    ALL_CLOSED,
]

COMMON = [{"1": "full"}, {"1": "break", "2": "break"}, ALL_CLOSED]
"""What every command is tried with; one of them is tried with all."""

LINES = {
    "sample": ["--preset", "cd-imagenet64-lpips", "--dry_run"],
    "status": ["run"],
    "verify": ["run"],
    "merge": ["run"],
    "preview": ["run"],
    "inspect": ["digits"],
    "presets": [],
    "export": ["run", "--output", "pictures"],
    "reference": ["run", "--features", "digits", "--output", "reference.npz"],
    "score": ["--help"],
    "spot": ["--help"],
    "resume": ["--help"],
    "--help": [],
}
"""Arguments of every command, with which it prints something."""


def environment() -> dict[str, str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables.pop("RAY_ADDRESS", None)
    return variables


def outcomes(folder: Path, cases: list[Any]) -> list[dict[str, Any]]:
    """What becomes of command lines with spoiled streams; see streams.py."""
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/accidents/streams.py"), "cases.json"],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=4 * PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_command_survives_streams_that_are_closed_full_or_broken(configure: Configure, samples, tmp_path: Path):
    """It does what was asked; only where a disk was too full for its output is that a failure, and one sentence."""
    assert set(LINES) == {*COMMANDS, "--help"}
    leave(configure(), samples, WHOLE)
    cases = [
        ([name, *arguments], spoiled)
        for name, arguments in LINES.items()
        for spoiled in (SPOILED if name == "status" else COMMON)
    ]
    for (argv, spoiled), found in zip(cases, outcomes(tmp_path, cases), strict=True):
        full = spoiled.get("1") == "full"
        said = f"{argv} {spoiled} {found}"
        assert found["code"] == (1 if full else 0), said
        if "2" not in spoiled:
            expected = "ray-sampler: cannot write to standard output: No space left on device\n" if full else ""
            assert found["2"] == expected, said
        if "1" not in spoiled:
            assert found["1"], said


def test_a_wrong_request_has_its_exit_code_whatever_becomes_of_its_sentence(tmp_path: Path):
    cases = [(["status", "nowhere"], spoiled) for spoiled in SPOILED]
    assert {found["code"] for found in outcomes(tmp_path, cases)} == {2}


def test_a_watch_ends_without_a_reader(configure: Configure, samples, tmp_path: Path):
    leave(configure(), samples, WHOLE[:2])
    (found,) = outcomes(tmp_path, [(["status", "run", "--watch"], {"1": "break"})])
    assert (found["code"], found["2"]) == (0, "")


@pytest.mark.parametrize("mode", ["bar", "log"])
@pytest.mark.parametrize("json_log", [False, True])
def test_a_reporter_continues_when_its_stream_is_full(mode: Any, json_log: bool):
    with open("/dev/full", "w") as full, reporter(mode, json_log, full) as report:
        for _ in range(3):
            report.message("something happened", "warning")


@pytest.mark.accidents
def test_a_path_that_is_not_text_is_printed_as_it_is(configure: Configure, samples, tmp_path: Path):
    leave(configure(), samples, WHOLE)
    odd = os.fsencode(tmp_path) + b"/r\xffn-\xc3\xa9"
    os.rename(tmp_path / "run", odd)
    for variables in (
        {},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        for command in (b"merge", b"status"):
            done = subprocess.run(
                [sys.executable, "-m", "ray_sampler", command, odd],
                cwd=tmp_path, env=environment() | variables, capture_output=True, timeout=PATIENCE_S,
            )  # fmt: skip
            assert (done.returncode, done.stderr) == (0, b"")
            if command == b"merge":
                assert done.stdout == odd + b"/" + ARCHIVE.encode() + b"\n"


REDIRECTIONS = {
    "stderr closed": "2>&-",
    "both closed": ">&- 2>&-",
    "stderr full": "2>/dev/full",
    "both read by head": "2>&1 | head -1 >/dev/null",
}


@pytest.mark.accidents
@pytest.mark.parametrize(
    ("redirection", "mode"),
    [*((how, "log") for how in REDIRECTIONS), ("both read by head", "bar")],
)
def test_a_run_finishes_without_its_log(configure: Configure, samples, tmp_path: Path, redirection: str, mode: str):
    flags = " ".join(flags_of(configure(progress=mode, output="run")))
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{sys.executable} {ROOT}/jobs/sample.py {flags} {REDIRECTIONS[redirection]}"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
