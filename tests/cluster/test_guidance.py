"""What guides a network, where, and what cannot: asked of whole requests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ray_sampler.cluster.driver import announce
from ray_sampler.cluster.job import Job, prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.reporting.sheet import heading
from ray_sampler.resolve import dry_run, settings_json
from ray_sampler.sampling.finish import FINISHERS, UNDECODED
from ray_sampler.sampling.plan import sample_block
from tests.cluster.runs import TINY, random_weights
from tests.cluster.small_models import REFERENCE, edm2_snapshot
from tests.loading import loaded

EDM2, GUIDE = REFERENCE / "edm2_16" / "net.pkl", REFERENCE / "edm2_16" / "gnet.pkl"
EDM = REFERENCE / "edm_ddpmpp16" / "net.pkl"

LEVELS = [80.0, 9.723, 0.4699, 0.002]
"""Of --steps 4, about."""


def job(model: Path, **flags: Any) -> Job:
    settings: dict[str, Any] = {
        "model": str(model),
        "gpus_per_actor": 0.0,
        "num_samples": 8,
        "steps": 4,
        "precision": "fp32",
    }
    return prepare(RunConfig(**(settings | {n: str(v) if isinstance(v, Path) else v for n, v in flags.items()})))


def sampled(made: Job) -> Tensor:
    networks = {role: loaded(network) for role, network in made.networks.items()}
    with torch.inference_mode():
        return sample_block(networks, made.plan, torch.arange(3))[0]


# What a finisher asks.


def test_a_finisher_names_networks_by_role_which_are_opened_and_fingerprinted(monkeypatch: pytest.MonkeyPatch) -> None:
    asks = {"judge": str(GUIDE)}
    finisher = UNDECODED._replace(identity={"decoder": "judged"}, networks=asks)
    monkeypatch.setitem(FINISHERS, "judged", lambda options: finisher)
    made = job(EDM2, decoder="judged")
    assert list(made.networks) == ["main", "judge"]
    assert made.networks["judge"].weights == job(GUIDE).networks["main"].weights
    told = {"decoder": "judged", "judge": job(EDM2, guide=GUIDE, guidance=2.0).identity["guide"]}
    assert {name: made.identity[name] for name in told} == told


# What guides.


@pytest.mark.parametrize("model", [EDM2, EDM], ids=["edm2", "edm"])
def test_a_class_conditional_network_of_nvidia_is_guided_by_its_null_label(model: Path) -> None:
    guided = job(model, guidance=2.0)
    assert list(guided.networks) == ["main"]
    assert guided.identity["guide"] == "null"
    torch.testing.assert_close(sampled(guided), sampled(job(model, guidance=2.0, guide="null")), rtol=0, atol=0)
    assert (sampled(guided) - sampled(job(model))).abs().max() > 1e-3


def test_a_network_that_guides_itself_changes_nothing() -> None:
    alone, guided = sampled(job(EDM2)), sampled(job(EDM2, guidance=2.0, guide=EDM2))
    torch.testing.assert_close(guided, alone, rtol=1e-4, atol=1e-4)


def test_the_weight_0_gives_the_guide_alone() -> None:
    torch.testing.assert_close(sampled(job(EDM2, guidance=0.0, guide=GUIDE)), sampled(job(GUIDE)), rtol=0, atol=1e-5)


def test_an_unconditional_network_guides_a_conditional_one(tmp_path: Path) -> None:
    network = edm2_snapshot(tmp_path / "net.pkl", label_dim=5)
    guide = edm2_snapshot(tmp_path / "uncond.pkl", seed=1)
    made = job(network, guidance=0.0, guide=guide)
    assert (made.plan.condition is not None, made.plan.guide_conditioned) == (True, False)
    torch.testing.assert_close(sampled(made), sampled(job(guide)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("guide_dropout", [0.0, 0.1, None], ids=["no null row", "null row", "unconditional"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_adm_guide_may_have_a_null_label_or_not(dropout: float, guide_dropout: float | None, tmp_path: Path) -> None:
    """Of the same ten classes, whichever of the two networks was trained with label dropout."""
    save_file(random_weights(label_dropout=dropout), tmp_path / "net.safetensors")
    own: dict[str, Any] = {"class_cond": False} if guide_dropout is None else {"label_dropout": guide_dropout}
    save_file(random_weights(num_channels=64, **own), tmp_path / "guide.safetensors")
    flags: dict[str, Any] = {"image_size": 8, "num_heads": 4}
    own_flags, guide_flags = (flags | ({"label_dropout": 0.1} if each else {}) for each in (dropout, guide_dropout))
    made = job(tmp_path / "net.safetensors", guidance=0.0, guide=tmp_path / "guide.safetensors", **own_flags)
    classes = 0 if guide_dropout is None else 10
    assert (made.networks["guide"].spec.num_classes, made.plan.guide_conditioned) == (classes, classes > 0)
    expected = sampled(job(tmp_path / "guide.safetensors", **guide_flags))
    torch.testing.assert_close(sampled(made), expected, rtol=0, atol=1e-5)


def test_an_adm_guide_has_the_size_of_the_network_that_it_guides(tmp_path: Path) -> None:
    """Its file does not determine the size, and for a network of EDM it is not needed."""
    save_file(random_weights(), tmp_path / "guide.safetensors")
    made = job(EDM, guidance=2.0, guide=tmp_path / "guide.safetensors")
    assert made.networks["guide"].spec.shape == made.networks["main"].spec.shape == (3, 16, 16)
    assert sampled(made).isfinite().all()


def test_what_was_assumed_of_a_guide_is_said_of_the_guide(tmp_path: Path) -> None:
    save_file(random_weights(), tmp_path / "guide.safetensors")
    said: list[str] = []
    report: Any = SimpleNamespace(message=lambda text, kind="": said.append(text))
    announce(job(EDM, guidance=2.0, guide=tmp_path / "guide.safetensors"), report)
    assert [text for text in said if "assumed" in text] == [text for text in said if text.startswith("of --guide: ")]
    assert any(text.startswith("of --guide: --num_heads 4 is assumed") for text in said)


def test_the_weight_1_opens_no_guide(tmp_path: Path) -> None:
    made = job(EDM2, guidance=1.0, guide=tmp_path / "nowhere.pkl")
    assert list(made.networks) == ["main"]
    assert made.identity == job(EDM2).identity


def test_the_guide_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    one, other = (edm2_snapshot(tmp_path / f"{seed}.pkl", seed=seed) for seed in (1, 2))
    network = edm2_snapshot(tmp_path / "net.pkl")
    prints = {job(network, guidance=2.0, guide=guide).fingerprint for guide in (one, other)}
    prints |= {job(network, guidance=2.1, guide=one).fingerprint, job(network).fingerprint}
    assert len(prints) == 4


@pytest.mark.parametrize(("guidance", "said"), [(1.0, " 4 steps · seed"), (2.5, " 4 steps · guidance 2.5 · seed")])
def test_the_pictures_heading_names_the_weight(guidance: float, said: str) -> None:
    made = job(EDM2, guide=GUIDE, guidance=guidance)
    assert said in heading(settings_json(made.config), made.fingerprint)
    assert any("--guide does nothing" in note for note in made.notes) == (guidance == 1)


# Where.


def test_an_interval_that_covers_all_levels_is_guidance_everywhere() -> None:
    everywhere = sampled(job(EDM2, guidance=2.0, guide=GUIDE))
    within = sampled(job(EDM2, guidance=2.0, guide=GUIDE, guidance_interval="0.002,80"))
    torch.testing.assert_close(within, everywhere, rtol=0, atol=0)


def test_an_interval_between_two_levels_is_without_guidance() -> None:
    between = sampled(job(EDM2, guidance=2.0, guide=GUIDE, guidance_interval="0.5,9"))
    torch.testing.assert_close(between, sampled(job(EDM2)), rtol=0, atol=0)


def test_an_interval_decides_once_a_step() -> None:
    """Of two evaluations of a step of Heun's method the second is guided as the first is, whatever its level."""
    made = job(EDM2, guidance=2.0, guide=GUIDE, guidance_interval="9,10")
    calls: list[float] = []
    networks = {role: loaded(network) for role, network in made.networks.items()}
    guide = networks["guide"]

    def watched(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        calls.append(float((t[0] * 4).exp()))
        return guide(x, t, y)

    with torch.inference_mode():
        sample_block(networks | {"guide": watched}, made.plan, torch.arange(2))
    assert calls == pytest.approx(LEVELS[1:3], rel=1e-3)


def test_channels_that_are_not_guided_stay_the_networks_own() -> None:
    """In the last step, from sigma_min to 0, x_0 is D, so one step shows it."""
    flags: dict[str, Any] = {"steps": 1, "guide": GUIDE}
    some, every, none = (
        sampled(job(EDM2, **flags, **more))
        for more in ({"guidance": 2.0, "guidance_channels": 2}, {"guidance": 2.0}, {})
    )
    torch.testing.assert_close(some[:, :2], every[:, :2], rtol=0, atol=0)
    torch.testing.assert_close(some[:, 2:], none[:, 2:], rtol=0, atol=0)
    assert (some[:, :2] - none[:, :2]).abs().max() > 1e-3


# What cannot be.


def refusal(model: Path, **flags: Any) -> str:
    with pytest.raises(RequestError) as refused:
        job(model, **flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_guide_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    guide = edm2_snapshot(tmp_path / "small.pkl")
    said = refusal(EDM2, guidance=2.0, guide=guide)
    for part in (str(guide), "shape 3x8x8 and no classes", "shape 3x16x16 and 10 classes"):
        assert part in said


def test_a_guide_with_other_classes_is_refused_with_both_numbers(tmp_path: Path) -> None:
    network = edm2_snapshot(tmp_path / "net.pkl", label_dim=5)
    said = refusal(network, guidance=2.0, guide=edm2_snapshot(tmp_path / "guide.pkl", label_dim=6))
    assert "6 classes" in said
    assert "5 classes" in said


def test_a_conditional_guide_of_an_unconditional_network_is_refused(tmp_path: Path) -> None:
    network = edm2_snapshot(tmp_path / "net.pkl")
    said = refusal(network, guidance=2.0, guide=edm2_snapshot(tmp_path / "guide.pkl", label_dim=6))
    assert "6 classes" in said
    assert "no classes" in said


@pytest.mark.parametrize("guide", [None, "null"])
def test_guidance_of_a_network_without_a_null_label_is_refused(guide: str | None, tmp_path: Path) -> None:
    save_file(random_weights(), tmp_path / "adm.safetensors")
    said = refusal(tmp_path / "adm.safetensors", guidance=2.0, guide=guide, **TINY)
    assert "--guidance is 2" in said
    assert "--guide MODEL" in said


def test_a_guide_that_is_not_there_is_refused_under_its_own_flag(tmp_path: Path) -> None:
    for guide in (tmp_path / "none.pkl", "digit", "edm2-img64-s-fid"):
        assert refusal(EDM2, guidance=2.0, guide=guide) == f"--guide is {guide}; there is no such file"
    assert refusal(EDM2, guidance=2.0, guide="") == "--guide is empty; it must be null or a model, as for --model"


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"guidance_interval": "3"}, ("--guidance_interval is '3'", "LO,HI")),
        ({"guidance_interval": "5,1"}, ("--guidance_interval is '5,1'", "LO <= HI")),
        ({"guidance_interval": "a,b"}, ("--guidance_interval is 'a,b'",)),
        ({"guidance_channels": 0}, ("--guidance_channels is 0", "from 1 to 3")),
        ({"guidance_channels": 4}, ("--guidance_channels is 4", "from 1 to 3")),
        ({"guidance": float("nan")}, ("--guidance is nan", "finite")),
        ({"guidance": float("inf")}, ("--guidance is inf", "finite")),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_the_right_ones(flags: dict[str, Any], parts: tuple[str, ...]) -> None:
    said = refusal(EDM2, **({"guidance": 2.0} | flags))
    for part in parts:
        assert part in said


# The state of the solver.


@pytest.mark.parametrize(("model", "own"), [(EDM2, "fp32"), (EDM, "fp64")], ids=["edm2", "edm"])
def test_the_state_is_the_publications_unless_it_is_given(model: Path, own: str) -> None:
    other = {"fp32": "fp64", "fp64": "fp32"}[own]
    dtypes = {"fp32": torch.float32, "fp64": torch.float64}
    mine, given, changed = job(model), job(model, state=own), job(model, state=other)
    assert mine.fingerprint == given.fingerprint
    assert mine.fingerprint != changed.fingerprint
    assert sampled(mine).dtype == dtypes[own]
    assert sampled(changed).dtype == dtypes[other]
    difference = (sampled(mine) - sampled(changed)).abs().max()
    assert 0 < difference < 1e-3


# Latents.


CHOICES = ("--decoder DIR", "--decoder none", "float32 (N, H, W, C)")


@pytest.mark.parametrize(
    ("encoder", "channels"), [("StabilityVAEEncoder", 4), ("StandardRGBEncoder", 4), ("StabilityVAEEncoder", 3)]
)
def test_latents_are_refused_by_a_sentence_with_both_choices(encoder: str, channels: int, tmp_path: Path) -> None:
    latent = edm2_snapshot(tmp_path / "latent.pkl", encoder, img_channels=channels)
    said = refusal(latent)
    for part in CHOICES:
        assert part in said
    made = job(latent, decoder="none")
    assert made.image_shape == (8, 8, channels)
    assert made.plan.columns()["image"].dtype == "float32"
    assert "--decoder" in refusal(latent, decoder="vae")


def test_a_dry_run_says_nothing_wrong_of_a_file_that_it_does_not_open() -> None:
    """The file may have any number of channels and classes."""
    shown = dry_run(RunConfig(model="latent.pkl", guidance=1.5, guidance_channels=4, labels="0,3", decoder="none"))
    assert (shown["guidance_channels"], shown["decoder"], shown["labels"]) == (4, "none", "0,3")
    unread = dry_run(RunConfig(model="net.pkl"))
    for name in ("image_size", "class_cond", "num_classes", "labels", "steps", "sigma_min", "sigma_max", "rounding"):
        assert unread[name] is None, name
    assert dry_run(RunConfig(model="net.pkl", steps=7))["steps"] == 7
