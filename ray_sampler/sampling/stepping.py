"""Which steps a run takes: the flags for it are checked against each other and resolved for a solver."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ray_sampler.errors import require
from ray_sampler.options import flags_of, of
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SOLVERS, SolverOptions

COUNTS = ("steps", "nfe", "sigmas")
"""Flags that each say how many steps there are."""

REPLACED = ("sigma_max", "schedule", "rho", "shift")
"""Flags that say what --sigmas says outright."""


def own_options() -> set[str]:
    """Options of solvers, except those of the consistency-models script, which every solver accepts."""
    return {name for solver in SOLVERS.values() for name, flag in flags_of(solver.options).items() if not flag.recorded}


def check_counts(given: Mapping[str, Any]) -> None:
    """Check that the given settings say only once which steps there are.

    Raises:
        RequestError: they say it twice.
    """
    counts = [name for name in COUNTS if name in given]
    require(len(counts) < 2, f"--{' and --'.join(counts)} each say which steps there are; give only one of them")
    for name in REPLACED if "sigmas" in given else ():
        require(
            name not in given,
            f"--{name} is {given.get(name)!r}, but --sigmas gives the levels themselves; leave out one of the two",
        )


def unused_options(sampler: str, given: Mapping[str, Any]) -> str | None:
    """One line of warning where options are given that the solver does not use."""
    known = {name: None for solver in SOLVERS.values() for name in flags_of(solver.options)} | {"steps": None}
    if SOLVERS[sampler].path != "any":  # others depend on both ends, or their networks do
        known |= {"sigma_min": None, "sigma_max": None}
    mine = {*flags_of(SOLVERS[sampler].options), *SOLVERS[sampler].uses}
    unused = [name for name in known if name in given and name not in mine]
    if not unused:
        return None
    shown = ", ".join(f"--{name} {given[name]}" for name in unused)
    return f"{shown}: --sampler {sampler} does not use {'this' if len(unused) == 1 else 'these'}"


def still_brought(brought: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of a model's or preset's settings is left beside the given ones.

    A given number of steps replaces every other way to say it. Another solver than the one that was brought replaces
    that one's options and schedule too.
    """
    gone: set[str] = set()
    if given.keys() & set(COUNTS):
        gone |= set(COUNTS)
    if "sigmas" in given:
        gone |= set(REPLACED)
    if given.get("sampler", brought.get("sampler")) != brought.get("sampler"):
        gone |= own_options() | {"schedule", "shift"}
    return {name: value for name, value in brought.items() if name not in gone}


def settle(
    settings: Mapping[str, Any], given: Mapping[str, Any], read: Callable[[Any], tuple[float, ...]]
) -> dict[str, Any]:
    """The settings that follow from --nfe, --sigmas and --rho, by flag name.

    Args:
        settings: all of them, resolved but for these.
        given: of the request.
        read: gives the levels that --sigmas names.

    Raises:
        RequestError: the solver takes no such setting.
    """
    sampler, schedule = settings["sampler"], settings["schedule"]
    solver = SOLVERS[sampler]
    for name in ("schedule", "shift", "sigmas"):
        require(
            not solver.own_levels or settings[name] in (None, "karras", 1),
            f"--{name} is {settings[name]!r}, but --sampler {sampler} has fixed levels; leave --{name} out",
        )
    if settings["sigmas"] is not None:
        levels = read(settings["sigmas"])
        return {"sigmas": ",".join(map(repr, levels)), "steps": len(levels) - 1, "sigma_max": levels[0]}
    if "rho" in given:
        require(
            schedule in (None, "karras"), f"--rho is {given['rho']:g}, but --schedule {schedule} has none; leave it out"
        )
        schedule = "karras"
    require(
        "shift" not in given or (schedule or solver.default_schedule(settings["steps"] or 1)) == "shifted",
        f"--shift is {settings['shift']:g}, but only --schedule shifted has a shift; give both or leave --shift out",
    )
    settled = {"schedule": schedule}
    return settled | fitting(settings) if settings["nfe"] is not None else settled


def fitting(settings: Mapping[str, Any]) -> dict[str, int]:
    """The steps that --nfe leaves room for, and the evaluations that they take.

    Raises:
        RequestError: none fits, or the solver takes as many evaluations whatever the steps.
    """
    sampler, nfe = settings["sampler"], settings["nfe"]
    solver = SOLVERS[sampler]
    options: Any = of(solver.options, settings)
    require(nfe >= 1, f"--nfe is {nfe}; it must be at least 1")

    def evaluations(steps: int) -> int:
        return solver.evaluations(steps, options)

    require(
        evaluations(1) < evaluations(2),
        f"--nfe is {nfe}, but the evaluations of --sampler {sampler} do not depend on steps; leave --nfe out",
    )
    steps = bisect_right(range(1, nfe + 1), nfe, key=evaluations)
    require(steps >= 1, f"--nfe is {nfe}; --sampler {sampler} needs at least {evaluations(1)}")
    return {"steps": steps, "nfe": evaluations(steps)}


def check_steps(options: SolverOptions, schedule: ScheduleOptions, state: str) -> None:
    """Check the solver's options beside the schedule, and the levels after they are rounded to the dtype of the state.

    Solvers divide by levels: they must be numbers above 0, and fall where a solver divides by their distance; those of
    the consistency-models script need not.

    Args:
        state: fp32 or fp64.

    Raises:
        RequestError: one is wrong.
    """
    solver, explicit = SOLVERS[options.sampler], schedule.sigmas is not None
    own: Any = of(solver.options, options)
    schedule.check()
    solver.check(schedule, own)
    import torch

    levels = solver.levels(schedule, own, torch.float64 if state == "fp64" else torch.float32)
    said = f"--sigma_min is {schedule.sigma_min:g}, --sigma_max {schedule.sigma_max:g} and --rho {schedule.rho:g}"
    require(
        bool((levels[:-1] > 0).all() and levels.isfinite().all()),
        f"{f'--sigmas is {schedule.sigmas}' if explicit else said}; one of the levels is 0 or infinite in "
        f"{state}: give other values{'' if state == 'fp64' else ', or --state fp64'}",
    )
    if "schedule" not in solver.uses:
        return
    equal = levels[1:][levels.diff() >= 0]
    named = f"--sigmas is {schedule.sigmas}" if explicit else f"--steps is {schedule.steps}"
    require(
        not len(equal),
        f"{named}; two neighbouring levels are {float(equal.max()) if len(equal) else 0:g} in {state}, and "
        f"--sampler {options.sampler} needs levels that fall: give fewer, or --state fp64",
    )


def schedule_of(settings: Any) -> ScheduleOptions:
    """The schedule of settled settings: the one that was asked for, else the solver's own default.

    Args:
        settings: options with `sampler` and those of a schedule, as attributes.
    """
    schedule = of(ScheduleOptions, settings)
    default = SOLVERS[settings.sampler].default_schedule(schedule.steps)
    return replace(schedule, schedule=schedule.schedule or default)


def nfe_of(options: SolverOptions, steps: int) -> int:
    """NFE: calls of the denoiser D for one sample. A guided call is one, although it asks the network twice."""
    solver = SOLVERS[options.sampler]
    return solver.evaluations(steps, of(solver.options, options))


def sigmas_of(options: SolverOptions, schedule: ScheduleOptions) -> list[float]:
    """The noise levels that the solver visits, before they are rounded to the dtype of the state."""
    solver = SOLVERS[options.sampler]
    return solver.sigmas(schedule, of(solver.options, options))
