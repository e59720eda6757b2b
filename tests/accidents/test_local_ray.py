"""A local Ray that cannot start, or that dies under a run: one sentence with the remedy; odd paths work."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ray_sampler.cluster.machine import check_machine, ray_folder
from ray_sampler.cluster.own_ray import log_says, why_not_started
from ray_sampler.errors import RequestError, RunError
from tests.cluster.processes import PATIENCE_S, PROMPT_S, started, wait_for, written
from tests.cluster.runs import ARCHIVE, LONGER, flags_of, savez
from tests.conftest import ROOT, Configure


def sentence(monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError) as refusal:
        check_machine()
    return str(refusal.value)


def test_a_long_folder_for_sockets_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    long = str(tmp_path / ("long" * 20))
    for variables in ({"TMPDIR": long}, {"RAY_TMPDIR": long, "TMPDIR": "/tmp"}):
        assert "set RAY_TMPDIR to a short one" in sentence(monkeypatch, **variables)


def test_a_folder_of_somebody_else_is_explained(monkeypatch: pytest.MonkeyPatch):
    """To root every folder is its own, so a place that takes no folder replaces one."""
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null")
    with pytest.raises(RequestError, match="set RAY_TMPDIR to a folder of your own"):
        check_machine()


def test_a_limit_on_files_is_explained(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**20, resource.RLIM_INFINITY))
    assert "ulimit -f unlimited" in sentence(monkeypatch)


def test_a_working_directory_that_is_not_text_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    monkeypatch.chdir(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert "is not UTF-8" in sentence(monkeypatch)


def test_a_folder_of_ray_that_is_not_text_is_explained(monkeypatch: pytest.MonkeyPatch):
    assert "is not UTF-8" in sentence(monkeypatch, RAY_TMPDIR=os.fsdecode(b"/tmp/\xff"))


@pytest.mark.parametrize("variables", [{"RAY_TMPDIR": "here"}, {"RAY_TMPDIR": ""}])
def test_rays_folder_does_not_depend_on_where_its_processes_work(variables, monkeypatch: pytest.MonkeyPatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ray_folder() == str(Path.cwd() / variables["RAY_TMPDIR"] / "ray")


def why(said: str) -> str:
    """The sentence on a Ray whose process said something and has no logs."""
    with subprocess.Popen(["true"]) as ended:
        return why_not_started(said, ended)


def test_a_limit_on_addresses_is_named_where_ray_did_not_start(monkeypatch: pytest.MonkeyPatch):
    assert "ulimit -v" not in why("its process ended")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**31, resource.RLIM_INFINITY))
    assert "ulimit -v allows 2048 MiB" in why("its process ended")


@pytest.mark.parametrize("said", ["it timed out after 120 s", "The current node timed out during startup."])
def test_a_ray_that_was_too_slow_is_to_be_started_again(said: str):
    """The first sentence is ours and the second Ray's, whose own limits are shorter."""
    assert "run the command again" in why(said)


def test_whatever_else_ray_says_at_its_start_becomes_one_sentence_with_the_place_of_its_logs():
    said = why("[Errno 28] No space left on device\x1b[2J")
    assert "the disk is full" in said
    assert "RAY_TMPDIR" in said
    assert "\x1b" not in said


def test_a_stack_is_not_a_reason(tmp_path: Path):
    complaint = (
        "[2026-01-01 00:00:00,000 C 1 2] (raylet) socket.cc:1:  An unexpected system state has occurred. You have "
        "likely discovered a bug in Ray. Please report this issue at https://github.com/ray-project/ray/issues and "
        "we'll work with you to fix it. Check failed: no such folder"
    )
    frame = "[2026-01-01 00:00:00,000 E 1 2] (raylet) logging.cc:474:     @     0x7ff792066d10  (unknown)"
    (tmp_path / "raylet.out").write_text(f"{complaint}\n{frame}\n")
    assert log_says(tmp_path) == "Check failed: no such folder"


def command(configure: Configure, folder: Path, limit: Callable[[], None] | None = None, **variables: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    environment.pop("RAY_ADDRESS", None)
    flags = flags_of(configure(output=str(folder)))
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs/sample.py"), *flags],
        cwd=ROOT, env=environment, capture_output=True, timeout=PATIENCE_S, preexec_fn=limit,
    )  # fmt: skip


@pytest.mark.accidents
def test_a_run_under_a_limit_on_files_reports_it_and_shows_no_traceback(configure: Configure, tmp_path: Path):
    done = command(configure, tmp_path / "run", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**28, 2**28)))
    assert done.returncode == 1
    assert b"ulimit -f unlimited" in done.stderr.splitlines()[-1]
    assert b"Traceback" not in done.stderr


@pytest.mark.accidents
def test_a_run_writes_to_a_path_in_any_language_under_any_locale(configure: Configure, samples, tmp_path: Path):
    output = tmp_path / "Bilder-ü"
    done = command(configure, output, LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}/{ARCHIVE}\n".encode()
    assert (output / ARCHIVE).read_bytes() == savez(samples)


@pytest.mark.accidents
def test_a_path_that_is_not_text_is_a_wrong_request_before_anything_is_written(configure: Configure, tmp_path: Path):
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xffn"))
    done = command(configure, output)
    assert done.returncode == 2
    assert b"in the command line is not UTF-8" in done.stderr
    assert not output.exists()


AGENT = ("DashboardAgent", "dashboard/agent.py", "dashboard-agent")
"""Names of Ray's agent, without which its raylet ends."""


def part_of_ray(driver: int, names: tuple[str, ...]) -> psutil.Process:
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # something else that ends just now
            if any(name in " ".join(process.cmdline()[:4]) for name in names):
                return process
    raise AssertionError(f"no {names} below {driver}")


@pytest.mark.accidents
@pytest.mark.parametrize("names", [("raylet/raylet",), ("gcs_server",), AGENT], ids=lambda names: names[0])
def test_a_run_whose_ray_is_killed_reports_it_and_continues_later(configure, longer_samples, tmp_path: Path, names):
    config, log = configure(**LONGER), tmp_path / "log"
    with started(config, log) as process:
        wait_for(written(1), tmp_path / "run", process, log)
        part_of_ray(process.pid, names).send_signal(signal.SIGKILL)
        assert process.wait(PROMPT_S) == 1
    said = log.read_text().splitlines()
    assert said[-1].startswith("ray-sampler: the local Ray ended unexpectedly"), said
    assert "run the same command again" in said[-1]
    with started(config, log) as process:
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    assert (tmp_path / "run" / "samples_48x8x8x3.npz").read_bytes() == savez(longer_samples)
