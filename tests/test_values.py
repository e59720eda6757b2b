"""Requests from Python: what has one meaning is taken as the command line would have it, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler import RequestError, RunConfig, read_fragment, run
from ray_sampler.options import flags_of
from ray_sampler.resolve import check


@pytest.mark.parametrize(
    ("name", "value", "same"),
    [
        ("num_samples", 5e4, 50000),
        ("num_samples", np.int64(7), 7),
        ("num_samples", np.float32(8), 8),
        ("num_samples", torch.tensor(9), 9),
        ("steps", np.array(18), 18),
        ("sigma_max", 80, 80.0),
        ("rho", np.float64(7), 7.0),
        ("gpus_per_actor", 0, 0.0),
        ("overwrite", np.bool_(True), True),
        ("overwrite", 0, False),
        ("output", Path("runs/a"), "runs/a"),
        ("model", Path("a.pt"), "a.pt"),
        ("labels", [1, 2, 3], "1,2,3"),
        ("labels", (4,), "4"),
        ("labels", range(3), "0,1,2"),
        ("labels", np.array([3.0, 1.0]), "3,1"),
        ("labels", torch.tensor([5, 6]), "5,6"),
        ("ts", [0, 9, 17], "0,9,17"),
        ("labels", "balanced", "balanced"),
    ],
)
def test_a_value_with_one_meaning_is_taken(name: str, value: Any, same: Any):
    config = RunConfig(**{name: value})
    taken = getattr(config, name)
    assert taken == same
    assert type(taken) is type(same)
    assert config == RunConfig(**{name: same})
    assert hash(config) == hash(RunConfig(**{name: same}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_samples", 5.5),
        ("num_samples", float("inf")),
        ("num_samples", float("nan")),
        ("num_samples", "5"),
        ("num_samples", np.arange(3)),
        ("num_samples", [3]),
        ("num_samples", 10**400),
        ("rho", 10**400),
        ("seed", 10**400),
        ("seed", True),
        ("seed", object()),
        ("rho", 1j),
        ("rho", "7"),
        ("overwrite", "no"),
        ("overwrite", 2),
        ("output", 3),
        ("output", b"runs"),
        ("model", ["a.pt"]),
        ("sampler", 3),
        ("labels", 3),
        ("labels", []),
        ("labels", ["cat"]),
        ("labels", {1, 2}),
        ("labels", np.zeros((2, 2), int)),
        ("labels", [True, False]),
    ],
)
def test_another_value_is_a_wrong_request_and_nothing_is_written(name: str, value: Any, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=f"--{name} is "):
        run(RunConfig(**{"output": "run", name: value}))
    assert not list(tmp_path.iterdir())


def test_a_fragment_is_named_by_text_or_a_path():
    with pytest.raises(RequestError, match="not a fragment's name"):
        read_fragment(Path("a/b.parquet"))
    with pytest.raises(RequestError, match="cannot name a fragment"):
        read_fragment(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", flags_of(RunConfig))
def test_none_is_what_a_request_says_that_does_not_name_the_setting(name: str):
    unsaid: dict[str, Any] = {name: None}
    assert RunConfig(**unsaid) == RunConfig()


@pytest.mark.parametrize("flag", ["output", "model", "labels", "latents", "address", "weights", "decoder"])
def test_an_empty_value_is_refused(flag: str) -> None:
    """As of a shell's variable that was not set: it must not be taken for a flag that was not given."""
    values: dict[str, Any] = {flag: ""}
    with pytest.raises(RequestError, match=f"^--{flag} is empty"):
        check(RunConfig(**values))
