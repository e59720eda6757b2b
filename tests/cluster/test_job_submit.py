"""A run submitted to a real head with `ray job submit`, as its users type it, and what the head's metrics say of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray._private.runtime_env.packaging import create_package

from ray_sampler.storage.record import Samples
from tests.cluster.fleets import RAY
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, LONGER, flags_of, sampled, savez, small, whole
from tests.ports import free_ports

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.accidents


@dataclass(frozen=True)
class Head:
    """A running head, and how its users reach it."""

    address: str
    metrics: str
    """URL of the node's Prometheus endpoint."""
    environment: Mapping[str, str]
    process: psutil.Process
    """All that runs there is below it."""

    def freeze_actors(self) -> None:
        """Stop the actors without a word, so that the run that they work for gets no further."""
        for process in self.process.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "ray::Worker" in " ".join(process.cmdline()[:1]):
                    process.send_signal(signal.SIGSTOP)

    def job(self, *command: str, check: bool = True) -> str:
        """What `ray job ...` prints, standard error included."""
        verb, *rest = command
        done = subprocess.run(
            [*RAY, "job", verb, "--address", self.address, *rest],
            cwd=ROOT, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def submit(self, flags: list[str], *options: str, check: bool = True) -> str:
        """Submit a run from the checkout; what the command prints, the job's log among it."""
        return self.job("submit", *options, "--working-dir", ".", "--", "python", "jobs/sample.py", *flags, check=check)

    def totals(self, run: str) -> dict[str, float]:
        """The metrics of a run by name, summed over processes and states."""
        with urllib.request.urlopen(self.metrics, timeout=60) as answer:
            text = answer.read().decode()
        found: dict[str, float] = {}
        for name, labels, value in re.findall(r"^(ray_ray_sampler_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            if f'run="{run}"' in labels:
                found[name] = found.get(name, 0.0) + float(value)
        return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head of two CPUs that asks for a token, with separate ports and folders."""
    gcs, dashboard, agent, agent_grpc, environment_agent, client, metrics = map(str, free_ports(7))
    # Short, as sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True) as home:
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = outside | {
            "HOME": home,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        subprocess.run([*RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
        command = [
            *RAY, "start", "--head", "--block", "--num-cpus", "2", "--object-store-memory", "100000000",
            "--port", gcs, "--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent,
            "--dashboard-agent-grpc-port", agent_grpc, "--runtime-env-agent-port", environment_agent,
            "--ray-client-server-port", client, "--metrics-export-port", metrics, "--temp-dir", f"{home}/ray",
        ]  # fmt: skip
        log = Path(home) / "head.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=file, stderr=file, start_new_session=True
            )
        try:
            started = Head(
                f"http://127.0.0.1:{dashboard}",
                f"http://127.0.0.1:{metrics}/metrics",
                environment,
                psutil.Process(process.pid),
            )
            wait_until_it_takes_jobs(started, process, log)
            yield started
        finally:
            process.terminate()  # with --block it ends what it started
            process.wait(PATIENCE_S)


def wait_until_it_takes_jobs(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(head.metrics, timeout=5):
                break
        except OSError:
            time.sleep(0.5)
    while "No available agent" in (said := head.job("submit", "--", "true", check=False)):
        assert time.monotonic() < deadline, said
        time.sleep(1)
    assert "succeeded" in said, said


def run_of(log: str) -> str:
    """The start of the fingerprint, which the log begins with."""
    found = re.search(r"^\d\d:\d\d:\d\d run ([0-9a-f]{8}) in ", log, re.MULTILINE)
    assert found, log
    return found[1]


@pytest.fixture(scope="module")
def submitted(head: Head, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output of a small run that was submitted and waited for, and what was printed meanwhile."""
    output = tmp_path_factory.mktemp("submitted") / "run"
    return output, head.submit(flags_of(small(checkpoint, output)))


def test_a_submitted_run_ends_with_the_bytes_of_a_local_one(submitted: tuple[Path, str], samples: Samples) -> None:
    output, log = submitted
    assert (output / ARCHIVE).read_bytes() == savez(samples)
    assert f"\n{output / ARCHIVE}\n" in log


def test_its_log_shows_progress_that_needs_no_terminal(submitted: tuple[Path, str]) -> None:
    _, log = submitted
    assert "\x1b" not in re.sub(r".*(INFO|SUCC).*", "", log)
    lines = re.findall(r"^\d\d:\d\d:\d\d (\w[\w ]*): (\d+) of 40 samples \((\d+)%\).* \| actors ", log, re.MULTILINE)
    stages = list(dict.fromkeys(stage for stage, _, _ in lines))
    assert stages[-3:] == ["sampling", "merging", "done"]
    assert lines[-1] == ("done", "40", "100")
    assert "Traceback" not in log


def test_the_checkout_that_is_uploaded_is_small(tmp_path: Path) -> None:
    """What .gitignore names, environment, runs and caches among it, stays behind; Ray refuses more than 512 MiB."""
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=[".git"])
    assert package.stat().st_size < 30e6
    uploaded = {name.split("/")[0] for name in zipfile.ZipFile(package).namelist()}
    assert uploaded >= {"jobs", "ray_sampler"}
    assert uploaded.isdisjoint({".git", ".venv", ".mypy_cache", "runs", "build", "dist"})


def test_the_metrics_of_the_node_count_what_the_run_did(head: Head, submitted: tuple[Path, str]) -> None:
    totals = eventually(head, run_of(submitted[1]), "ray_ray_sampler_samples_total", 40)
    assert totals["ray_ray_sampler_samples_total"] == 40
    assert totals["ray_ray_sampler_shards_total"] == 5
    for stage in ("compute", "wait", "upload"):
        assert 0 < totals[f"ray_ray_sampler_{stage}_seconds_total"] < 120
    assert totals.get("ray_ray_sampler_retries_total", 0) == 0
    # The actors are gone, and so they are on the dashboard.
    assert eventually(head, run_of(submitted[1]), "ray_ray_sampler_actors", 0)["ray_ray_sampler_actors"] == 0


def eventually(head: Head, run: str, name: str, value: float) -> dict[str, float]:
    """The metrics of a run, once the one named is `value`, or after longer than Ray takes to report."""
    deadline = time.monotonic() + 100
    while (totals := head.totals(run)).get(name) != value and time.monotonic() < deadline:
        time.sleep(0.5)
    return totals


def test_a_stopped_job_says_how_to_resume_and_the_next_submit_finishes_it(
    head: Head, checkpoint: Path, tmp_path: Path
) -> None:
    config = small(checkpoint, tmp_path / "run", **LONGER | {"num_samples": 200})
    head.submit(flags_of(config), "--no-wait", "--submission-id", "first")
    deadline = time.monotonic() + PATIENCE_S
    while len(whole(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline, head.job("logs", "first")
        time.sleep(0.01)
    head.freeze_actors()
    assert "was stopped" in head.job("stop", "first")
    log = head.job("logs", "first", check=False)
    assert "ray-sampler: interrupted; finished samples are kept: run the same command again to resume" in log
    kept = {name: (tmp_path / "run" / "fragments" / name).stat().st_mtime_ns for name in whole(tmp_path / "run")}
    assert 2 <= len(kept) < 50
    assert not list((tmp_path / "run").glob("*.npz"))

    log = head.submit(flags_of(config))
    assert f"{4 * len(kept)} reused" in log
    assert (tmp_path / "run" / "samples_200x8x8x3.npz").read_bytes() == savez(sampled(config))
    for name, written in kept.items():
        assert (tmp_path / "run" / "fragments" / name).stat().st_mtime_ns == written


def test_a_relative_output_is_refused_as_the_jobs_folder_is_temporary(head: Head, checkpoint: Path) -> None:
    log = head.submit(flags_of(small(checkpoint, Path("runs/x"))), check=False)
    assert "ray-sampler: --output is 'runs/x', relative to a submitted job's working directory" in log
    assert "failed with exit code 2" in log
    assert "Traceback" not in log


def test_no_one_gets_in_without_the_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=60)
    assert refused.value.code in (401, 403)
