"""A wrong request gets one sentence and changes nothing; a right one means what its flags say."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sampler import cli, options
from ray_sampler.cli import main, parse
from ray_sampler.commands import request_of
from ray_sampler.config import RunConfig
from ray_sampler.storage.fragment import read_fragment
from ray_sampler.storage.record import Samples
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, contents, flags_of, leave, random_weights, savez
from tests.conftest import Configure

ROOT = Path(__file__).resolve().parents[1]


class Bomb:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: right and wrong files, and no run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    shutil.copy(checkpoint, "tiny.safetensors")
    torch.save(random_weights(), "tiny.pt")
    torch.save(random_weights(class_cond=False), "plain.pt")
    for suffix in ("safetensors", "pt"):
        Path(f"cut.{suffix}").write_bytes(Path(f"tiny.{suffix}").read_bytes()[:5000])
        Path(f"empty.{suffix}").touch()
        Path(f"text.{suffix}").write_text("not a checkpoint")
    torch.save({"weights": Bomb()}, "bomb.pt")
    Path("raw-bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"steps": 40}, "numbers.pt")
    Path("a-file").touch()
    Path("words.txt").write_text("one two")
    Path("folder.pt").mkdir()
    return tmp_path


def complaint(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that a wrong request gets."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("ray-sampler: ")
    return line


WRONG = [
    # arguments beside those of a run that would work, and what the sentence must name
    ("--nonsense 3", ["--nonsense"]),
    ("--num_sample 3", ["--num_sample", "--num_samples"]),
    ("stray", ["'stray'"]),
    ("--steps", ["--steps", "needs a value", "a whole number"]),
    ("--generator", ["--generator", "needs a value", "philox"]),
    ("--model --steps 3", ["--model", "needs a value"]),
    ("--steps many", ["--steps", "many", "a whole number"]),
    ("--num_samples 1.5", ["--num_samples", "1.5"]),
    ("--sigma_max high", ["--sigma_max", "high", "a number"]),
    ("--sampler magic", ["--sampler", "magic", "heun", "multistep"]),
    ("--generator magic", ["--generator", "magic", "philox"]),
    ("--clip_denoised maybe", ["--clip_denoised", "maybe", "True", "False"]),
    ("--num_samples 0", ["--num_samples", "0"]),
    ("--num_samples -5", ["--num_samples", "-5"]),
    ("--batch_size 0", ["--batch_size", "0"]),
    ("--shard_size 0", ["--shard_size", "0"]),
    ("--max_actors 0", ["--max_actors", "0"]),
    ("--min_actors 2", ["--min_actors", "2", "--max_actors"]),
    ("--gpus_per_actor 1.5", ["--gpus_per_actor", "1.5"]),
    ("--shard_timeout 0", ["--shard_timeout", "0"]),
    ("--steps 0", ["--steps", "0"]),
    ("--steps 1 --sampler multistep --ts 0,0", ["--steps", "1", "multistep", "2"]),
    ("--seed -1", ["--seed", "-1"]),
    ("--sigma_min 80", ["--sigma_min", "80", "--sigma_max"]),
    ("--sigma_min 90 --sigma_max 80", ["--sigma_min", "90", "--sigma_max", "80"]),
    ("--sigma_min nan", ["--sigma_min", "nan"]),
    ("--sampler multistep", ["--ts", "multistep"]),
    ("--sampler multistep --ts 0", ["--ts", "'0'"]),
    ("--sampler multistep --ts 0,4", ["--ts", "4", "0 to 3"]),
    ("--sampler multistep --ts 0,-1", ["--ts", "-1"]),
    ("--sampler multistep --ts a,b", ["--ts", "a,b"]),
    ("--labels 3,10", ["--labels", "10", "position 1", "0 to 9"]),
    ("--labels -1", ["--labels", "-1"]),
    ("--labels words.txt", ["--labels", "words.txt"]),
    ("--labels nowhere.npy", ["--labels", "nowhere.npy"]),
    ("--labels 3 --class_cond False --model plain.pt", ["--labels", "unconditional"]),
    ("--use_fp16 True --precision bf16", ["--use_fp16", "--precision"]),
    ("--learn_sigma True", ["--learn_sigma is True", "False"]),
    ("--model nowhere.pt", ["--model", "nowhere.pt", "no such file"]),
    ("--model cut.safetensors", ["--model", "cut.safetensors"]),
    ("--model cut.pt", ["--model", "cut.pt"]),
    ("--model empty.safetensors", ["--model", "empty.safetensors"]),
    ("--model empty.pt", ["--model", "empty.pt"]),
    ("--model text.safetensors", ["--model", "text.safetensors", "text, not a checkpoint"]),
    ("--model text.pt", ["--model", "text.pt", "text, not a checkpoint"]),
    ("--model numbers.pt", ["--model", "numbers.pt", "state dict"]),
    ("--model bomb.pt", ["--model", "bomb.pt", "state dict"]),
    ("--model raw-bomb.pth", ["--model", "raw-bomb.pth", "code is not executed"]),
    ("--model a-file", ["--model", "a-file"]),
    ("--model folder.pt", ["--model", "folder.pt", "directory"]),
    ("--model http://127.0.0.1:9/weights.pt", ["--model", "http://127.0.0.1:9/weights.pt"]),
    ("--model digit", ["--model", "digit", "digits"]),
    ("--model edm-imagenet64", ["--preset edm-imagenet64"]),
    ("--preset edm-imagenet", ["--preset", "edm-imagenet64"]),
    ("--model_path other.pt", ["--model", "--model_path", "other.pt"]),
    ("--num_res_blocks 2", ["--num_res_blocks is 2", "1"]),
    ("--image_size 9 --channel_mult 1,1", ["--channel_mult is 1,1", "1"]),
    ("--output a-file", ["a-file", "folder"]),
    ("--output a-file/below", ["a-file/below", "a file is in the place of a folder"]),
    ("--output memory://run", ["--output", "memory://run"]),
    ("--output nonsense://run", ["nonsense://run", "protocol"]),
    ("--output s3://", ["--output", "s3://", "bucket"]),
    ("--output s3://bucket/run?token=secret", ["--output", "s3://bucket/run"]),
    ("--output http://127.0.0.1:9/run", ["--output", "http://127.0.0.1:9/run"]),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[arguments for arguments, _ in WRONG])
def test_a_wrong_request_gets_one_sentence_and_touches_nothing(
    place: Path, configure: Configure, arguments, named, capsys
):
    before = contents(place)
    line = complaint(
        ["sample", *flags_of(configure(model="tiny.safetensors", output="run")), *arguments.split()], capsys
    )
    assert all(text in line for text in named), line
    assert "secret" not in line
    assert contents(place) == before


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], ["command is missing", "sample"]),
        (["smaple"], ["'smaple'", "sample"]),
        (["--json"], ["--json"]),
        (["status"], ["status", "directory"]),
        (["status", "a", "b"], ["'b'", "ray-sampler status"]),
        (["status", "a", "--jsn"], ["--jsn", "--json"]),
        (["status", "a", "--json=1"], ["--json", "takes no value"]),
        (["status", "-x", "a"], ["-x", "ray-sampler status"]),
        (["merge", "a", "--num_samples", "3"], ["--num_samples", "merge"]),
        (["presets", "a"], ["'a'"]),
    ],
)
def test_a_wrong_command_gets_one_sentence(argv: list[str], named: list[str], capsys):
    line = complaint(argv, capsys)
    assert all(text in line for text in named), line


def test_an_empty_output_is_refused(place: Path, capsys):
    assert "--output is empty" in complaint(["sample", "--output", ""], capsys)


@pytest.mark.parametrize("output", [["--output", "run"], []])
def test_a_submitted_job_must_name_an_absolute_output(place: Path, configure: Configure, output, capsys, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    flags = flags_of(configure(model="tiny.safetensors", output=None)) + output
    before = contents(place)
    assert "temporary" in complaint(["sample", *flags], capsys)
    assert contents(place) == before


def command_line(argv: list[str], folder: Path, **how: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, **how
    )


def test_an_address_where_no_cluster_answers_is_refused(place: Path, configure: Configure):
    """One of each kind, in a process that is connected to no Ray; Ray's own attempts would take minutes."""
    addresses = ("127.0.0.1:9", "no-such-host.invalid:6379", "nonsense", "ray://127.0.0.1:10001")
    requests = [["sample", *flags_of(configure(output="run", address=address))] for address in addresses]
    script = f"from ray_sampler.cli import main; assert [main(request) for request in {requests}] == [2, 2, 2, 2]"
    before = contents(place)
    done = command_line(["-c", script], place)
    assert done.returncode == 0, done.stderr
    for line, address in zip(done.stderr.splitlines(), addresses, strict=True):
        assert line.startswith(f"ray-sampler: --address is '{address}'")
    assert contents(place) == before


# What flags mean.


def parsed(*arguments: str) -> RunConfig:
    return request_of(parse(["sample", *arguments])[1])


def test_hyphens_are_underscores():
    assert parsed("--num-samples", "7", "--s-churn=0.5") == parsed("--num_samples", "7", "--s_churn", "0.5")
    assert parsed("--num_samples=7").num_samples == 7


@pytest.mark.parametrize(
    ("value", "meaning"),
    [(value, True) for value in ("True", "true", "yes", "y", "t", "1")]
    + [(value, False) for value in ("False", "false", "no", "n", "f", "0")],
)
def test_booleans_are_what_the_original_script_accepts(value: str, meaning: bool):
    for flag in ("class_cond", "overwrite", "use_fp16", "dry_run", "use_checkpoint"):
        assert getattr(parsed(f"--{flag}", value), flag) is meaning
        assert getattr(parsed(f"--{flag}={value}"), flag) is meaning


def test_a_bare_boolean_flag_means_true():
    config = parsed("--overwrite", "--class-cond", "--num_samples", "7", "--dry_run")
    assert (config.overwrite, config.class_cond, config.num_samples, config.dry_run) == (True, True, 7, True)


def test_a_flag_that_is_not_given_is_left_to_the_model():
    assert parsed() == RunConfig()
    assert parsed("--clip_denoised", "False").clip_denoised is False


def test_a_run_directory_and_labels_may_begin_with_a_digit_or_a_minus():
    assert parsed("--labels", "-1,2", "--ts", "-1").labels == "-1,2"
    assert parsed("--output", "2024").output == "2024"


# --dry_run, --help, presets


def test_a_dry_run_prints_the_resolved_run_and_touches_nothing(place: Path, configure: Configure, capsys):
    config = configure(model="nowhere.pt", output="run", sampler="multistep", ts="0,2", dry_run=True, shard_size=10)
    before = contents(place)
    assert main(["sample", *flags_of(config)]) == 0
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert all(text in line for text in ("--model", "nowhere.pt", "no such file"))
    settings = json.loads(said.out)
    assert contents(place) == before
    expected = {"model": "nowhere.pt", "output": "run", "sampler": "multistep", "ts": "0,2", "shard_size": 12}
    assert settings.items() >= (expected | {"sigma_max": 80.0, "rounding": "truncate", "labels": "random"}).items()
    recorded = {name for name, flag in options.flags_of(RunConfig).items() if flag.recorded}
    levels = {"schedule", "nfe", "sigmas"}
    assert settings.keys() - levels == recorded - {"model_path", "use_fp16", "dry_run"}


def test_a_dry_run_shows_what_a_bundled_model_and_a_preset_bring(place: Path, capsys):
    assert main(["sample", "--dry_run"]) == 0
    assert json.loads(capsys.readouterr().out).items() >= {"model": "digits", "image_size": 32, "steps": 12}.items()
    assert main(["sample", "--dry_run", "--preset", "cd-imagenet64-l2", "--model_path", "x.pt", "--seed", "1"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings.items() >= {"model": "x.pt", "image_size": 64, "ts": "0,22,39", "seed": 1}.items()


def test_a_dry_run_of_a_wrong_request_is_refused(place: Path, capsys):
    assert "--steps" in complaint(["sample", "--dry_run", "--steps", "0"], capsys)


def test_a_dry_run_shows_no_credential(place: Path, capsys):
    secret = ["--model", "https://user:pass@host/w.pt?sig=token", "--output", "s3://bucket/run", "--labels"]
    assert main(["sample", "--dry_run", "--class_cond", *secret, "https://host/l.npy?sig=token"]) == 0
    out = capsys.readouterr().out
    assert "https://host/w.pt" in out
    assert not any(word in out for word in ("user", "pass@", "token"))


def test_the_job_script_is_the_sample_command(place: Path, capsys):
    arguments = ["--dry_run", "--seed", "3", "--num-samples", "20"]
    done = command_line([str(ROOT / "jobs" / "sample.py"), *arguments], place)
    assert main(["sample", *arguments]) == done.returncode == 0
    assert done.stdout == capsys.readouterr().out


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small disk needs the right to mount one")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(disk: Path, leaving: int) -> None:
    """Leave this many bytes on a disk."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("wb") as file:
        file.write(bytes(free - leaving))


def only_whole_files(output: Path) -> None:
    for path in output.rglob("*"):
        assert not path.name.endswith(".tmp")
        if path.parent.name == "fragments":
            read_fragment(str(path))


def complains_of_the_disk(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("ray-sampler: ")
    assert "the disk is full" in error.splitlines()[-1]


@pytest.mark.slow
def test_a_disk_that_fills_while_samples_are_written_leaves_whole_files_and_the_run_continues_later(
    small_disk: Path, configure: Configure, samples: Samples, local_ray, capsys
):
    config = configure(output=str(small_disk / "run"))
    leave(config, samples, [(0, 8)])
    fill_up(small_disk, leaving=28_000)
    complains_of_the_disk(["sample", *flags_of(config)], capsys)
    only_whole_files(small_disk / "run")
    assert not (small_disk / "run" / ARCHIVE).exists()
    (small_disk / "filler").unlink()
    assert main(["sample", *flags_of(config)]) == 0
    assert (small_disk / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_a_disk_that_is_full_from_the_start_is_said_in_one_sentence(small_disk: Path, configure: Configure, capsys):
    fill_up(small_disk, leaving=0)
    argv = ["sample", *flags_of(configure(output=str(small_disk / "run")))]
    complains_of_the_disk(argv, capsys)
    only_whole_files(small_disk / "run")
    assert not (small_disk / "run" / "run.json").exists()


def test_a_disk_that_fills_while_the_archive_is_written_leaves_none(small_disk, configure, samples: Samples, capsys):
    leave(configure(output=str(small_disk / "run")), samples, [(0, 40)])
    fill_up(small_disk, leaving=4096)
    complains_of_the_disk(["merge", str(small_disk / "run")], capsys)
    only_whole_files(small_disk / "run")
    assert not (small_disk / "run" / ARCHIVE).exists()
    (small_disk / "filler").unlink()
    assert main(["merge", str(small_disk / "run")]) == 0
    assert (small_disk / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_an_archive_that_the_system_cuts_off_is_not_left(configure, samples: Samples, tmp_path: Path):
    """As with a quota of the file system, here by the process's own limit, which needs no right to mount."""
    leave(configure(), samples, [(0, 40)])
    done = command_line(
        ["-m", "ray_sampler", "merge", "run"],
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ray-sampler: cannot write")
    only_whole_files(tmp_path / "run")
    assert not (tmp_path / "run" / ARCHIVE).exists()


@pytest.mark.parametrize("asked", [True, False])
def test_an_error_of_the_system_is_a_sentence_and_its_traceback_is_shown_on_demand(asked, monkeypatch, capsys):
    def execute(arguments):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", "weights")

    monkeypatch.setenv("RAY_SAMPLER_DEBUG", "1" if asked else "0")
    monkeypatch.setitem(cli.COMMANDS, "presets", cli.COMMANDS["presets"]._replace(execute=execute))
    assert main(["presets"]) == 1
    *before, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("ray-sampler: the system refused: [Errno 21] Is a directory: 'weights'")
    assert (before[:1] == ["Traceback (most recent call last):"]) == asked
    assert any("in execute" in line for line in before) == asked
    assert ("RAY_SAMPLER_DEBUG=1" in sentence) != asked


def test_a_dry_run_of_an_own_network_shows_what_needs_no_call_of_it(capsys: pytest.CaptureFixture[str]):
    assert main(["sample", "--model", "python:not_there:build", "--sampler", "heun", "--steps", "9", "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    expected = {"rounding": "truncate", "clip_denoised": False, "schedule": "karras", "nfe": 17}
    assert {name: shown[name] for name in expected} == expected
    assert shown["sigma_max"] is None
