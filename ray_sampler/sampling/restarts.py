"""Intervals of noise levels that the solver restart samples again (Xu et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option
from ray_sampler.sampling.multistep_solvers import AddedNoise
from ray_sampler.sampling.schedules import MOST_STEPS, ScheduleOptions, levels_of


class Restart(NamedTuple):
    """One interval that is sampled again (Xu et al. 2023): [sigma_min, sigma_max], with N - 1 steps, K times."""

    points: int
    """N: levels of the interval, both ends included."""
    times: int
    """K."""
    sigma_min: float
    sigma_max: float


@dataclass(frozen=True, kw_only=True)
class RestartOptions(AddedNoise):
    """Intervals that --sampler restart samples again."""

    restarts: str = option(
        "",
        "Intervals of the restart solver: N,K,tmin,tmax;... means K times from tmax to tmin on N levels.",
        recorded=False,
    )

    def check(self) -> None:
        """Raises RequestError: the text is not a list of intervals."""
        intervals_of(self)


def intervals_of(options: RestartOptions) -> tuple[Restart, ...]:
    """The intervals that --restarts gives. Raises RequestError: the text is not a list of intervals."""
    try:
        parts = [part.split(",") for part in options.restarts.split(";") if part.strip()]
        return tuple(Restart(int(n), int(k), float(low), float(high)) for n, k, low, high in parts)
    except ValueError:
        raise RequestError(
            f"--restarts is {options.restarts!r}; it must be N,K,tmin,tmax for each interval, with semicolons between "
            "them, for example 3,2,0.06,0.30"
        ) from None


def check_intervals(schedule: ScheduleOptions, options: RestartOptions) -> None:
    """Raises RequestError: there is no interval, or one is wrong, or ends nowhere on the schedule."""
    intervals = intervals_of(options)
    require(bool(intervals), "--restarts is missing; --sampler restart needs intervals, for example 3,2,0.06,0.30")
    levels = levels_of(schedule).tolist()
    for each in intervals:
        shown = f"{each.points},{each.times},{each.sigma_min:g},{each.sigma_max:g}"
        require(
            each.points >= 2 and each.times >= 1 and 0 < each.sigma_min < each.sigma_max < inf,
            f"--restarts has {shown}; it must be N,K,tmin,tmax with N at least 2, K at least 1 and 0 < tmin < tmax",
        )
        require(
            each.points * each.times <= MOST_STEPS,
            f"--restarts has {shown}; it must be at most {MOST_STEPS} steps, K times N",
        )
        at = snapped(each, levels)
        require(
            at > 0 and levels[at] < each.sigma_max,
            f"--restarts has {shown}, and the level nearest to tmin is {levels[at]:g}; it must be below tmax, and "
            "not the first",
        )


def restart_identity(options: RestartOptions) -> dict[str, Any]:
    """What decides a sample, by effective value."""
    texts = (f"{r.points},{r.times},{r.sigma_min!r},{r.sigma_max!r}" for r in intervals_of(options))
    return {"restarts": ";".join(texts), "s_noise": float(options.s_noise)}


def restart_evaluations(steps: int, options: RestartOptions) -> int:
    """Of the denoiser for one sample: of heun, and in the intervals."""
    return 2 * steps - 1 + sum(each.times * 2 * (each.points - 1) for each in intervals_of(options))


def snapped(restart: Restart, levels: list[float]) -> int:
    """Where among falling levels an interval ends: at the positive one that is nearest to its sigma_min."""
    positive = [i for i, level in enumerate(levels) if level > 0]
    return min(positive, key=lambda i: abs(levels[i] - restart.sigma_min))
