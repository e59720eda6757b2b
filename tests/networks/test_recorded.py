"""Flags beside a snapshot of NVIDIA's: one that repeats the file is accepted, another is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ray_sampler.errors import RequestError
from ray_sampler.networks.opening import open_network
from tests.networks.reference import FOLDER

TOLD: dict[str, dict[str, Any]] = {
    "edm_ddpmpp16": {"num_channels": 16, "channel_mult": "1,2", "attention_resolutions": "32,8"},
    "edm2_16": {"num_channels": 32, "channel_mult": "1.0,2", "attention_resolutions": "8"},
}


def opened(name: str, flags: dict[str, Any]) -> None:
    open_network(str(FOLDER / name / "net.pkl"), flags, frozenset(flags))


@pytest.mark.parametrize("name", TOLD)
def test_what_the_file_determines_may_be_repeated(name: str) -> None:
    opened(name, TOLD[name] | {"training_mode": "edm"})
    opened(name, {"channel_mult": ""})


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("num_channels", 24, "{num_channels}"),
        ("channel_mult", "1,2,2", "1,2"),
        ("channel_mult", "2,2", "1,2"),
        ("attention_resolutions", "16,8", "8"),
        ("attention_resolutions", "", "8"),
        ("training_mode", "consistency_training", "edm"),
    ],
)
def test_what_contradicts_it_is_refused_with_both_values(name: str, flag: str, value: Any, told: str) -> None:
    with pytest.raises(RequestError) as error:
        opened(name, {flag: value})
    told = told.format(**TOLD[name])
    given = value or "empty"
    assert str(error.value) == f"--{flag} is {given}, but the file says {told}; leave it out or give another --model"


def test_a_list_that_is_none_is_refused() -> None:
    with pytest.raises(RequestError, match="--channel_mult is 'a'; it must be positive numbers with commas"):
        opened("edm2_16", {"channel_mult": "a"})
