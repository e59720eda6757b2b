"""Scores of whole jobs: beside sampling, of earlier starts, of archives and folders; killed, damaged and grown."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ray_sampler
from ray_sampler.cli import main
from ray_sampler.cluster import driver
from ray_sampler.cluster.job import prepare
from ray_sampler.cluster.shipping import Shipped, ship
from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError, RunError
from ray_sampler.networks.family import Network
from ray_sampler.scoring import scores as module
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.metrics import Moments, frechet
from ray_sampler.storage.fragment import read_fragment
from tests.cluster.test_walls import driven, expected, registered, request_for  # noqa: F401  # fixtures

pytestmark = pytest.mark.usefixtures("local_ray", "registered")

N = 130
"""Two blocks of 64 indices, and two more."""

EXTRACTOR = """
import os, signal, torch
from pathlib import Path
from torch import nn

class Small(nn.Module):
    def __init__(self, fatal):
        super().__init__()
        self.fatal = fatal
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        if self.fatal and images.any() and not Path(self.fatal).exists():
            Path(self.fatal).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layers(images.permute(0, 3, 1, 2).float() / 255).flatten(1)

def small(fatal):
    return Small(fatal)

class Broken(Small):
    def forward(self, images):
        features = super().forward(images)
        features[3:4] = torch.nan
        return features

class Colours(nn.Module):
    def forward(self, images):
        return images.float().mean((1, 2)) / 255

def broken(fatal):
    return Broken(fatal)
"""

COMMON: dict[str, Any] = {
    "metrics": "fid,kid,pr", "features": "python:toyfeatures:small", "gpus_per_actor": 0.0, "max_actors": 1
}  # fmt: skip

Request = Callable[..., RunConfig]


@pytest.fixture
def scored(request_for: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:  # noqa: F811
    """A request for a scored run."""
    (tmp_path / "toyfeatures.py").write_text(EXTRACTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "reference.npz", rng.integers(0, 256, (90, 8, 8, 3), np.uint8))
    flags: dict[str, Any] = {
        "score": str(tmp_path / "reference.npz"), "num_samples": N, "batch_size": 10, "shard_size": 50, **COMMON
    }  # fmt: skip
    return lambda output, **more: request_for(output, **flags | more)


def scores(output: Path) -> bytes:
    return (output / "scores.json").read_bytes()


def features(output: Path) -> np.ndarray:
    (folder,) = (output / "features").iterdir()
    return np.concatenate([read_fragment(path).samples.columns["features"] for path in sorted(folder.iterdir())])


def written(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


def test_a_score_is_the_same_however_it_comes_about(scored: Request, tmp_path: Path, monkeypatch, capsys) -> None:
    # An actor dies while it makes features, and the run continues to its score.
    (result,) = driven([prepare(scored("run", features_weights=str(tmp_path / "killed")))])
    assert (tmp_path / "killed").exists()
    run, whole = tmp_path / "run", scores(tmp_path / "run")
    found = json.loads(whole)
    assert found["num_samples"] == N
    assert found["metrics"].keys() == {"fid", "kid", "precision", "recall"}
    assert result.summary["scores"] == json.loads((run / "summary.json").read_text())["scores"] == found
    assert f"{found['metrics']['fid']:.4g}" in (run / "report.html").read_text()

    # Features that are asked for later, of other shards, come of the fragments alone: no generator is loaded.
    driven([prepare(scored("later", score=None, features=None, metrics=None, shard_size=150))])
    before, networks = written(tmp_path / "later"), []

    def recorded(network: Network, *more: Any) -> Shipped:
        networks.append(network)
        return ship(network, *more)

    monkeypatch.setattr(driver, "ship", recorded)
    driven([prepare(scored("later", shard_size=150))])
    assert [network.spec.family for network in networks] == ["features"]
    untouched = {path for path in before if path.suffix in (".parquet", ".npz") or path.name == "run.json"}
    assert {path: time for path, time in written(tmp_path / "later").items() if path in untouched} == {
        path: before[path] for path in untouched
    }
    np.testing.assert_array_equal(features(run), features(tmp_path / "later"))
    assert scores(tmp_path / "later") == whole

    # The command line finds that nothing is left to be made.
    (run / "scores.json").unlink()
    flags = [part for name, value in COMMON.items() for part in (f"--{name}", str(value))]
    capsys.readouterr()
    assert main(["score", str(run), "--reference", str(tmp_path / "reference.npz"), *flags]) == 0
    out = capsys.readouterr().out  # Ray may still speak of the actor that died
    assert json.loads(out[out.index("{\n") :]) == found
    assert scores(run) == whole
    assert main(["status", str(run), "--json"]) == 0
    (folder,) = (run / "features").iterdir()
    status = json.loads(capsys.readouterr().out)
    assert (status["scores"], status["products"]) == (found, {f"features/{folder.name}": N})
    assert main(["verify", str(run)]) == 0


@pytest.mark.accidents
def test_archives_folders_repaired_unfinished_and_grown_runs_have_their_scores(scored: Request, tmp_path: Path) -> None:
    (result,) = driven([prepare(scored("run"))])
    run, whole = tmp_path / "run", scores(tmp_path / "run")
    found = json.loads(whole)

    # A file of features is damaged and one is gone; both are made again, and so is the score.
    (folder,) = (run / "features").iterdir()
    first, second, _ = sorted(folder.iterdir())
    flip(first)
    second.unlink()
    (run / "scores.json").unlink()
    driven([prepare(scored("run"))])
    assert scores(run) == whole
    assert (run / "rejected" / "features" / folder.name / first.name).exists()

    # The archive, and a folder of PNGs, give the same.
    assert ray_sampler.score(result.archive, str(tmp_path / "reference.npz"), **COMMON) == found
    assert scores(tmp_path / "run" / "samples_130x8x8x3.scores") == whole
    (tmp_path / "pngs").mkdir()
    for index, image in enumerate(expected(count=N).images):
        Image.fromarray(image).save(tmp_path / "pngs" / f"{index}.png")
    output = tmp_path / "elsewhere" / "png.json"
    ray_sampler.score(tmp_path / "pngs", str(tmp_path / "reference.npz"), output=output, **COMMON)
    assert output.read_bytes() == whole

    # The bundled extractor and reference serve every metric.
    every = {"metrics": "fid,is,kid,pr", "gpus_per_actor": 0.0, "max_actors": 1}
    of_digits = ray_sampler.score(run, "digits", output=tmp_path / "digits.json", **every)["metrics"]
    assert of_digits.keys() == {"fid", "is", "kid", "precision", "recall"}
    assert json.loads((tmp_path / "digits.json").read_text())["metrics"] == of_digits

    # An unfinished run is scored as far as it is.
    for name in ("fragments", f"features/{folder.name}"):
        (run / name / second.name).unlink()
    partly = ray_sampler.score(run, str(tmp_path / "reference.npz"), output=tmp_path / "partly", **COMMON)
    assert partly["num_samples"] == N - 50
    assert scores(run) == whole

    # And one that grows has a score of all.
    driven([prepare(scored("run", num_samples=N + 20))])
    assert json.loads(scores(run))["num_samples"] == N + 20


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"decoder": "none"}, "--score is .*, but --decoder none writes results of the solver"),
        ({"metrics": "fid,fd"}, "--metrics is 'fid,fd'; it must be some of fid, is, kid, pr"),
        ({"metrics": "is"}, "--metrics is needs the logits"),
        ({"metrics": "pr", "num_samples": 3}, "--metrics pr needs 4 samples, and there are 3"),
        ({"features": "vgg"}, "--features is 'vgg'; it must be one of inception, dinov2, digits, or python:"),
        ({"score": None}, "--features is 'python:toyfeatures:small', but nothing is scored; give --score"),
        ({"score": "missing.npz"}, "missing.npz"),
        ({"score": "moments.npz"}, "--metrics kid needs pictures or features of the reference"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_anything_is_written(
    scored: Request, tmp_path: Path, flags: dict[str, Any], said: str
) -> None:
    np.savez(tmp_path / "moments.npz", mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(RequestError, match=said):
        prepare(scored("run", **flags))
    assert not (tmp_path / "run").exists()


def test_an_output_that_takes_no_files_is_said_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", np.zeros((20, 8, 8, 3), np.uint8))
    (tmp_path / "file").touch()
    request = ["score", str(tmp_path / "a.npz"), "--reference"]
    assert main([*request, "digits", "--output", str(tmp_path / "file" / "scores")]) == 2
    assert main([*request, ""]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "a file is in the place of a folder; choose another output" in said[0]
    assert "--reference is missing" in said[1]
    assert not (tmp_path / "a.scores").exists()


def test_features_that_are_not_finite_cost_the_score_and_no_picture(scored: Request, tmp_path: Path) -> None:
    job = prepare(scored("run", features="python:toyfeatures:broken", num_samples=20, metrics="fid"))
    with pytest.raises(
        RunError, match="features that are not finite for 1 of the samples 0 to 19, the first of them 3"
    ):
        driven([job])
    assert (tmp_path / "run" / "samples_20x8x8x3.npz").exists()
    assert "scores" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_sfid_compares_spatial_features_with_the_statistics_of_a_reference(
    scored: Request, tmp_path: Path, monkeypatch, capsys
) -> None:
    toys = importlib.import_module("toyfeatures")
    extractor = Extractor("inception", "0" * 64, toys.Small(None), 6, "none", by_value=("toyfeatures",))
    spatial = replace(extractor, name="inception-spatial", network=toys.Colours(), dims=3)
    monkeypatch.setattr(module, "open_extractor", lambda options, shape: extractor)
    monkeypatch.setattr(module, "spatial_of", lambda extractor: spatial)
    pictures = np.random.default_rng(1).integers(0, 256, (40, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "pictures.npz", pictures)
    mu_s, sigma_s = np.full(3, 0.4), np.diag([0.1, 0.2, 0.3])
    np.savez(tmp_path / "virtual.npz", mu=np.zeros(6), sigma=np.eye(6), mu_s=mu_s, sigma_s=sigma_s)
    flags = ["--gpus_per_actor", "0", "--max_actors", "1", "--features", "inception", "--metrics"]
    assert main(["score", "pictures.npz", "--reference", "virtual.npz", *flags, "sfid"]) == 0
    found = json.loads(capsys.readouterr().out)
    means = pictures.mean((1, 2)) / 255
    wanted = frechet(Moments(means.mean(0), np.cov(means, rowvar=False)), Moments(mu_s, sigma_s))
    assert found["metrics"] == {"sfid": pytest.approx(wanted, rel=1e-5)}
    np.savez(tmp_path / "plain.npz", mu=np.zeros(6), sigma=np.eye(6))
    assert main(["score", "pictures.npz", "--reference", "plain.npz", *flags, "sfid"]) == 2
    assert "a reference with mu_s and sigma_s, and these are inception and plain.npz" in capsys.readouterr().err
