"""Runs where people start them: containers of any user, small machines, `uv run`, job schedulers, notebooks, threads.

Each needs a separate Ray, most of them in a separate process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from ray_sampler.storage.record import Samples
from tests.cluster.processes import PATIENCE_S, PROMPT_S, kill_session, session_is_gone
from tests.cluster.runs import ARCHIVE, SMALL, TINY, savez, whole

pytestmark = pytest.mark.accidents

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [part for name, value in (TINY | SMALL).items() for part in (f"--{name}", str(value))]
SENTENCE = "ray-sampler: interrupted; finished samples are kept: run the same command again to resume"
USER = 4242
"""A user without a passwd entry."""

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user or limit a control group")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | variables


def sample(
    folder: Path,
    checkpoint: Path,
    *flags: str,
    before: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """The command of a small run, in `folder`, behind the command `before`."""
    with running(folder, checkpoint, *flags, before=before, variables=variables) as process:
        out, _ = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, out)


@contextmanager
def running(
    folder: Path,
    checkpoint: Path,
    *flags: str,
    before: tuple[str, ...] = (),
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[str]]:
    command = [*before, sys.executable, "-m", "ray_sampler", "sample", "--model", str(checkpoint), *FLAGS]
    process = subprocess.Popen(
        [*command, "--output", str(folder / "run"), *flags],
        cwd=folder,
        env=environment() if variables is None else dict(variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_session(process)


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence with which a run ended, the only one."""
    assert "Traceback" not in done.stdout, done.stdout
    (sentence,) = [line for line in done.stdout.splitlines() if line.startswith("ray-sampler: ")]
    return sentence


# Users without a home.


@needs_root
@pytest.mark.parametrize("home", [None, "/", "/nonexistent", "/proc"])
def test_a_user_without_home_or_name_samples(home: str | None, tmp_path: Path, checkpoint: Path, samples: Samples):
    folder, weights = tmp_path / "work", tmp_path / "tiny.safetensors"
    folder.mkdir()
    os.chown(folder, USER, USER)
    shutil.copy(checkpoint, weights)
    before: tuple[str, ...] = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
    # Reading is allowed everywhere, as the interpreter may lie in root's home; writing is not.
    before += ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    variables |= {"OMP_NUM_THREADS": "1"} | ({} if home is None else {"HOME": home})
    done = sample(folder, weights, before=before, variables=variables)
    assert done.returncode == 0, done.stdout
    assert (folder / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_no_token_is_written_home_nor_left_in_the_environment(tmp_path: Path, checkpoint: Path):
    script = f"""
import os
from ray_sampler import RunConfig, run
before = {{name: value for name, value in os.environ.items() if "AUTH" in name}}
run(RunConfig(output="run", model={str(checkpoint)!r}, **{TINY | SMALL}))
assert {{name: value for name, value in os.environ.items() if "AUTH" in name}} == before
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(HOME=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".ray").exists()


# Small machines.


@contextmanager
def control_group(controller: str, **limits: str) -> Iterator[tuple[str, ...]]:
    """A command that runs what follows it in a control group with limits; skips where none can be made."""
    folder = Path("/sys/fs/cgroup") / controller / f"ray-sampler-{os.getpid()}"
    try:
        folder.mkdir()
        for name, value in limits.items():
            (folder / f"{controller}.{name}").write_text(value)
    except OSError as error:
        pytest.skip(f"no control group can be limited here: {error}")
    try:
        yield "sh", "-c", f'echo $$ > {folder}/cgroup.procs; exec "$@"', "sh"
    finally:
        deadline = time.monotonic() + PROMPT_S
        while time.monotonic() < deadline:
            try:
                folder.rmdir()
                break
            except OSError:  # a process of it still ends
                time.sleep(0.1)


@needs_root
def test_half_a_cpu_is_enough(tmp_path: Path, checkpoint: Path, samples: Samples):
    with control_group("cpu", cfs_period_us="100000", cfs_quota_us="50000") as before:
        done = sample(tmp_path, checkpoint, before=before)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


@needs_root
@pytest.mark.parametrize(
    ("controller", "limits", "named"),
    [
        ("memory", {"limit_in_bytes": "500000000"}, "477 MiB of memory"),
        ("memory", {"limit_in_bytes": "700000000"}, "for lack of memory"),
        ("pids", {"max": "100"}, "processes and threads"),
    ],
)
def test_too_little_of_a_machine_is_named(controller: str, limits: dict[str, str], named: str, tmp_path, checkpoint):
    with control_group(controller, **limits) as before:
        done = sample(tmp_path, checkpoint, before=before)
    assert done.returncode == 1, done.stdout
    assert named in one_sentence(done)


@pytest.mark.skipif(
    subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0,
    reason="no network namespace can be made here",
)
def test_a_machine_without_loopback_is_told_so(tmp_path: Path, checkpoint: Path):
    done = sample(tmp_path, checkpoint, before=("unshare", "-n"))
    assert done.returncode == 1
    assert "127.0.0.1 cannot be reached" in one_sentence(done)


@pytest.mark.parametrize(
    ("folder", "code"), [("/proc/nowhere", 2), ("/tmp/" + 90 * "x", 1)], ids=["not writable", "too long for a socket"]
)
def test_a_folder_that_ray_cannot_use_is_named_with_its_variable(folder: str, code: int, tmp_path, checkpoint):
    try:
        done = sample(tmp_path, checkpoint, variables=environment(RAY_TMPDIR=folder))
    finally:
        if folder.startswith("/tmp/x"):
            shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == code, done.stdout
    assert folder in one_sentence(done)
    assert "RAY_TMPDIR" in one_sentence(done)


def test_a_ray_that_does_not_start_says_why_and_where_its_logs_lie(tmp_path: Path, checkpoint: Path):
    """Its control process is given an option that it refuses."""
    done = sample(tmp_path, checkpoint, variables=environment(RAY_gcs_storage="nonsense"))
    assert done.returncode == 1, done.stdout
    assert "/logs" in one_sentence(done)


# Where actors have no place.

IMPATIENT = """
import sys
from ray_sampler.cluster import dispatch, own_ray
dispatch.PLACE_S = dispatch.WORKER_START_S = 5.0
own_ray.START_S = 30.0
from ray_sampler.cli import entry
entry(sys.argv[1:])
"""

NO_WORKERS = """
import os, sys
if any(argument.endswith("default_worker.py") for argument in sys.orig_argv):
    os._exit(3)
"""
"""What each Python does at its start: one that Ray starts as a worker ends."""


def test_an_actor_that_is_not_placed_on_our_own_ray_ends_the_run(tmp_path: Path, checkpoint: Path):
    (tmp_path / "sitecustomize.py").write_text(NO_WORKERS)
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "sample", "--model", str(checkpoint), *FLAGS, "--output", "run"],
        env=environment(PYTHONPATH=f"{tmp_path}:{ROOT}"), cwd=tmp_path, capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("ray-sampler: ")]
    assert "no actor has started on this machine" in sentence or "Ray did not start" in sentence


# Signals.


def wait_for(condition, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ray_processes(process: subprocess.Popen[str]) -> int:
    return len(psutil.Process(process.pid).children(recursive=True))


@pytest.mark.parametrize("whole_group", [True, False], ids=["the group", "the driver"])
@pytest.mark.parametrize("moment", ["imports", "start", "workers", "sampling"])
def test_a_sigterm_ends_a_run_within_seconds_and_leaves_nothing(whole_group, moment, tmp_path: Path, checkpoint: Path):
    """As plain `timeout`, scancel, a scheduler's time limit and systemd send it."""
    moments = {
        "imports": lambda: True,
        "start": lambda: ray_processes(process) >= 1,
        "workers": lambda: ray_processes(process) >= 5,
        "sampling": lambda: len(whole(tmp_path / "run")) > 1,
    }
    process: subprocess.Popen[str]
    with running(tmp_path, checkpoint, "--num_samples", "40000", "--steps", "18") as process:
        if moment == "imports":  # the handlers are in place, torch and Ray are not imported
            status = Path(f"/proc/{process.pid}/status")
            caught = 1 << (signal.SIGTERM - 1)
            wait_for(lambda: int(status.read_text().partition("SigCgt:\t")[2].split()[0], 16) & caught, process)
        wait_for(moments[moment], process)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=PROMPT_S)
        assert process.returncode == 143, out
        assert session_is_gone(process.pid)
    assert [line for line in out.splitlines() if line.startswith("ray-sampler: ")] == [SENTENCE]
    assert "Traceback" not in out


def test_of_two_runs_on_a_machine_one_is_killed_and_the_other_finishes(tmp_path, checkpoint, samples):
    (tmp_path / "killed").mkdir()
    with (
        running(tmp_path / "killed", checkpoint, "--num_samples", "40000", "--steps", "18") as killed,
        running(tmp_path, checkpoint) as other,
    ):
        wait_for(lambda: len(whole(tmp_path / "killed" / "run")) > 1, killed)
        killed.kill()
        assert session_is_gone(killed.pid)
        out, _ = other.communicate(timeout=PATIENCE_S)
    assert other.returncode == 0, out
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


BESIDE = """
import os, subprocess, sys
from ray_sampler import RunConfig, run

others = [subprocess.Popen([sys.executable, "-c", "input()", "/home/ray/anything"], stdin=subprocess.PIPE)]
others.append(subprocess.Popen(["/tmp/ray/sleep", "600"], executable="/bin/sleep"))
run(RunConfig(output="run", model={model!r}, **{flags}))
print([each.poll() for each in others])
for each in others:
    each.kill()
"""


def test_processes_that_ray_did_not_start_live_on(tmp_path: Path, checkpoint: Path):
    """Whatever their command lines hold: in an image whose home is /home/ray all programs have that in theirs."""
    done = subprocess.run(
        [sys.executable, "-c", BESIDE.format(model=str(checkpoint), flags=TINY | SMALL)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout == "[None, None]\n", done.stderr


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_run_samples(tmp_path: Path, checkpoint: Path, samples: Samples):
    """Ray would start its workers by `uv run` too, in a copy of the folder."""
    (tmp_path / "big").write_bytes(bytes(600 * 2**20))
    before = ("uv", "run", "--no-project", "--python", sys.executable)
    done = sample(tmp_path, checkpoint, before=before)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
