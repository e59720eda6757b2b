"""What a request says of its solver, its levels and its steps: defaults, contradictions, identity, what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from ray_sampler.networks.adm import spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.family import NetworkSpec
from ray_sampler.options import flags_of, of
from ray_sampler.presets import model_of
from ray_sampler.reporting.report import render_report
from ray_sampler.resolve import check, dry_run, given_values
from ray_sampler.sampling.plan import MAIN, sample_block
from ray_sampler.sampling.schedules import name_of
from ray_sampler.sampling.solvers import SOLVERS
from ray_sampler.sampling.stepping import unused_options
from tests.golden.requests import HERE
from tests.resolving import Run, resolved_for
from tests.sampling.mixture import mixture

RESTARTS = "3,2,0.06,0.30"
NEW = ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "ipndm", "deis", "restart")
ANY_NETWORK = [name for name, solver in SOLVERS.items() if solver.path == "any"]
NEEDED: dict[str, dict[str, Any]] = {"restart": {"restarts": RESTARTS}, "multistep": {"ts": "0,2,4"}}


def run_of(brought: dict[str, Any] | None = None, **flags: Any) -> Run:
    """Of the bundled digits, or of what a model brings."""
    config = RunConfig(**flags)
    check(config)
    model, bundled = model_of(config)
    brought = bundled if brought is None else brought
    settings = brought | given_values(config)
    return resolved_for(config, model, brought, spec_of(of(AdmOptions, settings), settings))


def identity(**flags: Any) -> dict[str, Any]:
    return run_of(**flags).identity("0" * 64)


# Which solver, on which levels.


@pytest.mark.parametrize("sampler", ANY_NETWORK)
def test_every_solver_can_be_asked_for(sampler: str) -> None:
    shown = dry_run(RunConfig(sampler=sampler, **NEEDED.get(sampler, {})))
    assert shown["sampler"] == sampler
    assert shown["nfe"] >= 1
    assert shown["sigmas"][0] == pytest.approx(80.0)


@pytest.mark.parametrize("sampler", ANY_NETWORK)
def test_log_snr_levels_are_the_default_of_third_order_at_few_steps(sampler: str) -> None:
    few, many = (
        dry_run(RunConfig(sampler=sampler, steps=steps, **NEEDED.get(sampler, {})))["schedule"] for steps in (15, 16)
    )
    assert few == ("logsnr" if sampler in ("unipc", "dpmpp_3m", "dpmpp_3m_sde") else "karras")
    assert many == "karras"


def test_a_given_schedule_wins_over_the_default() -> None:
    assert dry_run(RunConfig(sampler="unipc", steps=10, schedule="karras"))["schedule"] == "karras"
    assert dry_run(RunConfig(sampler="unipc", steps=10, rho=5.0))["schedule"] == "karras"
    assert dry_run(RunConfig(sampler="heun", schedule="cosine"))["schedule"] == "cosine"


def test_dry_run_shows_levels_and_evaluations() -> None:
    shown = dry_run(RunConfig(sampler="dpmpp_2m", steps=3, sigma_min=1.0, sigma_max=4.0, schedule="linear"))
    assert (shown["nfe"], shown["sigmas"]) == (3, [4.0, 2.5, 1.0, 0.0])
    shown = dry_run(RunConfig(sampler="heun", steps=18))
    assert (shown["nfe"], len(shown["sigmas"])) == (35, 19)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sampler": "onestep"}, [80.0]),
        ({"sampler": "progdist", "steps": 2, "rho": 1.0, "sigma_min": 1.0, "sigma_max": 3.0}, [3.0, 2.0, 1.0]),
        ({"sampler": "multistep", "ts": "0,2", "steps": 3, "rho": 1.0, "sigma_min": 1.0, "sigma_max": 3.0}, [3.0, 1.0]),
    ],
)
def test_levels_that_are_shown_are_those_that_are_visited(flags: dict[str, Any], expected: list[float]) -> None:
    assert dry_run(RunConfig(**flags))["sigmas"] == pytest.approx(expected)


# --nfe.


@pytest.mark.parametrize(
    ("sampler", "nfe", "steps", "taken"),
    [
        ("dpmpp_2m", 10, 10, 10),
        ("heun", 10, 5, 9),
        ("heun", 35, 18, 35),
        ("heun", 1, 1, 1),
        ("dpm", 11, 5, 10),
        ("progdist", 4, 4, 4),
        ("restart", 20, 6, 19),
        ("heun", 1_000_000, 500_000, 999_999),
    ],
)
def test_nfe_picks_the_most_steps_that_fit(sampler: str, nfe: int, steps: int, taken: int) -> None:
    run = run_of(sampler=sampler, nfe=nfe, **NEEDED.get(sampler, {}))
    assert (run.plan.schedule.steps, run.plan.evaluations()) == (steps, taken)
    assert (run.settings["steps"], run.settings["nfe"]) == (steps, taken)
    assert identity(sampler=sampler, nfe=nfe, **NEEDED.get(sampler, {})) == identity(
        sampler=sampler, steps=steps, **NEEDED.get(sampler, {})
    )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"nfe": 10, "steps": 10}, "--steps and --nfe each say which steps there are"),
        ({"sigmas": "8,1", "steps": 10}, "--steps and --sigmas"),
        ({"sigmas": "8,1", "nfe": 10}, "--nfe and --sigmas"),
        ({"nfe": 0}, "--nfe is 0; it must be at least 1"),
        ({"nfe": 1, "sampler": "dpm"}, "--nfe is 1; --sampler dpm needs at least 2"),
        ({"nfe": 3, "sampler": "onestep"}, "do not depend on steps"),
        ({"nfe": 3, "sampler": "multistep", "ts": "0,1,2"}, "do not depend on steps"),
        ({"sigmas": "8,1", "sigma_max": 9.0}, "--sigma_max is 9.0, but --sigmas gives the levels"),
        ({"sigmas": "8,1", "schedule": "karras"}, "--schedule is 'karras', but --sigmas"),
        ({"sigmas": "8,1", "rho": 5.0}, "--rho is 5.0, but --sigmas"),
        ({"sigmas": "1,8"}, "8 follows 1"),
        ({"sigmas": "8,1.00000001,1", "sampler": "unipc"}, "two neighbouring levels are 1 in fp32"),
        (
            {"sigmas": "8,1e-60", "sampler": "unipc"},
            "--sigmas is 8.0,1e-60,0.0; one of the levels is 0 or infinite in fp32",
        ),
        ({"rho": 0.001}, "--rho is 0.001; with it sigma_max^(1/rho) overflows"),
        ({"rho": 0.5, "sampler": "heun"}, "--sigma_max 80 and --rho 0.5; one of the levels is 0 or infinite in fp32"),
        (
            {"sigma_max": 1e300, "sampler": "euler"},
            "--sigma_max 1e+300 and --rho 7; one of the levels is 0 or infinite",
        ),
        ({"sigmas": "8,1", "sampler": "onestep"}, "--sampler onestep has fixed levels; leave --sigmas out"),
        ({"schedule": "cosine", "sampler": "progdist"}, "--sampler progdist has fixed levels"),
        ({"schedule": "cosine", "rho": 5.0}, "--rho is 5, but --schedule cosine has none"),
        ({"shift": 3.0}, "only --schedule shifted has a shift"),
        ({"schedule": "sqrt"}, "--schedule is 'sqrt'; it must be one of karras, logsnr, linear, cosine, shifted"),
    ],
)
def test_contradictions_are_refused(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as error:
        dry_run(RunConfig(**flags))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_given_steps_replace_those_that_a_model_brings() -> None:
    brought = {"sampler": "ipndm", "nfe": 10, "schedule": "logsnr", "order": 3}
    assert run_of(brought).plan.schedule.steps == 10
    assert run_of(brought, steps=7).plan.schedule.steps == 7
    assert run_of(brought, sigmas="8,1").plan.sigmas() == [8.0, 1.0, 0.0]
    assert run_of(brought | {"nfe": None, "steps": 18}, nfe=5).plan.schedule.steps == 5
    other = run_of(brought, sampler="heun")
    assert (name_of(other.plan.schedule), other.plan.evaluations(), other.settings["order"]) == ("karras", 9, None)


# --sigmas.


def test_sigmas_are_visited_as_they_are_and_scale_the_noise(tmp_path: Path) -> None:
    (tmp_path / "levels.txt").write_text("14.6 3.5 1.25 0.1\n")
    run = run_of(sampler="ipndm", sigmas=str(tmp_path / "levels.txt"))
    assert run.plan.sigmas() == [14.6, 3.5, 1.25, 0.1, 0.0]
    assert (run.plan.evaluations(), run.plan.schedule.sigma_max) == (4, 14.6)
    assert run.as_json()["sigmas"] == "14.6,3.5,1.25,0.1,0.0"
    assert dry_run(RunConfig(sampler="ipndm", sigmas=str(tmp_path / "levels.txt")))["sigmas"] == run.plan.sigmas()
    of_list = identity(sampler="ipndm", sigmas="14.6,3.5,1.25,0.1")
    assert identity(sampler="ipndm", sigmas=str(tmp_path / "levels.txt")) == of_list
    assert of_list["sigmas"] == "14.6,3.5,1.25,0.1,0.0"
    assert not {"steps", "sigma_max", "sigma_min", "schedule"} & of_list.keys()


def test_levels_may_be_nearer_to_each_other_in_a_state_of_float64() -> None:
    assert run_of(sampler="unipc", sigmas="8,1.00000001,1", state="fp64").plan.evaluations() == 3
    assert run_of(sampler="euler", sigmas="8,1.00000001,1").plan.evaluations() == 3


def test_the_levels_of_a_schedule_may_be_given_outright() -> None:
    by_name = run_of(sampler="dpmpp_2m", steps=4, schedule="logsnr").plan.sigmas()
    assert run_of(sampler="dpmpp_2m", sigmas=",".join(map(str, by_name))).plan.sigmas() == by_name


# Options.


@pytest.mark.parametrize("sampler", ANY_NETWORK)
def test_every_option_that_the_solver_does_not_use_is_one_line_of_warning(sampler: str) -> None:
    values = {"s_churn": 1.0, "s_noise": 1.01, "eta": 0.5, "order": 2, "ts": "0,2,4", "restarts": RESTARTS, "steps": 5}
    uses = {
        "heun": {"s_churn", "s_noise"},
        "dpm": {"s_churn", "s_noise"},
        "dpmpp_2m_sde": {"eta", "s_noise"},
        "dpmpp_3m_sde": {"eta", "s_noise"},
        "unipc": {"order"},
        "ipndm": {"order"},
        "deis": {"order"},
        "multistep": {"ts"},
        "restart": {"restarts", "s_noise"},
    }.get(sampler, set()) | ({"steps"} if sampler != "onestep" else set())
    for name, value in values.items():
        said = unused_options(sampler, {name: value})
        assert said == (None if name in uses else f"--{name} {value}: --sampler {sampler} does not use this")
    needed = NEEDED.get(sampler, {})
    plain = identity(sampler=sampler, steps=5, **needed)
    others = {name: value for name, value in values.items() if name not in uses | {"steps"}}
    assert identity(sampler=sampler, steps=5, **needed, **others) == plain
    assert unused_options(sampler, others) == (
        f"{', '.join(f'--{name} {others[name]}' for name in values_in_order() if name in others)}: --sampler {sampler} "
        "does not use these"
    )


def values_in_order() -> list[str]:
    """Options of solvers, in the order in which a message lists them."""
    return list(dict.fromkeys(name for solver in SOLVERS.values() for name in flags_of(solver.options)))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"sampler": "restart"}, "--restarts is missing"),
        ({"restarts": "3,2", "sampler": "restart"}, "--restarts is '3,2'"),
        ({"sampler": "unipc", "order": 5}, "--order is 5; for --sampler unipc it must be from 2 to 3"),
        ({"sampler": "dpmpp_2m_sde", "s_noise": -1.0}, "--s_noise is -1"),
    ],
)
def test_a_wrong_option_of_the_solver_is_refused(flags: dict[str, Any], expected: str) -> None:
    with pytest.raises(RequestError) as error:
        dry_run(RunConfig(**flags))
    assert expected in str(error.value)


@pytest.mark.parametrize("sampler", ["heun", "euler", *NEW])
def test_options_of_version_1_are_accepted_everywhere(sampler: str) -> None:
    flags = {"sampler": sampler, **NEEDED.get(sampler, {})}
    shown = dry_run(RunConfig(**flags, s_churn=1.0, s_tmin=0.1, s_tmax=10.0, ts="0,1"))
    assert shown["s_churn"] == 1.0
    if sampler != "heun":
        assert identity(**flags, s_churn=1.0, s_tmin=0.1, ts="0,1") == identity(**flags)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "deis"])
def test_options_that_a_solver_does_not_use_are_not_in_the_identity(sampler: str) -> None:
    assert identity(sampler=sampler, s_noise=1.1) == identity(sampler=sampler)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_3m_sde", "restart"])
def test_the_deviation_of_noise_that_is_added_is(sampler: str) -> None:
    flags = {"sampler": sampler, **NEEDED.get(sampler, {})}
    assert identity(**flags, s_noise=1.1) != identity(**flags)


def test_the_identity_of_the_old_solvers_is_what_it_was() -> None:
    """Naming the defaults changes nothing, and nothing new is there."""
    keys = {"sampling_version", "precision", "sampler", "clip_denoised", "sigma_max", "sigma_min", "steps", "s_churn"}
    keys |= {"generator", "seed", "rounding"}
    plain = identity(sampler="heun", steps=18)
    assert keys <= plain.keys()
    assert not {"schedule", "rho", "order", "eta", "nfe", "sigmas", "s_noise"} & plain.keys()
    assert identity(sampler="heun", steps=18, schedule="karras", rho=7.0) == plain
    assert identity(sampler="heun", nfe=35) == plain
    assert identity(sampler="heun", steps=18, schedule="logsnr") == plain | {"schedule": "logsnr"}


def test_every_new_flag_is_left_out_of_run_json_until_it_is_given() -> None:
    new = {"schedule", "rho", "shift", "sigmas", "nfe", "order", "eta", "restarts"}
    assert not new & run_of(sampler="heun").as_json().keys()
    assert not new & run_of(sampler="unipc").as_json().keys()
    given = run_of(sampler="unipc", order=2, schedule="cosine", nfe=8).as_json()
    assert {name: given[name] for name in sorted(new & given.keys())} == {"nfe": 8, "order": 2, "schedule": "cosine"}


def test_the_report_shows_levels_and_evaluations_where_the_summary_has_them() -> None:
    summary = json.loads((HERE / "finished" / "summary.json").read_text())
    assert "(NFE)" not in render_report(summary, b"")
    page = render_report(summary | {"nfe": 3, "sigmas": [4.0, 2.5, 1.0, 0.0]}, b"")
    assert '<data data-key="nfe" value="3">3</data> evaluations of the denoiser for each sample (NFE)' in page
    assert all(f'<data data-key="sigmas.{i}" value="{level}">' in page for i, level in enumerate((4.0, 2.5, 1.0, 0.0)))


# A whole plan, with a network.


class Labelled:
    """A network that is the denoiser itself, slightly other without a label; counts what it is asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, int]] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        self.calls.append((float(t[0]), len(x)))
        return mixture(x, float(t[0])) * torch.where(y == 3, 0.9, 1.0)[:, None, None, None]


class NoOptions:
    def identity(self) -> dict[str, Any]:
        return {}


def labelled_run(**flags: Any) -> Run:
    spec = NetworkSpec("mine", AdmOptions(), (1, 2, 2), "denoiser", num_classes=3, null_label=3)
    config = RunConfig(model="m.pt", labels="balanced", **flags)
    check(config)
    return resolved_for(config, "m.pt", {}, spec)


@pytest.mark.parametrize("state", ["fp32", "fp64"])
@pytest.mark.parametrize("sampler", NEW)
def test_samples_of_a_plan_are_independent_of_their_batch(sampler: str, state: str) -> None:
    flags: dict[str, Any] = {"guidance": 2.0, "guidance_interval": "0.1,5", "clip_denoised": False, "state": state}
    plan = labelled_run(sampler=sampler, steps=7, **flags, **NEEDED.get(sampler, {})).plan
    together, labels = sample_block({MAIN: Labelled()}, plan, torch.arange(5))
    assert labels is not None
    assert labels.tolist() == [0, 1, 2, 0, 1]
    assert together.dtype == (torch.float32 if state == "fp32" else torch.float64)
    for indices in (torch.arange(2), torch.arange(2, 5)):
        assert torch.equal(sample_block({MAIN: Labelled()}, plan, indices)[0], together[indices])


@pytest.mark.parametrize("sampler", NEW)
def test_guidance_is_decided_by_the_level_at_which_a_step_began(sampler: str) -> None:
    """Evaluations are NFE whether they are guided or not; a guided one asks the network with a doubled batch."""
    network, flags = Labelled(), {"guidance": 2.0, "guidance_interval": "0.5,5"}
    plan = labelled_run(sampler=sampler, steps=7, **flags, **NEEDED.get(sampler, {})).plan
    sample_block({MAIN: network}, plan, torch.arange(4))
    assert len(network.calls) == plan.evaluations()
    guided = {level: size == 8 for level, size in network.calls}
    inside = [level for level in plan.sigmas() if 0.5 <= level <= 5]
    if sampler != "restart":
        assert [level for level, doubled in guided.items() if doubled] == pytest.approx(inside)
        return
    at = next(i for i, (level, _) in enumerate(network.calls) if level == pytest.approx(inside[-1]) and i % 2 == 0)
    (began, first), (ended, second) = network.calls[at : at + 2]
    assert ended < 0.5 <= began
    assert first == second == 8, "an evaluation below the interval, of a step that began within it, is guided too"
