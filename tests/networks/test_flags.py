"""Flags of a network, for every family: one that repeats what is told is accepted, all others are refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from ray_sampler.inspection import inspect
from ray_sampler.networks.families import ARCHITECTURE, INERT
from ray_sampler.networks.opening import open_network
from tests.cluster.runs import random_weights
from tests.networks.reference import FOLDER, saved
from tests.test_inspect import ADM, MAKERS

WRONG: dict[str, Any] = {
    "image_size": 48,
    "num_channels": 7,
    "num_res_blocks": 7,
    "num_heads": 7,
    "num_heads_upsample": 7,
    "num_head_channels": 7,
    "attention_resolutions": "64,32,16,8,4,2",
    "channel_mult": "3,1,9",
    "class_cond": None,
    "num_classes": 7,
    "label_dropout": 0.3,
    "use_scale_shift_norm": None,
    "resblock_updown": None,
    "learn_sigma": True,
    "training_mode": "consistency_training",
    "prediction": "velocity",
    "data_at": 1,
}
"""Values that no network here has; None: the opposite of what it has."""

TOLD: dict[str, dict[str, Any]] = {
    "edm, DDPM++": {
        **{"image_size": 16, "num_channels": 16, "channel_mult": "1,2", "attention_resolutions": "32,8"},
        **{"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": 32, "class_cond": True},
        **{"use_scale_shift_norm": False, "resblock_updown": True, "learn_sigma": False, "training_mode": "edm"},
        **{"label_dropout": 0.0},
    },
    "edm, ADM": {
        **{"num_head_channels": 64, "num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": True},
        **{"training_mode": "progdist", "class_cond": True},
    },
    "edm2": {
        **{"image_size": 16, "num_channels": 32, "channel_mult": "1.0,2", "attention_resolutions": "8"},
        **{"num_head_channels": 32, "resblock_updown": True, "learn_sigma": False, "class_cond": True},
    },
    "python": {"image_size": 8, "class_cond": True, "num_classes": 6},
}


def describing(model: str, **flags: Any) -> dict[str, Any]:
    return inspect(RunConfig(model=model, **flags))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Writes a model of a family, once, and gives its name."""
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield cache(lambda name: MAKERS[name](folder))


@pytest.mark.parametrize("name", TOLD)
def test_what_is_told_may_be_repeated_and_what_only_training_had_may_be_given(name: str, made: Any) -> None:
    model = made(name)
    plain = describing(model)
    inert = {"use_checkpoint": True, "use_new_attention_order": True, "weight_schedule": "uniform", "dropout": 0.3}
    assert {*inert} == {*INERT, "dropout"}
    found = describing(model, **TOLD[name], **inert)
    assert {key: found[key] for key in found if key != "command"} == {
        key: plain[key] for key in plain if key != "command"
    }


DECIDING = [name for name in ARCHITECTURE if name != "dropout"]


@pytest.mark.parametrize(
    ("name", "flag"),
    [(name, flag) for name in ("edm, DDPM++", "edm2", "python") for flag in DECIDING]
    + [("edm, ADM", flag) for flag in ("num_channels", "num_heads", "num_head_channels", "learn_sigma")],
)
def test_every_contradicting_flag_is_refused(name: str, flag: str, made: Any) -> None:
    model, wrong = made(name), WRONG[flag]
    if wrong is None:
        wrong = not TOLD[name].get(flag, False)
    with pytest.raises(RequestError, match=rf"^--{flag} is {wrong}, .*leave it out") as error:
        describing(model, **{flag: wrong})
    assert ("the file says" in str(error.value)) != ("cannot use" in str(error.value))


@pytest.mark.parametrize("flag", ["num_classes", "label_dropout"])
def test_an_unconditional_adm_network_has_no_classes(flag: str, tmp_path: Path) -> None:
    weights = {name: t for name, t in random_weights().items() if name != "label_emb.weight"}
    torch.save(weights, tmp_path / "adm.pt")
    describing(str(tmp_path / "adm.pt"), **ADM, label_dropout=0.0)
    with pytest.raises(RequestError, match=rf"^--{flag} is .*, which this network cannot use"):
        describing(str(tmp_path / "adm.pt"), **ADM, **{flag: WRONG[flag]})


@pytest.mark.parametrize("flag", ["image_size", "num_head_channels", "training_mode"])
def test_a_bundled_model_determines_everything(flag: str) -> None:
    with pytest.raises(RequestError, match=rf"^--{flag} is .*, but the bundled model digits has "):
        describing("digits", **{flag: WRONG[flag]})


def test_a_bundled_model_has_one_set_of_weights() -> None:
    with pytest.raises(RequestError, match=r"^--weights_key is 'ema', but the bundled model digits has one set"):
        describing("digits", weights_key="ema")


def test_an_unconditional_network_has_0_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from ray_sampler import Model\nfrom torch import nn\n\n\nclass Network(nn.Module):\n"
    source += "    def forward(self, x, t):\n        return x\n\n\ndef load(weights):\n"
    (tmp_path / "unlabelled.py").write_text(f"{source}    return Model(Network(), 'eps', (3, 8, 8))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert describing("python:unlabelled:load", num_classes=0)["num_classes"] == 0
    with pytest.raises(RequestError, match=r"^--num_classes is 7, which this network cannot use"):
        describing("python:unlabelled:load", num_classes=7)


@pytest.mark.parametrize("name", ["digits", "adm", "edm, DDPM++", "edm2"])
@pytest.mark.parametrize(("flag", "value"), [("weights", "mine.pt"), ("tag", "v2")])
def test_what_is_passed_to_a_function_is_refused_beside_a_file(name: str, flag: str, value: str, made: Any) -> None:
    with pytest.raises(RequestError) as error:
        describing(made(name), **{flag: value})
    assert str(error.value) == (
        f"--{flag} is {value}, which only a function, --model python:module:function, can use; leave it out"
    )


def test_of_a_users_network_the_weights_must_be_there_and_have_no_key(made: Any, tmp_path: Path) -> None:
    model = made("python")
    (tmp_path / "mine.pt").write_bytes(b"")
    describing(model, weights=str(tmp_path / "mine.pt"), tag="v2")
    describing(model, weights="s3://bucket/mine.pt")  # the function's own affair
    with pytest.raises(RequestError, match=r"^--weights is gone\.pt; there is no such file"):
        describing(model, weights="gone.pt")
    with pytest.raises(RequestError, match=r"^--weights_key is ema, which this network cannot use; leave it out"):
        describing(model, weights_key="ema")


# Heads of EDM2's networks, which a state dict does not determine.


@pytest.fixture
def state_dict(tmp_path: Path) -> str:
    """Of a network whose attention has 64 channels, in heads of 32."""
    torch.save(saved("edm2_16").tensors, tmp_path / "edm2.pt")
    return str(tmp_path / "edm2.pt")


def test_heads_are_assumed_with_a_note_or_taken_from_the_flag(state_dict: str) -> None:
    assumed = open_network(state_dict, {})
    assert assumed.spec.options.network.channels_per_head == 64
    assert (assumed.note or "").startswith("--num_head_channels 64 is assumed, as in all published networks")
    given = open_network(state_dict, {"num_head_channels": 32}, frozenset(["num_head_channels"]))
    recorded = open_network(str(FOLDER / "edm2_16" / "net.pkl"), {})
    assert given.note is None
    assert given.spec.identity("") == recorded.spec.identity("")
    assert given.weights == recorded.weights


def test_fewer_channels_than_a_head_has_are_refused_with_what_is_assumed(tmp_path: Path) -> None:
    name = "unet.enc.8x8_block0.attn_proj.weight"
    tensors = saved("edm2_16").tensors
    torch.save(tensors | {name: tensors[name][:32]}, tmp_path / "narrow.pt")
    with pytest.raises(
        RequestError, match=r"32 channels, fewer than the 64 of a head that are assumed .* give --num_h"
    ):
        describing(str(tmp_path / "narrow.pt"))
