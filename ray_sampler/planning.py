"""From a resolved request and its networks to the sample plan, and to the identity that a fingerprint is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray_sampler.config import SAMPLING_VERSION, RunConfig
from ray_sampler.errors import redact, require, shortened
from ray_sampler.latents import finisher_of
from ray_sampler.networks.family import NetworkSpec, Script
from ray_sampler.options import of
from ray_sampler.sampling.conditions import Condition, LabelRule, listed_labels
from ray_sampler.sampling.decoding import DECODER
from ray_sampler.sampling.guidance import check_channels
from ray_sampler.sampling.options import GuidanceOptions, NoiseOptions
from ray_sampler.sampling.parameterisation import Parameterisation
from ray_sampler.sampling.path_solvers import TableOptions
from ray_sampler.sampling.plan import GUIDE, MAIN, SamplePlan, parameterisation_of
from ray_sampler.sampling.solvers import SOLVERS, Churn
from ray_sampler.sampling.stepping import schedule_of
from ray_sampler.storage.number_file import read_labels


def plan_of(config: RunConfig, specs: Mapping[str, NetworkSpec]) -> SamplePlan:
    """The sample plan of a resolved request.

    Args:
        specs: of its networks, by role.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    spec, guide = specs[MAIN], specs.get(GUIDE)
    schedule, guidance = schedule_of(config), of(GuidanceOptions, config)
    solver = SOLVERS[config.sampler]
    solver_options: Any = of(solver.options, config)
    for each in specs.values():
        require(not each.lacks, each.lacks)
    config.check()
    check_guide(guidance, spec, guide)
    check_channels(guidance, spec.shape[0])
    kinds = {
        role: parameterisation_of(each, schedule.sigma_min) for role, each in specs.items() if role in (MAIN, GUIDE)
    }
    check_path(config, kinds)
    solver_options = as_network(solver_options, spec.script, kinds[MAIN])
    solver.check(schedule, solver_options)
    return SamplePlan(
        shape=spec.shape,
        parameterisation=kinds[MAIN],
        sampler=config.sampler,
        solver=solver,
        solver_options=solver_options,
        schedule=schedule,
        finisher=finisher_of(config, spec, specs.get(DECODER)),
        noise=of(NoiseOptions, config),
        num_samples=config.num_samples,
        condition=CONDITIONS[spec.condition](config, spec),
        clip_denoised=config.clip_denoised,
        state=config.state,
        guidance=guidance,
        guide=kinds.get(GUIDE),
        guide_conditioned=bool(guide and guide.num_classes),
        script=spec.script,
    )


def label_rule(config: RunConfig, spec: NetworkSpec) -> LabelRule | None:
    """The rule that resolved labels name; None for an unconditional network. Raises RequestError: the list is wrong."""
    labels = config.labels
    if labels is None:
        return None
    if labels in ("random", "balanced"):
        return LabelRule("balanced" if labels == "balanced" else "random", spec.num_classes, None, spec.null_label)
    rule = listed_labels(read_labels(labels), spec.num_classes, repr(shortened(labels)))
    return replace(rule, null_label=spec.null_label)


CONDITIONS: dict[str, Callable[[RunConfig, NetworkSpec], Condition | None]] = {"labels": label_rule}
"""By the name that a network's description has; another condition is one entry more here."""


def check_guide(guidance: GuidanceOptions, spec: NetworkSpec, guide: NetworkSpec | None) -> None:
    """Check that something can guide a network.

    Raises:
        RequestError: it has no null label and no guide, or the guide is of another shape or other classes.
    """
    if guidance.guidance == 1:
        return
    if guide is None:
        require(
            spec.null_label is not None,
            f"--guidance is {guidance.guidance:g}, but the network has no null label to guide it; "
            "give --guide MODEL, a second network",
        )
        return
    require(
        guide.shape == spec.shape and guide.num_classes in (0, spec.num_classes),
        f"--guide is {redact(guidance.guide)!r}, of {described(guide)}; it must have the same shape as --model, which "
        f"is of {described(spec)}, and as many classes or none",
    )


def described(spec: NetworkSpec) -> str:
    """A network's shape and classes, as a message shows them."""
    return f"shape {'x'.join(map(str, spec.shape))} and {spec.num_classes or 'no'} classes"


SAMPLED = {
    "flow": ("data_at", "flows, which --prediction velocity or a Model of kind velocity names"),
    "table": ("alphas", "networks of a table of alphas, as --prediction eps or a Model of kind eps, v or x0"),
}
"""By path: what a parameterisation has of it, and the networks that this means."""


def check_path(config: RunConfig, kinds: Mapping[str, Parameterisation]) -> None:
    """Check that a solver can sample a network, and ask its guide.

    Raises:
        RequestError: one computes something else; or it is to be clamped where nothing can be.
    """
    path = SOLVERS[config.sampler].path
    if path == "any":
        return
    named, meant = SAMPLED[path]
    for role, kind in kinds.items():
        flag, computes = "--guide" if role == GUIDE else "--model", kind.identity().get("preconditioning")
        require(
            getattr(kind, named, None) is not None or (role == GUIDE and path == "table"),
            f"--sampler is {config.sampler}, which samples {meant}; the network of {flag} is of kind {computes}; give "
            "another --sampler, for example heun",
        )
    require(
        path != "flow" or not config.clip_denoised,
        f"--clip_denoised is True, but --sampler {config.sampler} has no denoised picture to clamp; leave it out",
    )


def as_network(options: Any, script: Script, kind: Parameterisation) -> Any:
    """A solver's options with what the network decides: its table, and how its publication's script rounds."""
    if isinstance(options, TableOptions):
        return replace(options, alphas=getattr(kind, "alphas", None))
    return replace(options, as_edm=True) if isinstance(options, Churn) and script != "consistency-models" else options


def identity(
    config: RunConfig, plan: SamplePlan, specs: Mapping[str, NetworkSpec], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """All that decides a sample's content, flat, by effective value.

    Args:
        specs: of the networks, by role.
        hashes: of the networks, by role.
    """
    return (
        {"sampling_version": SAMPLING_VERSION, "precision": config.precision}
        | specs[MAIN].identity(hashes[MAIN])
        | plan.identity(hashes)
    )
