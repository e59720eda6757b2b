"""Slips in a request: what was meant is named, and nothing is touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import fsspec
import pytest

from ray_sampler import options
from ray_sampler.cli import main
from ray_sampler.config import RunConfig
from ray_sampler.flags import SYNONYMS
from ray_sampler.storage.local_store import LocalStore
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, contents, flags_of, leave
from tests.conftest import ROOT, Configure


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert (said.out, line.startswith("ray-sampler: ")) == ("", True)
    return line


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--ckpt", "--model"),
        ("--outdir", "--output"),
        ("--network", "--model"),
        ("--num-sampling-steps", "--steps"),
        ("--cfg-scale", "--guidance"),
        ("--timestep_respacing", "--steps"),
        ("--use_ddim", "--sampler euler"),
        ("--class", "--labels"),
        ("--seeds", "--generator edm --seed FIRST --num_samples COUNT"),
    ],
)
def test_flags_of_other_scripts_are_known(flag: str, meant: str, capsys):
    for argument in ([flag, "1"], [f"{flag}=0-9"]):
        said = refusal(["sample", *argument], capsys)
        assert f"{flag} is not a flag of sample; use {meant}" in said


@pytest.mark.parametrize("flag", ["--scaling", "--use_kl", "--ema_rate"])
def test_a_flag_that_is_like_none_of_ours_gets_no_suggestion(flag: str, capsys):
    assert refusal(["sample", flag], capsys).endswith("of sample; `ray-sampler sample --help` lists the flags")


@pytest.mark.parametrize(
    ("flag", "meant"), [("--step", "steps"), ("--batchsize", "batch_size"), ("--num-sample", "num_samples")]
)
def test_a_slip_in_a_flag_is_named(flag: str, meant: str, capsys):
    assert refusal(["sample", flag, "1"], capsys).endswith(f"did you mean --{meant}?")


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--steps", "a whole number"),
        ("--rho", "a number"),
        ("--output", "text"),
        ("--state", "one of fp32, fp64"),
    ],
)
def test_a_flag_without_its_value_says_what_it_needs(flag: str, wanted: str, capsys):
    assert refusal(["sample", flag], capsys).endswith(f"{flag} needs a value: {wanted}")


def test_every_synonym_names_flags_that_exist_and_is_none_itself():
    for name, meant in SYNONYMS.items():
        assert name not in options.flags_of(RunConfig)
        flags = [word.strip(",;:") for word in meant.partition("`")[0].split() if word.startswith("--")]
        assert all(flag[2:] in options.flags_of(RunConfig) for flag in flags), meant


OUTPUTS = {
    "hf://datasets/a/b": ["hf:// takes no files one by one", "directory or a bucket"],
    "zip://x": ["zip:// takes no files one by one"],
    "github://a:b@main/x": ["github:// takes no files"],
    "s3:/bucket/run": ["'s3:/bucket/run', with one slash after s3:", "s3://bucket/run"],
    "gs:/bucket/run": ["with one slash after gs:"],
    "file:/tmp/run": ["with one slash after file:", "file:///tmp/run"],
    "hf:/datasets/a": ["with one slash after hf:"],
}


@pytest.mark.parametrize("dash", ["\u2014", "\u2013", "\u2013-", "\u2212\u2212", "\u2010\u2010"])
@pytest.mark.parametrize("before", [[], ["--dry_run"], ["--dry_run", "--seed", "1"]])
def test_another_dash_before_a_flag_is_named(dash: str, before: list[str], capsys):
    """As word processors and web pages write them."""
    for given in (["num-samples", "4"], ["num_samples=4"]):
        argv = ["sample", *before, dash + given[0], *given[1:]]
        assert refusal(argv, capsys).endswith("begins with a dash that is not a hyphen; write --num_samples")


def test_a_folder_may_begin_with_another_dash(capsys):
    assert "\u2014x is not a run directory" in refusal(["status", "\u2014x"], capsys)


@pytest.mark.parametrize("argv", [["sample", "--dry_run"], ["inspect", "digits"], ["status", "run"], ["presets"]])
def test_a_working_directory_that_is_gone_is_named(argv: list[str], tmp_path: Path):
    """torch would end the process while it is imported."""
    script = "import os, sys; os.rmdir(os.getcwd()); from ray_sampler.cli import entry; entry(sys.argv[1:])"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, *argv],
        cwd=tmp_path / "gone", env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the working directory cannot be found" in line


@pytest.mark.parametrize("name", ["steps", "nfe", "batch_size", "num_samples"])
@pytest.mark.parametrize("value", ["1000000000001", "9223372036854775808", "9" * 4000])
def test_a_number_beyond_all_use_is_refused_before_room_is_made_for_it(name: str, value: str, capsys):
    said = refusal(["sample", "--dry_run", f"--{name}", value], capsys)
    assert f"--{name} is {value}; it must be " in said
    assert "at most 1000000" in said or "from 1 to 10^" in said


@pytest.mark.parametrize("interval", ["99999999999999999999,1,1,2", "3,99999999999999999999,1,2"])
def test_restarts_beyond_all_use_are_refused(interval: str, capsys):
    said = refusal(["sample", "--dry_run", "--sampler", "restart", "--restarts", interval], capsys)
    assert "it must be at most 1000000 steps" in said


@pytest.mark.parametrize(("output", "named"), OUTPUTS.items(), ids=OUTPUTS)
def test_an_output_that_cannot_be_one_is_refused(
    output: str, named: list[str], configure, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for more in ([], ["--dry_run"]):
        line = refusal(["sample", *flags_of(configure(output=output)), *more], capsys)
        assert "--output" in line
        assert all(text in line for text in named), line
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["status", "verify", "merge", "preview"])
def test_a_slash_that_was_lost_is_named_by_every_command(command: str, capsys):
    assert "with one slash after s3:" in refusal([command, "s3:/bucket/run"], capsys)


@pytest.mark.parametrize("library", ["httpx", "httpx2"])
def test_a_store_of_hugging_face_that_does_not_answer_is_one_sentence(library: str, capsys, monkeypatch):
    raised = pytest.importorskip(library).ConnectError("no such host")

    def unreachable(*_: Any, **__: Any) -> NoReturn:
        raise raised

    monkeypatch.setattr(fsspec.core, "url_to_fs", unreachable)
    assert main(["status", "hf://datasets/a/b"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot open hf://datasets/a/b" in line


def test_a_folder_may_be_called_like_a_bucket(configure: Configure, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *flags_of(configure(output="./s3:/bucket")), "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == "./s3:/bucket"


@pytest.mark.usefixtures("local_ray")
def test_a_finished_run_where_nothing_can_be_written_is_found_complete(
    configure: Configure, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    def read_only(*_: Any) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    before = contents(copy)
    monkeypatch.setattr(LocalStore, "_temporary", read_only)
    assert main(["sample", *flags_of(configure(progress="log"))]) == 0
    said = capsys.readouterr()
    assert "the archive is complete already" in said.err
    assert said.out == f"{copy / ARCHIVE}\n"
    assert contents(copy) == before
    (copy / ARCHIVE).unlink()
    assert main(["sample", *flags_of(configure())]) == 2
    assert "the file system is read-only" in capsys.readouterr().err


def test_a_run_directory_is_claimed_once(configure: Configure, samples, tmp_path: Path):
    leave(configure(), samples, [])
    before = (tmp_path / "run" / "run.json").stat()
    leave(configure(), samples, [])
    after = (tmp_path / "run" / "run.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
