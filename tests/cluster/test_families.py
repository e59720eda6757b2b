"""Published samplers' numbers come out of whole requests: through the plan in this process, and through fleets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RunConfig
from ray_sampler.sampling.plan import sample_block
from ray_sampler.storage.fragment import read_fragment
from tests.cluster.runs import fragments
from tests.cluster.small_models import dhariwal_snapshot
from tests.loading import loaded

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "golden" / "reference"

CHURN = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 8},
    "guided": {"steps": 8, "guidance": 1.7},
    "churn": {"steps": 8} | CHURN,
    "guided_churn": {"steps": 6, "guidance": 2.2, "s_churn": 4.0},
    "rho5": {"steps": 5, "rho": 5.0, "sigma_min": 0.01, "sigma_max": 60.0},
}
"""As about.json beside the numbers says."""

SHOWN = [(name, case) for name in ("edm2_16", "edm2_half16") for case in CASES] + [
    (name, case) for name in ("edm_ddpmpp16", "edm_ncsnpp8") for case in ("plain", "churn")
]


def request(name: str, case: str, **flags: Any) -> RunConfig:
    """The request whose samples 0, 1, 5 and 12345 are the shown ones."""
    settings: dict[str, Any] = {
        "generator": "edm",
        "seed": 0,
        "num_samples": 20_000,
        "gpus_per_actor": 0.0,
        "precision": "fp32",
    }
    settings |= {"model": str(REFERENCE / name / "net.pkl")} | CASES[case]
    if "guidance" in settings:
        settings["guide"] = str(REFERENCE / name / "gnet.pkl")
    return RunConfig(**(settings | flags))


def numbers(name: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCE / name / "samples.npz") as arrays:
        return dict(arrays)


def assert_same_pictures(images: np.ndarray, expected: np.ndarray) -> None:
    """Within one level, and equal in 99% of the pixels."""
    levels = np.abs(images.astype(int) - expected)
    assert levels.max() <= 1
    assert (levels == 0).mean() >= 0.99


# In this process: seeds far apart, results before they become pictures.


@pytest.mark.parametrize(("name", "case"), SHOWN)
def test_the_plan_of_a_request_gives_the_published_numbers(name: str, case: str) -> None:
    job = prepare(request(name, case))
    expected = numbers(name)
    networks = {role: loaded(network) for role, network in job.networks.items()}
    with torch.inference_mode():
        x, labels = sample_block(networks, job.plan, torch.from_numpy(expected["seeds"]))
        images = job.plan.finisher.finish(x, networks)["image"].numpy()
    wanted = expected[f"x0/{case}"]  # random weights under guidance: values reach 40, whose last bit is 4e-6
    np.testing.assert_allclose(x.numpy(), wanted, rtol=1e-5, atol=1e-4)
    assert_same_pictures(images, expected[f"uint8/{case}"])
    if "labels" in expected:
        assert labels is not None
        np.testing.assert_array_equal(labels.numpy(), expected["labels"])
    else:
        assert labels is None


def test_the_adm_network_of_edm_gives_what_its_definition_gives_in_float64(tmp_path: Path) -> None:
    """Given c_noise of EDM, the generator's draws, and for guidance the null label, a row of zeros."""
    path, definition = dhariwal_snapshot(tmp_path / "net.pkl")
    flags: dict[str, Any] = {"generator": "edm", "seed": 3, "num_samples": 4, "gpus_per_actor": 0.0}
    job = prepare(RunConfig(model=str(path), steps=4, guidance=1.5, precision="fp32", **flags))
    with torch.inference_mode():
        found, labels = sample_block({"main": loaded(job.networks["main"])}, job.plan, torch.arange(3))
    streams = [torch.Generator().manual_seed(3 + i) for i in range(3)]
    x = torch.stack([torch.randn(3, 16, 16, generator=g) for g in streams]).double()
    y = torch.cat([torch.randint(5, (1,), generator=g) for g in streams])
    assert labels is not None
    assert labels.tolist() == y.tolist()

    def denoised(x: torch.Tensor, sigma: float, y: torch.Tensor) -> torch.Tensor:
        total = sigma**2 + 0.25
        output = definition(x / total**0.5, torch.full((len(x),), np.log(sigma) / 4, dtype=torch.float64), y)
        return 0.25 / total * x + sigma * 0.5 / total**0.5 * output

    def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
        alone, null = denoised(x, sigma, y), denoised(x, sigma, torch.full_like(y, 5))
        return (x - (null + 1.5 * (alone - null))) / sigma

    levels = [(80 ** (1 / 7) + i / 3 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)] + [0.0]
    x = x * levels[0]
    with torch.inference_mode():
        for now, then in pairwise(levels):
            d = slope(x, now)
            euler = x + (then - now) * d
            x = x + (then - now) * (d + slope(euler, then)) / 2 if then else euler
    assert x.abs().max() > 0.1
    assert (found - x).abs().max() < 1e-4


# Through fleets: the samples 0, 1 and 5 of a short run are the first three of the shown ones.

HERE = slice(0, 3)
SHORT: dict[str, Any] = {"num_samples": 9, "max_actors": 2, "min_actors": 2, "progress": "log"}


def archive(path: str | Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


def shown(name: str, key: str) -> np.ndarray:
    expected = numbers(name)
    assert expected["seeds"][HERE].tolist() == [0, 1, 5]
    return expected[key][HERE]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("name", "case", "batch_size", "shard_size"),
    [
        ("edm2_16", "guided_churn", 2, 4),
        ("edm_ncsnpp8", "plain", 1, 5),
    ],
)
def test_two_actors_write_the_published_pictures(
    name: str, case: str, batch_size: int, shard_size: int, tmp_path: Path
) -> None:
    config = request(name, case, output=str(tmp_path), batch_size=batch_size, shard_size=shard_size, **SHORT)
    arrays = archive(run(config).archive)
    assert_same_pictures(arrays["arr_0"][[0, 1, 5]], shown(name, f"uint8/{case}"))
    labelled = "labels" in numbers(name)
    assert set(arrays) == ({"arr_0", "arr_1"} if labelled else {"arr_0"})
    if labelled:
        np.testing.assert_array_equal(arrays["arr_1"][[0, 1, 5]], shown(name, "labels"))


@pytest.mark.accidents
def test_the_job_script_writes_the_published_pictures(tmp_path: Path) -> None:
    """With a separate Ray, guided, from another folder."""
    folder = REFERENCE / "edm2_16"
    command = [sys.executable, str(ROOT / "jobs" / "sample.py"), "--model", str(folder / "net.pkl")]
    command += ["--guide", str(folder / "gnet.pkl"), "--guidance", "1.7", "--generator", "edm", "--seed", "0"]
    command += ["--num_samples", "6", "--batch_size", "2", "--shard_size", "2", "--max_actors", "2", "--steps", "8"]
    command += ["--precision", "fp32", "--output", "run"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    arrays = archive(tmp_path / "run" / "samples_6x16x16x3.npz")
    assert_same_pictures(arrays["arr_0"][[0, 1, 5]], shown("edm2_16", "uint8/guided"))
    np.testing.assert_array_equal(arrays["arr_1"][[0, 1, 5]], shown("edm2_16", "labels"))


@pytest.mark.usefixtures("local_ray")
def test_results_as_they_are_go_through_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float32 in fragments and archive; a stopped run continues; status, verify, merge and preview take it."""
    from ray_sampler.cli import main

    output = tmp_path / "run"
    config = request(
        "edm2_16",
        "plain",
        output=str(output),
        decoder="none",
        fragment_format="npz",
        shard_size=2,
        batch_size=2,
        **SHORT | {"max_actors": 1, "min_actors": 1},
    )
    result = run(config)
    arrays = archive(result.archive)
    assert Path(result.archive).name == "samples_9x16x16x3.npz"
    assert arrays["arr_0"].dtype == np.float32
    assert arrays["arr_0"].shape == (9, 16, 16, 3)
    expected = shown("edm2_16", "x0/plain").transpose(0, 2, 3, 1)
    assert np.abs(arrays["arr_0"][[0, 1, 5]] - expected).max() < 1e-4
    before = Path(result.archive).read_bytes()

    names = fragments(output)
    fragment = read_fragment(str(output / "fragments" / names[0]))
    assert fragment.samples.images.dtype == np.float32
    np.testing.assert_array_equal(fragment.samples.images, arrays["arr_0"][:2])

    lost = output / "fragments" / names[1]
    lost.write_bytes(lost.read_bytes()[:-10])
    (output / "fragments" / names[2]).unlink()
    Path(result.archive).unlink()
    assert main(["status", str(output), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["finished"] == 7
    assert main(["verify", str(output)]) == 1
    assert "rejected" in capsys.readouterr().out
    assert main(["merge", str(output)]) == 1
    assert "4 of 9 samples are missing" in capsys.readouterr().err
    assert Path(run(config).archive).read_bytes() == before

    Path(result.archive).unlink()
    (output / "preview.png").unlink()
    assert main(["verify", str(output)]) == 0
    assert main(["merge", str(output)]) == 0
    assert main(["preview", str(output)]) == 0
    assert Path(result.archive).read_bytes() == before
    assert (output / "preview.png").read_bytes()[:4] == b"\x89PNG"
