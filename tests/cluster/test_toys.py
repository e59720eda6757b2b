"""A solver and a family with their options, a finisher with a second network, and a condition that is not a label.

Each is registered in one place, as its author would do it; a whole job on Ray then survives a kill and resumes.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_sampler import planning
from ray_sampler.cluster.job import Job, prepare
from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from ray_sampler.networks.family import Family, NetworkSpec, Opened, Precision
from ray_sampler.networks.opening import FAMILIES
from ray_sampler.networks.weights import Checkpoint
from ray_sampler.options import of, option
from ray_sampler.sampling.conditions import Condition
from ray_sampler.sampling.finish import FINISHERS, Finisher, pixels
from ray_sampler.sampling.noise import Draws, Noise
from ray_sampler.sampling.options import DecoderOptions
from ray_sampler.sampling.parameterisation import Denoiser
from ray_sampler.sampling.solvers import SOLVERS, Solver
from ray_sampler.sampling.stepping import unused_options
from ray_sampler.storage.fragment import read_fragment
from ray_sampler.storage.record import Column
from tests.cluster.test_walls import driven, normals

pytestmark = pytest.mark.usefixtures("local_ray", "registered")

N, MORE, SHARD, SIZE = 12, 20, 8, 4


# A solver with an option.


@dataclass(frozen=True, kw_only=True)
class GrainOptions:
    grain: float = option(0.125, "How much of the noise stays.", recorded=False)

    def check(self) -> None:
        if not 0 <= self.grain <= 1:
            raise RequestError(f"--grain is {self.grain:g}; it must be from 0 to 1")


def grain(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, options: GrainOptions) -> Tensor:
    return denoise(x, sigmas[0]) + x / sigmas[0] * options.grain


# A family with an option: D is tanh of three numbers a sample, and a tint.


@dataclass(frozen=True, kw_only=True)
class TintOptions:
    tint: float = option(0.0, "What is added to every value.", recorded=False)


@dataclass(frozen=True)
class Painted:
    tint: float

    def identity(self) -> dict[str, Any]:
        return asdict(self)


class Painter(nn.Module):
    def __init__(self, tint: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.tint = tint

    def forward(self, x: Tensor, times: Tensor, y: Tensor) -> Tensor:
        return (torch.tanh(y * self.scale) + self.tint)[:, :, None, None].expand_as(x)


def open_painter(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    tint = of(TintOptions, settings).tint
    spec = NetworkSpec(
        "painter", Painted(tint), (3, SIZE, SIZE), "denoiser", flags={"tint": tint}, condition="directions"
    )
    return Opened(spec, dict(checkpoint.tensors))


def build_painter(spec: NetworkSpec, precision: Precision) -> nn.Module:
    return Painter(spec.options.tint)


# A condition that is not a label: three numbers a sample, of the seed and the index.


@dataclass(frozen=True)
class Directions:
    seed: int
    num_classes = 0

    def at(self, draws: Draws, indices: Tensor, device: torch.device | None = None) -> Tensor:
        return torch.stack([torch.cos(indices * (k + 1.0) + self.seed) for k in range(3)], dim=1).to(device)

    def null(self, y: Tensor) -> Tensor:
        return torch.zeros_like(y)

    def columns(self) -> dict[str, Column]:
        return {"direction": Column("float32", (3,))}

    def stored(self, y: Tensor) -> dict[str, Tensor]:
        return {"direction": y}

    def identity(self) -> dict[str, Any]:
        return {"directions": "cosines"}


def directions(config: RunConfig, spec: NetworkSpec) -> Condition:
    return Directions(config.seed)


# A finisher that uses a second network, and stores its answer beside the images. It kills its first actor.


class Judge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(dim=1, keepdim=True) * self.weight


def open_judge(checkpoint: Checkpoint, settings: Mapping[str, Any], given: frozenset[str]) -> Opened:
    return Opened(NetworkSpec("judge", Painted(0.0), (3, SIZE, SIZE), "denoiser"), dict(checkpoint.tensors))


def judged(options: DecoderOptions) -> Finisher:
    rounded, killed = pixels(options.rounding), Path("killed").absolute()

    def finish(x: Tensor, networks: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {**rounded.finish(x, networks), "score": networks["judge"](x)}

    def columns(shape: tuple[int, int, int]) -> dict[str, Column]:
        return {**rounded.columns(shape), "score": Column("float32", (1,))}

    return Finisher(finish, columns, {"decoder": "judged"}, {"judge": "judge.safetensors"})


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each in its one place."""
    monkeypatch.chdir(tmp_path)
    save_file({"scale": torch.tensor([0.5, 1.0, 2.0])}, "painter.safetensors")
    save_file({"weight": torch.tensor([3.0])}, "judge.safetensors")
    painter = Family("painter", lambda checkpoint: "scale" in checkpoint.tensors, open_painter, build_painter)
    judge = Family("judge", lambda checkpoint: "weight" in checkpoint.tensors, open_judge, lambda spec, p: Judge())
    monkeypatch.setitem(FAMILIES, "painter", painter)
    monkeypatch.setitem(FAMILIES, "judge", judge)
    monkeypatch.setitem(SOLVERS, "grain", Solver(grain, lambda steps, options: 1, GrainOptions))
    monkeypatch.setitem(FINISHERS, "judged", judged)
    monkeypatch.setitem(planning.CONDITIONS, "directions", directions)


@dataclass(frozen=True, kw_only=True, repr=False)
class Request(RunConfig, GrainOptions, TintOptions):
    """A request that has the new options too."""


def job(count: int, **flags: Any) -> Job:
    settings: dict[str, Any] = {"model": "painter.safetensors", "sampler": "grain", "decoder": "judged"}
    settings |= {"batch_size": 4, "shard_size": SHARD, "gpus_per_actor": 0.0, "max_actors": 1}
    return prepare(Request(output="run", num_samples=count, tint=0.25, clip_denoised=False, **settings | flags))


def expected(count: int, grain: float) -> dict[str, np.ndarray]:
    """The columns of the run, in numpy."""
    index = np.arange(count, dtype=np.float32)
    direction = np.stack([np.cos(index * np.float32(k + 1) + np.float32(42)) for k in range(3)], axis=1)
    colour = np.tanh(direction * np.array([0.5, 1, 2], np.float32)) + 0.25
    x = colour[:, :, None, None] + np.stack([normals(42, i, 0) for i in range(count)])[:, :, :SIZE, :SIZE] * grain
    return {"direction": direction, "score": 3 * x.reshape(count, -1).mean(axis=1, keepdims=True), "x": x}


def check(archive: str, count: int, grain: float) -> None:
    wanted = expected(count, grain)
    files = sorted(Path("run/fragments").iterdir())
    for name in ("direction", "score"):
        found = np.concatenate([read_fragment(path).samples.columns[name] for path in files])
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-5)
    with np.load(archive) as arrays:
        assert arrays.files == ["arr_0"]
        levels = np.abs((wanted["x"].clip(-1, 1).transpose(0, 2, 3, 1) + 1) * 127.5 - arrays["arr_0"])
        assert levels.max() < 1.01  # truncated


def test_toys_of_every_kind_survive_a_kill_and_resume(tmp_path: Path):
    begun = job(N, grain=0.25)
    assert begun.identity.items() >= {
        "family": "painter", "tint": 0.25, "sampler": "grain", "grain": 0.25, "decoder": "judged",
        "directions": "cosines", "judge": begun.identity["judge"],
    }.items()  # fmt: skip
    (result,) = driven([begun])
    assert Path("killed").exists()
    check(result.archive, N, 0.25)

    # A fragment is lost, and the run grows; the rest stays.
    first, second = sorted(Path("run/fragments").iterdir())
    first.unlink()
    kept = second.stat().st_mtime_ns
    (result,) = driven([job(MORE, grain=0.25)])
    check(result.archive, MORE, 0.25)
    assert second.stat().st_mtime_ns == kept


def test_the_options_of_toys_are_checked_and_decide_the_run():
    assert job(N, grain=0.25).fingerprint != job(N, grain=0.5).fingerprint
    with pytest.raises(RequestError, match="--grain is 2; it must be from 0 to 1"):
        job(N, grain=2.0)
    assert job(N, grain=0.25, sampler="heun").fingerprint == job(N, sampler="heun").fingerprint
    assert unused_options("heun", {"grain": 0.25}) == "--grain 0.25: --sampler heun does not use this"
