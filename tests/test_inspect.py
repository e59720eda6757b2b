"""`ray-sampler inspect` says what a checkpoint of any family is, and its command samples it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_sampler.cli import main
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.flags import value_of
from ray_sampler.inspection import inspect
from ray_sampler.options import flags_of
from tests.cluster.runs import TINY, random_weights
from tests.cluster.small_models import REFERENCE, dhariwal_snapshot, edm2_snapshot

KEYS = {
    "family",
    "parameters",
    "shape",
    "num_classes",
    "null_label",
    "sigma_min",
    "sigma_max",
    "weights_key",
    "weights",
    "defaults",
    "command",
}

USERS = """
from torch import nn
from ray_sampler import Model


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)
        nn.init.constant_(self.layer.weight, 0.1)
        nn.init.constant_(self.layer.bias, 0.2)

    def forward(self, x, t, y):
        return self.layer(x)


def make(weights):
    return Model(Network(), "edm", (4, 8, 8), 6, null_label=6, sigma_min=0.03, sigma_max=50.0)
"""


def adm(folder: Path) -> str:
    torch.save({"ema": {f"module.{k}": v for k, v in random_weights().items()}, "step": 3}, folder / "adm.pt")
    return str(folder / "adm.pt")


def users(folder: Path) -> str:
    (folder / "inspected_of_user.py").write_text(USERS)
    return "python:inspected_of_user:make"


MAKERS: dict[str, Callable[[Path], str]] = {
    "digits": lambda folder: "digits",
    "digits-v1": lambda folder: "digits-v1",
    "digits-cd": lambda folder: "digits-cd",
    "adm": adm,
    "edm, DDPM++": lambda folder: str(REFERENCE / "edm_ddpmpp16" / "net.pkl"),
    "edm, NCSN++": lambda folder: str(REFERENCE / "edm_ncsnpp8" / "net.pkl"),
    "edm, ADM": lambda folder: str(dhariwal_snapshot(folder / "dhariwal.pkl")[0]),
    "edm2": lambda folder: str(REFERENCE / "edm2_16" / "net.pkl"),
    "edm2, half": lambda folder: str(REFERENCE / "edm2_half16" / "net.pkl"),
    "edm2, latents": lambda folder: str(edm2_snapshot(folder / "l.pkl", "StabilityVAEEncoder", img_channels=4)),
    "python": users,
}
ADM = {name: TINY[name] for name in ("image_size",)} | {"num_heads": 4}
EDM = {"clip_denoised": False, "rounding": "nearest", "state": "fp64", "steps": 18}
EDM2 = {"clip_denoised": False, "rounding": "nearest", "state": "fp32", "steps": 32}

EXPECTED: dict[str, dict[str, Any]] = {
    "digits": {"family": "adm", "parameters": 1_372_515, "shape": [3, 32, 32], "num_classes": 10, "null_label": 10},
    "digits-v1": {
        "family": "adm",
        "parameters": 1_372_387,
        "shape": [3, 32, 32],
        "num_classes": 10,
        "null_label": None,
    },
    "digits-cd": {"family": "adm", "parameters": 1_372_387, "shape": [3, 32, 32], "num_classes": 10},
    "adm": {"family": "adm", "shape": [3, None, None], "num_classes": 10, "null_label": None, "weights_key": "ema"},
    "edm, DDPM++": {"family": "edm", "parameters": 189_667, "shape": [3, 16, 16], "num_classes": 10, "null_label": 10},
    "edm, NCSN++": {"family": "edm", "parameters": 191_331, "shape": [3, 8, 8], "num_classes": 6, "null_label": 6},
    "edm, ADM": {"family": "edm", "shape": [3, 16, 16], "num_classes": 5, "null_label": 5},
    "edm2": {"family": "edm2", "parameters": 723_691, "shape": [3, 16, 16], "num_classes": 10, "null_label": 10},
    "edm2, half": {"family": "edm2", "parameters": 259_179, "shape": [3, 16, 16], "num_classes": 0, "null_label": None},
    "edm2, latents": {"family": "edm2", "shape": [4, 8, 8], "num_classes": 0, "null_label": None},
    "python": {"family": "python", "parameters": 20, "shape": [4, 8, 8], "num_classes": 6, "null_label": 6},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"sampler": "dpmpp_2m_sde", "steps": 12, "clip_denoised": True, "rounding": "truncate", "state": "fp32"},
    "digits-v1": {"sampler": "heun", "steps": 18, "clip_denoised": True, "rounding": "truncate", "state": "fp32"},
    "digits-cd": {"sampler": "onestep", "steps": 18},
    "adm": {"sampler": "heun", "steps": 40, "clip_denoised": True, "rounding": "truncate", "state": "fp32"},
    "edm, DDPM++": EDM,
    "edm, NCSN++": EDM,
    "edm, ADM": EDM,
    "edm2": EDM2,
    "edm2, half": EDM2,
    "edm2, latents": EDM2 | {"rounding": "truncate"},
    "python": {"clip_denoised": False, "rounding": "truncate", "state": "fp32"},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "inspected_of_user", raising=False)
    return tmp_path


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["inspect", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("what", MAKERS)
def test_every_key_is_there_and_right(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MAKERS[what](here)
    found = inspected(capsys, model)
    assert found.keys() == KEYS
    assert found.items() >= EXPECTED[what].items()
    assert found["defaults"].items() >= DEFAULTS[what].items()
    levels = (0.03, 50.0) if what == "python" else (0.002, 80.0)
    assert (found["sigma_min"], found["sigma_max"]) == levels
    assert len(bytes.fromhex(found["weights"])) == 32


@pytest.mark.parametrize("what", [what for what in MAKERS if what != "adm"])
def test_its_command_is_a_request_for_that_network(what: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, MAKERS[what](here))
    program, *arguments = shlex.split(found["command"])
    assert program == "ray-sampler"
    assert main([*arguments, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    given: dict[str, Any] = {
        n.removeprefix("--"): value for n, value in zip(arguments[1::2], arguments[2::2], strict=True)
    }
    assert shown["model"] == given["model"]
    job = prepare(RunConfig(**given, gpus_per_actor=0.0))
    assert job.identity["weights"] == found["weights"]
    assert [job.image_shape[2], *job.image_shape[:2]] == found["shape"]
    settings = vars(job.config)
    assert {name: settings[name] for name in found["defaults"] if name != "precision"}.items() >= {
        name: value for name, value in found["defaults"].items() if name != "precision"
    }.items()


def test_its_command_has_no_placeholder_where_flags_tell_all(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, adm(here), *flags(ADM))
    assert found["shape"] == [3, 8, 8]
    given = shlex.split(found["command"])[2:]
    config = RunConfig(**dict(value_of_pair(*pair) for pair in zip(given[::2], given[1::2], strict=True)))
    assert prepare(config).identity["weights"] == found["weights"]


def value_of_pair(flag: str, text: str) -> tuple[str, Any]:
    """A flag of the command line as RunConfig takes it."""
    name = flag.removeprefix("--")
    return name, value_of(flags_of(RunConfig)[name], text)


def test_what_nothing_determines_is_null_and_a_placeholder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, adm(here))
    assert found["shape"] == [3, None, None]
    assert found["command"].endswith("--image_size SIZE --num_head_channels CHANNELS")
    sized = inspected(capsys, adm(here), "--image_size", "8")
    assert sized["shape"] == [3, 8, 8]
    assert sized["command"].endswith("--num_head_channels CHANNELS")
    preset = inspected(capsys, adm(here), "--num_head_channels", "32", "--image_size", "8")
    assert "CHANNELS" not in preset["command"]


def test_people_see_the_same_without_a_cut(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (adm(here), users(here), MAKERS["edm2"](here)):
        found = inspected(capsys, model)
        assert main(["inspect", model]) == 0
        said = capsys.readouterr().out
        for part in (found["family"], f"{found['parameters']:,}", found["weights"][:16], found["command"]):
            assert part in said
        assert "…" not in said


REPEATED: dict[str, dict[str, Any]] = {
    "adm": {"num_channels": 32, "num_res_blocks": 1, "class_cond": True, "num_classes": 10, "image_size": 8},
    "edm, DDPM++": {"image_size": 16, "num_channels": 16, "num_res_blocks": 1, "class_cond": True, "num_classes": 10},
    "edm, ADM": {"image_size": 16, "num_channels": 64, "num_res_blocks": 1, "class_cond": True, "num_classes": 5},
    "edm2": {"image_size": 16, "class_cond": True, "num_classes": 10, "num_res_blocks": 1},
    "edm2, half": {"image_size": 16, "class_cond": False},
    "python": {"image_size": 8, "class_cond": True, "num_classes": 6},
}
CONTRADICTIONS = [
    (what, name, value, told)
    for what, told_values in REPEATED.items()
    for name, told in told_values.items()
    for value in ([not told] if isinstance(told, bool) else [2 * told])
    if (what, name) != ("adm", "image_size")
]


@pytest.mark.parametrize("what", REPEATED)
def test_flags_that_repeat_the_file_are_accepted_everywhere(
    what: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, given = MAKERS[what](here), REPEATED[what]
    found, plain = inspected(capsys, model, *flags(given)), inspected(capsys, model)
    assert (found["weights"], found["num_classes"]) == (plain["weights"], plain["num_classes"])
    more: dict[str, Any] = {"decoder": "none"} if what == "python" else {}
    if what == "adm":
        more = {"num_heads": 4}
    job = prepare(RunConfig(model=model, gpus_per_actor=0.0, **given, **more))
    assert job.identity["weights"] == plain["weights"]
    if what != "adm":
        assert job.fingerprint == prepare(RunConfig(model=model, gpus_per_actor=0.0, **more)).fingerprint


@pytest.mark.parametrize(("what", "name", "value", "told"), CONTRADICTIONS, ids=str)
def test_a_flag_that_contradicts_the_file_is_refused_with_both_values(
    what: str, name: str, value: Any, told: Any, here: Path
) -> None:
    model = MAKERS[what](here)
    with pytest.raises(RequestError) as refused:
        inspect(RunConfig(model=model, **{name: value}))
    said = str(refused.value)
    assert "\n" not in said
    for part in (name, str(value), str(told)):
        assert part in said
    with pytest.raises(RequestError):
        prepare(RunConfig(model=model, gpus_per_actor=0.0, **{name: value}))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "needs a model"),
        (["nowhere.pt"], "there is no such file"),
        (["x" * 300], "neither a file nor a bundled model"),
        (["--weights_key", "model", str(REFERENCE / "edm2_16" / "net.pkl")], "--weights_key is 'model'"),
        (["digits", "--num_channels", "x"], "--num_channels is 'x'"),
        (["digits", "--steps", "3"], "--steps is not a flag of inspect"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert part in said


def test_it_lists_the_other_weights_of_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{k}": v + 1 for k, v in random_weights().items()}
    torch.save({"model": random_weights(), "swa_model": averaged}, here / "swa.pt")
    said = "took the weights under 'swa_model'; the file also has 'model'; --weights_key chooses"
    flags = [word for name, value in ADM.items() for word in (f"--{name}", str(value))]
    assert main(["inspect", str(here / "swa.pt"), *flags]) == 0
    assert said in capsys.readouterr().out
    assert main(["inspect", str(here / "swa.pt"), *flags, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["weights_key"] == "swa_model"
    assert said in shown.err
