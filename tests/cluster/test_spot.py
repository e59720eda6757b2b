"""Spot notices: what the clouds say is understood, and what the cluster files start drains a real node."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ray_sampler import cli, run
from ray_sampler.cluster import spot
from tests.cluster.fleets import Fleet
from tests.cluster.metadata import Service, metadata_service
from tests.cluster.processes import PATIENCE_S, PROMPT_S, Moment, kill_session, started, wait_for
from tests.cluster.runs import ARCHIVE, sampled, savez, small
from tests.conftest import ROOT, Configure


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    with metadata_service() as service:
        for name, value in service.environment.items():
            monkeypatch.setenv(name, value)
        yield service


def test_aws_is_asked_with_a_token_and_says_when_the_machine_goes(service: Service) -> None:
    assert spot.aws_notice() is None
    service.goes_in = 120.0
    seconds = spot.aws_notice()
    assert seconds is not None
    assert 60 < seconds <= 120
    service.goes_in = -5.0
    assert spot.aws_notice() == 0.0


def test_google_says_that_the_machine_is_preempted(service: Service) -> None:
    assert spot.google_notice() is None
    service.goes_in = 10.0
    assert spot.google_notice() == 30.0


def test_a_proxy_is_not_asked_about_its_own_machine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert spot.google_notice() is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "`ray-sampler spot` takes one of aws, gcp and now, not ''"),
        (["azure"], "`ray-sampler spot` takes one of aws, gcp and now, not 'azure'"),
        (["now", "--seconds", "soon"], "--seconds is 'soon'; it must be a number of seconds, 0 or more"),
        (["now", "--seconds", "-1"], "--seconds is '-1'; it must be a number of seconds, 0 or more"),
        (["aws", "--second", "1"], "--second is not a flag of spot; did you mean --seconds?"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["spot", *arguments]) == 2
    assert capsys.readouterr().err == f"ray-sampler: {sentence}\n"


def test_a_node_that_is_not_here_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["spot", "now", "--node_id", "ff"]) == 1
    said = capsys.readouterr().err
    assert said == "ray-sampler: Ray runs no node ff on this machine; start it with `ray start`\n"


def command_of(file: str) -> list[str]:
    """The arguments of `ray-sampler spot` in a cluster file."""
    text = yaml.safe_load((ROOT / file).read_text())
    if file.endswith("rayjob.yaml"):
        (group,) = text["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        words = container["lifecycle"]["preStop"]["exec"]["command"]
    else:
        (line,) = [line for line in text["worker_start_ray_commands"] if "ray-sampler spot" in line]
        words = shlex.split(line.partition(" < ")[0])
    return words[words.index("ray-sampler") + 1 :]


SEVERAL: dict[str, Any] = {"num_samples": 4800, "shard_size": 4, "steps": 40, "max_actors": 2, "progress": "log"}
"""More than two actors finish while three nodes come and go."""


@contextmanager
def spotting(file: str, node_id: str, service: Service) -> Iterator[subprocess.Popen[bytes]]:
    """What a cluster file starts, for one of the nodes that are on this machine."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ray_sampler", *command_of(file), "--node_id", node_id],
        env=os.environ | service.environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_session(process)


@pytest.mark.accidents
def test_what_the_cluster_files_start_drains_a_node_when_its_cloud_says_that_it_goes(
    configure: Configure, checkpoint: Path, tmp_path: Path
) -> None:
    """Two nodes at a time; one of them leaves by each of the three files, and costs the run nothing.

    The run is then interrupted, and another command takes what it finished into a smaller archive.
    """
    output, log = tmp_path / "run", tmp_path / "log"
    fleet = Fleet(workers=2)
    try:
        with started(configure(**SEVERAL, address=fleet.address), log) as process:
            for file in ("cluster.yaml", "deploy/gcp.yaml", "deploy/kuberay-rayjob.yaml"):
                said, leaving = len(log.read_text()), fleet.workers.pop(0).node_id
                wait_for(says("actors 2 ready", log, said), output, process, log)
                with metadata_service() as service, spotting(file, leaving, service) as spot_process:
                    if not file.endswith("rayjob.yaml"):
                        wait_for(asked_twice(service), output, process, log)
                        assert leaving in fleet.alive()
                    service.goes_in = 110.0
                    wait_for(left(fleet, leaving), output, process, log)
                    assert spot_process.wait(PATIENCE_S) == 0
                fleet.add()
            process.send_signal(signal.SIGINT)
            assert process.wait(PROMPT_S) == 130, log.read_text()
    finally:
        fleet.close()
    assert "lost an actor" not in log.read_text()
    fewer = SEVERAL | {"num_samples": 40}
    assert run(configure(**fewer)).summary["computed"] == 0
    assert (output / ARCHIVE).read_bytes() == savez(sampled(small(checkpoint, Path("unused"), **fewer)))


def says(text: str, log: Path, since: int) -> Moment:
    return lambda output: text in log.read_text()[since:]


def asked_twice(service: Service) -> Moment:
    return lambda output: service.asked > 1


def left(fleet: Fleet, node_id: str) -> Moment:
    return lambda output: node_id not in fleet.alive()
