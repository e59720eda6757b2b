"""Options that solvers take beside levels: a dataclass for each kind of solver.

A flag that several solvers share has one name and one meaning; what it may be is the solver's own.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from ray_sampler.errors import RequestError, require
from ray_sampler.options import option
from ray_sampler.sampling.schedules import MOST_STEPS, Schedule


@dataclass(frozen=True)
class Plain:
    """A solver without options of its own."""

    def validate(self, schedule: Schedule) -> None:
        """Raises RequestError: a value is wrong."""

    def warning(self, schedule: Schedule) -> str | None:
        """What is right, and perhaps not what was meant."""
        return None

    def identity(self) -> dict[str, Any]:
        """What decides a sample, by effective value."""
        return asdict(self)


@dataclass(frozen=True)
class Order(Plain):
    """The order of a multistep solver; the highest that the solver has unless given."""

    order: int | None = option(
        None, "Order of the solver: unipc 2 or 3 (default 3), ipndm 1 to 4 (4), deis 1 to 3 (3).", recorded=False
    )

    solver: ClassVar[str] = ""
    lowest: ClassVar[int] = 1
    highest: ClassVar[int] = 1

    @property
    def effective(self) -> int:
        return self.highest if self.order is None else self.order

    def validate(self, schedule: Schedule) -> None:
        require(
            self.lowest <= self.effective <= self.highest,
            f"--order is {self.order}; for --sampler {self.solver} it must be from {self.lowest} to {self.highest}",
        )

    def identity(self) -> dict[str, Any]:
        return {"order": self.effective}


@dataclass(frozen=True)
class UnipcOrder(Order):
    solver, lowest, highest = "unipc", 2, 3


@dataclass(frozen=True)
class IpndmOrder(Order):
    solver, lowest, highest = "ipndm", 1, 4


@dataclass(frozen=True)
class DeisOrder(Order):
    solver, lowest, highest = "deis", 1, 3


@dataclass(frozen=True)
class Sde(Plain):
    """Noise of a solver of the reverse SDE."""

    eta: float = option(
        1.0,
        "How much noise dpmpp_2m_sde and dpmpp_3m_sde add: 1 is the reverse SDE, 0 the ODE without noise.",
        recorded=False,
    )
    s_noise: float = 1.0
    """The flag is declared by the churn of heun and dpm."""

    def validate(self, schedule: Schedule) -> None:
        require(0 <= self.eta < math.inf, f"--eta is {self.eta:g}; it must be a finite number of at least 0")

    def identity(self) -> dict[str, Any]:
        return {"eta": float(self.eta)} | ({"s_noise": float(self.s_noise)} if self.eta > 0 else {})


class Restart(NamedTuple):
    """One interval that is sampled again (Xu et al. 2023): [sigma_min, sigma_max], with N - 1 steps, K times."""

    points: int
    """N: levels of the interval, both ends included."""
    times: int
    """K."""
    sigma_min: float
    sigma_max: float


@dataclass(frozen=True)
class Restarts(Plain):
    """Intervals that --sampler restart samples again."""

    restarts: str = option(
        "",
        "Intervals that --sampler restart samples again: N,K,tmin,tmax;... is K times from tmax to tmin on N levels.",
        recorded=False,
    )
    s_noise: float = 1.0
    """The flag is declared by the churn of heun and dpm."""

    @property
    def intervals(self) -> tuple[Restart, ...]:
        """Raises RequestError: the text is no list of intervals."""
        try:
            parts = [part.split(",") for part in self.restarts.split(";") if part.strip()]
            return tuple(Restart(int(n), int(k), float(low), float(high)) for n, k, low, high in parts)
        except ValueError:
            raise RequestError(
                f"--restarts is {self.restarts!r}; it must be N,K,tmin,tmax for each interval, with semicolons between "
                "them, as in 3,2,0.06,0.30"
            ) from None

    def validate(self, schedule: Schedule) -> None:
        require(bool(self.intervals), "--restarts is missing; --sampler restart needs intervals, as in 3,2,0.06,0.30")
        levels = schedule.levels().tolist()
        for each in self.intervals:
            shown = f"{each.points},{each.times},{each.sigma_min:g},{each.sigma_max:g}"
            require(
                each.points >= 2 and each.times >= 1 and 0 < each.sigma_min < each.sigma_max < math.inf,
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

    def identity(self) -> dict[str, Any]:
        text = ";".join(f"{r.points},{r.times},{r.sigma_min!r},{r.sigma_max!r}" for r in self.intervals)
        return {"restarts": text, "s_noise": float(self.s_noise)}

    def evaluations(self) -> int:
        """Of the denoiser for one sample, in the intervals."""
        return sum(each.times * 2 * (each.points - 1) for each in self.intervals)


def snapped(restart: Restart, levels: list[float]) -> int:
    """Where among falling levels an interval ends: at the positive one that is nearest to its sigma_min."""
    positive = [i for i, level in enumerate(levels) if level > 0]
    return min(positive, key=lambda i: abs(levels[i] - restart.sigma_min))
