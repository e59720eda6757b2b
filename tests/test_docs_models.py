"""The networks and commands of docs/models.md run as they are printed there."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_sampler import cli
from ray_sampler.cluster.job import prepare, tried
from ray_sampler.commands import request_of
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks import custom
from ray_sampler.sampling.noise import philox_normals
from ray_sampler.sampling.plan import sample_block
from tests.loading import loaded

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
MODULES = {
    name: f"# {name}.py\n{text}" for name, text in re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
}
NAMES = ("my_edm", "my_eps", "my_flow", "my_selfcond", "my_steps", "my_v", "my_variance")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's modules in the current directory, each beside weights of its network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(MODULES[name])
        state = importlib.import_module(name).Network().state_dict()
        torch.save({"ema": state} if name == "my_edm" else state, tmp_path / f"{name}.pt")
    return tmp_path


def test_the_page_has_these_networks() -> None:
    assert {*MODULES} == {*NAMES, "my_unet"}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "shape", "flags"),
    [
        ("my_edm", (3, 32, 32), {}),
        ("my_eps", (3, 32, 32), {"guidance": 1.5}),
        ("my_flow", (4, 32, 32), {"decoder": "none"}),
        ("my_selfcond", (3, 32, 32), {}),
        ("my_steps", (3, 32, 32), {"sampler": "ancestral"}),
        ("my_v", (3, 32, 32), {}),
        ("my_variance", (3, 32, 32), {}),
    ],
)
def test_a_network_of_the_page_is_sampled(name: str, shape: tuple[int, ...], flags: dict[str, Any]) -> None:
    config = RunConfig(model=f"python:{name}:load", weights=f"{name}.pt", steps=3, gpus_per_actor=0.0, **flags)
    job = prepare(config)
    with torch.inference_mode():
        x, labels = sample_block({"main": job.networks["main"].build("fp32")}, job.plan, torch.arange(2))
    assert x.shape == (2, *shape)
    assert x.isfinite().all()
    assert (labels is not None) == (name == "my_eps")


@pytest.mark.usefixtures("files")
def test_the_flow_of_the_page_needs_a_decoder_or_none() -> None:
    with pytest.raises(RequestError, match="--decoder none"):
        prepare(RunConfig(model="python:my_flow:load", weights="my_flow.pt", gpus_per_actor=0.0))


def ddim(x: Tensor, noise: Tensor, to: float, of: float, given: Tensor | None) -> Tensor:
    """One step from the cumulative alpha `of` to `to`, as Song et al. 2021 and, with noise, Ho et al. 2020 have it."""
    data = (x - (1 - of) ** 0.5 * noise) / of**0.5
    if given is None:
        return to**0.5 * data + (1 - to) ** 0.5 * noise
    beta = 1 - of / to
    mean = to**0.5 * beta / (1 - of) * data + (of / to) ** 0.5 * (1 - to) / (1 - of) * x
    return mean + (beta * (1 - to) / (1 - of)) ** 0.5 * given


@pytest.mark.parametrize("sampler", ["euler", "ancestral"])
def test_ddim_and_ddpm_are_our_solvers_on_the_tables_levels(sampler: str, files: Path) -> None:
    steps: Any = importlib.import_module("my_steps")
    places = list(range(999, -1, -200))
    (files / "levels.txt").write_text("\n".join(str(steps.LEVELS[place].item()) for place in places))
    flags: dict[str, Any] = {"sampler": sampler, "sigmas": "levels.txt", "gpus_per_actor": 0.0}
    job = prepare(RunConfig(model="python:my_steps:load", weights="my_steps.pt", **flags))
    network = job.networks["main"].build("fp32")
    alphas = [*(steps.ALPHAS[place].item() for place in places), 1.0]
    with torch.inference_mode():
        sampled = sample_block({"main": network}, job.plan, torch.arange(2))[0]
        x = philox_normals(42, torch.arange(2), 0, (3, 32, 32)).double() * (1 - alphas[0]) ** 0.5
        for i, place in enumerate(places):
            noise = network(x.float(), torch.full((2,), float(place))).double()
            given = philox_normals(42, torch.arange(2), 1 + i, (3, 32, 32)).double() if sampler == "ancestral" else None
            x = ddim(x, noise, alphas[i + 1], alphas[i], given)
    torch.testing.assert_close(sampled.double(), x, rtol=1e-3, atol=1e-3)


def test_a_network_of_diffusers_is_sampled(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through its from_pretrained, which here replaces the package's: it returns an object with a sample."""

    class UNet2DModel(torch.nn.Module):
        config = SimpleNamespace(sample_size=8, in_channels=3)

        @classmethod
        def from_pretrained(cls, folder: str) -> UNet2DModel:
            assert folder == "unet"
            return cls()

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return SimpleNamespace(sample=0.1 * x)

    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(UNet2DModel=UNet2DModel))
    (files / "my_unet.py").write_text(MODULES["my_unet"])
    (files / "unet").mkdir()
    job = prepare(RunConfig(model="python:my_unet:load", weights="unet", gpus_per_actor=0.0, steps=2))
    assert tried(job) == []


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small weights that the page makes."""
    folder = tmp_path_factory.mktemp("transformers")
    (block,) = re.findall(r"```python\n(# tiny\.py\n.*?)```", PAGE, re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(block, "tiny.py", "exec"), {})
    return folder


OF_TINY = re.findall(r"^ray-sampler (?:sample|inspect) .* --num-heads 3\b.*$", PAGE, re.MULTILINE)


def test_the_page_has_a_command_for_each_transformer() -> None:
    assert len(OF_TINY) == 6
    assert {name for name in ("dit.pt", "sit.pt", "repa.pt") if any(name in line for line in OF_TINY)} == {
        "dit.pt",
        "sit.pt",
        "repa.pt",
    }


@pytest.mark.parametrize("line", OF_TINY)
def test_a_command_for_a_transformer_of_the_page_samples_it(
    line: str, transformers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(transformers)
    arguments = line.split()[1:]
    if arguments[0] == "inspect":
        assert cli.main(arguments) == 0
        assert "dit" in capsys.readouterr().out
        return
    job = prepare(replace(request_of(cli.parse(arguments)[1]), gpus_per_actor=0.0, precision="fp32"))
    networks = {role: loaded(network) for role, network in job.networks.items()}
    with torch.inference_mode():
        x, labels = sample_block(networks, job.plan, torch.arange(2))
    assert x.shape == (2, 4, 8, 8)
    assert x.isfinite().all()
    assert labels is not None


def test_the_page_names_every_kind_and_every_argument() -> None:
    for kind in ("denoiser", "edm", "consistency", "eps", "v", "x0", "velocity"):
        assert f'| `"{kind}"` |' in PAGE
    (block,) = re.findall(r"```python\nModel\((.*?)\n\)", PAGE, re.DOTALL)
    assert re.findall(r"^    \*{0,2}(\w+)", block, re.MULTILINE) == list(
        custom.Model.__init__.__code__.co_varnames[1:10]
    )
