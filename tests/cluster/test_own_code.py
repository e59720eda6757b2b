"""Runs of a user's own network: what becomes of its code, of what it prints, and of models that are objects."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ray_sampler import Model, RequestError, RunConfig, RunError, read_fragment
from ray_sampler.cli import main
from ray_sampler.cluster import driver
from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare, record_code

pytestmark = pytest.mark.usefixtures("local_ray")

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
from ray_sampler import Model
import own_network_{number}


def make(weights):
    return Model(own_network_{number}.Network(), "denoiser", (1, 4, 4))
"""
NETWORK = """
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, sigma):
        {body}
        return x * self.gain
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A fresh module that makes a network of another one beside it, in the current directory: its number."""
    number = re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"own_model_{number}.py").write_text(SOURCE.format(number=number))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return number


def edit(number: str, body: str) -> Path:
    """Write the network's module anew; it is imported again."""
    path = Path(f"own_network_{number}.py")
    path.write_text(NETWORK.replace("{body}", body))
    for name in (f"own_network_{number}", f"own_model_{number}"):
        sys.modules.pop(name, None)
    return path


def request_of(number: str, **flags: Any) -> RunConfig:
    settings: dict[str, Any] = {"model": f"python:own_model_{number}:make", "output": "run", "num_samples": 4}
    settings |= {"batch_size": 2, "shard_size": 2, "gpus_per_actor": 0.0, "max_actors": 1, "steps": 2}
    return RunConfig(**(settings | flags))


def run_json() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/run.json").read_text())
    return found


def test_changed_code_is_refused_unless_it_is_accepted(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command again with a larger N: comments may change, code may not; both codes are recorded then."""
    network = edit(files, "pass").name
    run(request_of(files))
    first = run_json()["source"]
    assert first.keys() == {network, f"own_model_{files}.py"}
    assert all(len(bytes.fromhex(digest)) == 8 for digest in first.values())
    edit(files, "pass  # nothing")
    assert prepare(request_of(files, num_samples=6)).record()["source"] == first
    edit(files, "x = -x")
    before = run_json()
    with pytest.raises(RequestError, match=f"has changed since .*run was begun, in {network}; .*--accept_code_change"):
        run(request_of(files, num_samples=6))
    assert run_json() == before
    assert main(["verify", "run"]) == 0
    assert "versions" not in capsys.readouterr().out
    run(request_of(files, num_samples=6, accept_code_change=True))
    after = run_json()
    assert after["earlier_source"] == [first]
    assert after["source"] != first
    assert after["fingerprint"] == before["fingerprint"]
    sources = [
        read_fragment(str(path)).record.computed_by["source"] for path in sorted(Path("run/fragments").iterdir())
    ]
    assert sources == [first, first, after["source"]]
    assert main(["verify", "run"]) == 0
    hashes = ", ".join(sorted((first[network], after["source"][network])))
    assert f"2 versions of {network}: {hashes}\n" in capsys.readouterr().out
    prepare(request_of(files, num_samples=8))  # what was accepted stays so


def test_a_run_without_recorded_code_is_resumed_and_noted_once(files: str) -> None:
    edit(files, "pass")
    run(request_of(files))
    older = {name: value for name, value in run_json().items() if name != "source"}
    Path("run/run.json").write_text(json.dumps(older))
    (noted,) = record_code(prepare(request_of(files, num_samples=6)))
    assert "was not recorded when it was begun" in noted
    assert record_code(prepare(request_of(files, num_samples=8))) == []


def test_what_an_actor_prints_is_in_the_log_once(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    edit(files, "print('level', 'seen' if sigma[0] > 10 else 'passed', flush=True)")
    run(request_of(files, num_samples=8))
    printed = capsys.readouterr()
    for line in ("level seen", "level passed"):
        assert printed.err.count(f"an actor printed: {line}\n") == 1
    assert "level" not in printed.out


def test_full_tracebacks_are_in_a_file_that_is_named(files: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = edit(files, "print('before')\n        {}['missing'] if len(x) > 2 else None").resolve()
    with pytest.raises(RunError, match=f"raised KeyError: 'missing' .{path}, line"):
        run(request_of(files, batch_size=4, shard_size=4))
    said = capsys.readouterr().err
    (named,) = set(re.findall(r"full tracebacks of actors are in (\S+)", said))
    assert "an actor printed: before" in said
    text = Path(named).read_text()
    assert "KeyError: 'missing'" in text
    assert f'File "{path}", line 13' in text
    assert "engine.py" in text
    assert "\x1b" not in text
    Path(named).unlink()


@pytest.mark.parametrize("where", ["driver", "actor"])
def test_a_network_that_cannot_be_sampled_is_a_wrong_request(
    where: str, files: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by the driver where it has the run's kind of device, else by the first actor, before any shard."""
    path = edit(files, "return x, None").resolve()
    if where == "actor":
        monkeypatch.setattr(driver, "tried", lambda job: None)
    with pytest.raises(RequestError, match=rf"returned a tuple; .* as output\[0\] \({path}, line 11\)"):
        run(request_of(files))
    assert where == "actor" or not Path("run").exists()
    assert not list(Path().glob("run/fragments/*"))


def test_a_model_or_a_function_may_be_given(files: str, tmp_path: Path) -> None:
    """The name in the fingerprint is that of the network's class; what was given stays as it was."""
    edit(files, "pass")
    sys.path.insert(0, str(tmp_path))
    network = __import__(f"own_network_{files}").Network().train()
    model = Model(network, "denoiser", (1, 4, 4))
    results = [run(request_of(files, model=given, output=None)) for given in (model, lambda weights: model)]
    archives = [result.archive for result in results]
    assert archives[0] == archives[1]
    assert network.training
    assert network.gain.requires_grad
    assert json.loads((Path(archives[0]).parent / "run.json").read_text())["identity"]["model"] == "object:Network"
    assert results[0].summary["settings"]["model"] == "object:Network"
    with pytest.raises(RequestError, match=r"--weights is .*, which only a function"):
        run(request_of(files, model=model, weights="w.pt", output="other"))


NOTEBOOK = """
import ray, torch
from torch import nn
from ray_sampler import Model, RunConfig, run

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
SCALE = 0.5


def scaled(x):
    return x * SCALE


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, sigma):
        return scaled(x) * self.gain


def load(weights):
    return Model(Network(), "denoiser", (1, 4, 4))


def sample(model, output, **more):
    flags = dict(num_samples=2, batch_size=2, steps=2, gpus_per_actor=0, max_actors=1, progress="none")
    return run(RunConfig(model=model, output=output, **(flags | more)))


sample("python:__main__:load", "named")
sample(load, "function")
sample(Model(Network(), "denoiser", (1, 4, 4)), "model")
SCALE = 0.25
try:
    sample(load, "function", num_samples=4)
except ValueError as error:
    print(error)
"""


def test_a_notebook_s_own_network_is_sampled(tmp_path: Path) -> None:
    """Of a program that lies in no file, as a notebook's cells: by name, as a function and as a Model."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-"],
        input=NOTEBOOK,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "has changed since" in ran.stdout
    assert "in <stdin>;" in ran.stdout
    names = {}
    for output in ("named", "function", "model"):
        names[output] = json.loads((tmp_path / output / "run.json").read_text())["identity"]["model"]
        with np.load(next((tmp_path / output).glob("samples_*.npz"))) as archive:
            assert archive["arr_0"].std() > 0
    assert names == {"named": "__main__:load", "function": "object:Network", "model": "object:Network"}
