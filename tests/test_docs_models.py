"""The networks and commands of docs/models.md run as they are printed there."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks import custom
from ray_sampler.sampling.plan import sample_block

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
MODULES = {
    name: f"# {name}.py\n{text}" for name, text in re.findall(r"```python\n# (my_\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
}
NAMES = ("my_edm", "my_eps", "my_flow")


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


def test_the_page_has_three_networks() -> None:
    assert tuple(MODULES) == NAMES


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("name", "shape", "flags"),
    [
        ("my_edm", (3, 32, 32), {}),
        ("my_eps", (3, 32, 32), {"guidance": 1.5}),
        ("my_flow", (4, 32, 32), {"decoder": "none"}),
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


def test_the_page_names_every_kind_and_every_argument() -> None:
    for kind in ("denoiser", "edm", "consistency", "eps", "v", "x0", "velocity"):
        assert f'| `"{kind}"` |' in PAGE
    (block,) = re.findall(r"```python\nModel\((.*?)\n\)", PAGE, re.DOTALL)
    assert re.findall(r"^    \*{0,2}(\w+)", block, re.MULTILINE) == list(
        custom.Model.__init__.__code__.co_varnames[1:10]
    )
