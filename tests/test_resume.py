"""`ray-sampler resume DIR` runs the command that began a run again, wherever it is typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ray_sampler import Model, RequestError, RunConfig
from ray_sampler.cli import main
from ray_sampler.cluster.job import claim, prepare
from ray_sampler.resolve import command_of
from ray_sampler.run_folder import resumed
from ray_sampler.storage.record import Samples
from tests.cluster.runs import ARCHIVE, leave, savez
from tests.conftest import Configure


def begun(config: RunConfig) -> dict[str, Any]:
    """Begin a run, as a driver that is killed at once does; returns its run.json."""
    job = prepare(config)
    claim(job)
    return job.run_dir.read_run() or {}


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of the command, with a checkpoint in it."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    shutil.copy(checkpoint, "tiny.safetensors")
    return tmp_path


def test_it_means_the_same_run_from_another_folder(place: Path, configure: Configure, monkeypatch):
    config = configure(model="tiny.safetensors", output="run", labels="3,1,4", guidance=1.0, overwrite=True)
    run = begun(config)
    monkeypatch.chdir(place)
    request = resumed("project/run", {"max_actors": 2})
    assert Path.cwd() == place / "project"
    job = prepare(request)
    assert job.fingerprint == run["fingerprint"]
    assert (request.output, request.max_actors) == (str(place / "project" / "run"), 2)
    assert not request.overwrite
    assert request.labels == config.labels


def test_it_means_the_latest_size_of_a_run_that_grew(place: Path, configure: Configure):
    for num_samples in (40, 60):
        begun(configure(model="tiny.safetensors", output="run", num_samples=num_samples))
    assert resumed("run", {}).num_samples == 60


def test_the_command_holds_no_credential_and_the_fingerprint_not_the_command(place: Path, configure: Configure):
    first = begun(configure(model="tiny.safetensors", output="run"))
    second = begun(configure(model="tiny.safetensors", output="other", shard_size=4))
    assert first["fingerprint"] == second["fingerprint"]
    assert first["command"] != second["command"]
    assert first["command"]["folder"] == str(place / "project")
    secret = command_of(RunConfig(model="https://user:pass@host/w.pt?sig=token", output="s3://bucket/run", tag="v2"))
    assert secret is not None
    first_word, *flags = secret["argv"]
    assert first_word == "sample"
    assert flags == ["--model=https://host/w.pt", "--tag=v2", "--output=s3://bucket/run"]  # in the order of the help
    assert secret["tag"] == "v2"


def test_a_run_without_its_command_says_what_to_type(place: Path, configure: Configure, capsys):
    run = begun(configure(model="tiny.safetensors", output="run"))
    del run["command"]
    Path("run/run.json").write_text(json.dumps(run))
    assert main(["resume", "run"]) == 2
    said = capsys.readouterr().err
    assert all(text in said for text in ("ray-sampler sample --model tiny.safetensors", "--output", "run"))


def test_a_model_object_is_to_be_given_again(place: Path):
    model = Model(nn.Conv2d(3, 3, 1), "edm", (3, 8, 8))
    begun(RunConfig(model=model, output="run", num_samples=4, gpus_per_actor=0.0))
    with pytest.raises(RequestError, match=r"run\(\) with the same Model, Conv2d, and output="):
        resumed("run", {})


@pytest.mark.parametrize("arguments", [["--steps", "3"], ["--output", "x"], ["--overwrite"], ["--dry_run"]])
def test_only_flags_of_the_fleet_and_of_reporting_may_stand_beside_it(arguments: list[str], capsys):
    assert main(["resume", "run", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"{arguments[0]} is not a flag of resume, which repeats" in said
    assert "`ray-sampler sample`" in said


def test_it_completes_what_a_killed_run_left(
    place: Path, configure: Configure, samples: Samples, local_ray, monkeypatch
):
    leave(configure(model="tiny.safetensors", output="run"), samples, [(0, 8), (16, 40)])
    monkeypatch.chdir(place)
    assert main(["resume", "project/run", "--progress", "none"]) == 0
    assert (place / "project" / "run" / ARCHIVE).read_bytes() == savez(samples)
