"""What is right, and perhaps not what was meant, is said in one line."""

from __future__ import annotations

from typing import Any

import pytest

from ray_sampler import RunConfig
from ray_sampler.cluster.job import prepare
from ray_sampler.planning import advice


def lines(**flags: Any) -> list[str]:
    return list(advice(prepare(RunConfig(num_samples=8, **flags)).plan))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"sampler": "onestep"}, "--sampler onestep"),
        ({"model": "digits-cd", "sampler": "heun", "steps": 5}, "--sampler heun"),
        ({"sampler": "heun", "steps": 5, "s_churn": 3.0, "s_tmin": 100.0}, "--s_tmin 100"),
        ({"guidance": 2.0, "guidance_interval": "100,200"}, "--guidance_interval 100,200"),
        (
            {"model": "digits-latent", "sampler": "flow_euler", "steps": 4, "guidance": 2, "guidance_interval": "2,3"},
            "--guidance_interval 2,3",
        ),
    ],
)
def test_a_setting_without_effect_is_named(flags: dict[str, Any], named: str):
    (line,) = lines(**flags)
    assert line.startswith(named)


@pytest.mark.parametrize("flag", ["sigma_max", "sigma_min"])
def test_a_level_beyond_the_networks_table_is_named(flag: str, tmp_path, monkeypatch):
    (tmp_path / "table.py").write_text(
        "import torch\nfrom ray_sampler import Model\n\n\n"
        "def eps(weights):\n    return Model(torch.nn.Conv2d(3, 3, 1), 'eps', shape=(3, 8, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = "python:table:eps"
    assert lines(model=model, sampler="heun", steps=4) == []
    (line,) = lines(model=model, sampler="heun", steps=4, **{flag: {"sigma_max": 1e4, "sigma_min": 1e-5}[flag]})
    assert line.startswith(f"--{flag} ")


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"model": "digits-cd"},
        {"model": "digits-cd", "sampler": "onestep"},
        {"model": "digits-latent", "guidance": 2.0},
        {"sampler": "heun", "steps": 5, "s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0},
        {"model": "digits-latent", "sampler": "flow_sde", "steps": 4, "guidance": 2.0, "guidance_interval": "0,0.7"},
    ],
)
def test_what_has_an_effect_is_passed_over(flags: dict[str, Any]):
    assert lines(**flags) == []
