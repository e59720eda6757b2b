"""What of a plan is right, and perhaps not what was meant: one line of warning each."""

from __future__ import annotations

from collections.abc import Iterator

from ray_sampler.sampling.options import interval_of
from ray_sampler.sampling.parameterisation import Preconditioned
from ray_sampler.sampling.plan import SamplePlan

FOR_CONSISTENCY = ("onestep", "multistep")
"""Solvers that jump from noise to data, for which consistency models are trained (Song et al. 2023, algorithm 1)."""

EITHER = ("denoiser", None)
"""Kinds of networks that may be consistency models or not: a user's D, or parameterisation."""

ROUNDING = 1e-4
"""How far, relatively, a level may lie beyond the end of a table: users write rounded ends."""


def advice(plan: SamplePlan) -> Iterator[str]:
    """The lines of warning for a plan."""
    if warning := plan.solver.warning(plan.schedule, plan.solver_options):
        yield warning
    kind = plan.parameterisation.identity().get("preconditioning")
    if kind == "consistency" and plan.sampler not in FOR_CONSISTENCY:
        yield f"--sampler {plan.sampler}: a consistency model is trained for {' and '.join(FOR_CONSISTENCY)}"
    if plan.sampler == "onestep" and kind not in ("consistency", *EITHER):
        yield "--sampler onestep is for consistency models; one evaluation of a diffusion model gives a blurred mean"
    begins = plan.sigmas()[:-1]
    yield from out_of_reach(plan, begins)
    if isinstance(plan.parameterisation, Preconditioned) and plan.parameterisation.alphas:
        low, high = plan.parameterisation.levels
        for name, level, end in (("sigma_max", begins[0], high), ("sigma_min", begins[-1], low)):
            if level > high * (1 + ROUNDING) or level < low * (1 - ROUNDING):
                yield f"--{name} {level:g}: the network's table ends at {end:g}, so it is told that level in its place"


def out_of_reach(plan: SamplePlan, begins: list[float]) -> Iterator[str]:
    """Of settings for a range of levels in which no step begins.

    Args:
        begins: where the steps begin.
    """
    ranges = {}
    churn = getattr(plan.solver_options, "s_churn", 0.0)
    if churn:
        low, high = plan.solver_options.s_tmin, plan.solver_options.s_tmax
        ranges[f"--s_churn {churn:g}"] = (f"--s_tmin {low:g} and --s_tmax {high:g}", low, high)
    if plan.guidance.guidance != 1:
        low, high = interval_of(plan.guidance)
        ranges[f"--guidance {plan.guidance.guidance:g}"] = (f"--guidance_interval {low:g},{high:g}", low, high)
    for setting, (shown, low, high) in ranges.items():
        if not any(low * (1 - ROUNDING) <= level <= high * (1 + ROUNDING) for level in begins):
            yield (
                f"{shown}: no step of this run begins there (they begin from {max(begins):g} to {min(begins):g}), so "
                f"{setting} has no effect"
            )
