"""Noise schedules: the levels that a solver visits. They live on the host: solvers take their entries as scalars.

SCHEDULES holds them all by name; another one is a line there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_sampler.errors import require
from ray_sampler.options import option

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MOST_STEPS = 10**6

RHO = 7.0
LARGEST_LOG = 700.0
"""Natural logarithm of the largest float64, about."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How many noise levels there are, and where."""

    steps: int = option(40, "Number of steps: noise levels of the schedule.", common=True)
    sigma_min: float = option(0.002, "Smallest noise level.")
    sigma_max: float = option(80.0, "Largest noise level.")
    rho: float = option(
        RHO, "Exponent of the karras schedule: the higher, the more levels near sigma_min.", recorded=False
    )
    schedule: str | None = option(
        None,
        "Spacing of the levels from sigma_max to sigma_min: karras, logsnr (even in ln sigma), linear, cosine, or "
        "shifted (flow time, with --shift) (default: logsnr for unipc, dpmpp_3m and dpmpp_3m_sde at 15 steps or fewer, "
        "shifted for flow_euler, flow_heun and flow_sde, else karras).",
        recorded=False,
    )
    shift: float = option(1.0, "Shift s of the shifted schedule, t' = s t / (1 + (s - 1) t).", recorded=False)
    sigmas: str | None = option(
        None,
        "Falling noise levels in place of a schedule: a list such as 80,10,1 or a file (.npz with arr_0, .npy, text); "
        "a last 0 is appended.",
        recorded=False,
        numbers=True,
    )
    nfe: int | None = option(
        None,
        "Budget of evaluations per sample (NFE), in place of --steps.",
        recorded=False,
    )

    def check(self) -> None:
        """Raises RequestError: a value is wrong, by itself or beside another."""
        require(
            (self.schedule or "karras") in SCHEDULES,
            f"--schedule is {self.schedule!r}; it must be one of {', '.join(SCHEDULES)}",
        )
        for name, count in (("steps", self.steps), ("nfe", 1 if self.nfe is None else self.nfe)):
            require(count >= 1, f"--{name} is {count}; it must be at least 1")
            require(count <= MOST_STEPS, f"--{name} is {count}; it must be at most {MOST_STEPS}")
        require(
            self.sigmas is not None or 0 < self.sigma_min < self.sigma_max < math.inf,
            f"--sigma_min is {self.sigma_min:g} and --sigma_max {self.sigma_max:g}; "
            "they must satisfy 0 < sigma_min < sigma_max",
        )
        require(0 < self.rho < math.inf, f"--rho is {self.rho:g}; it must be above 0, for example 7")
        require(1e-6 <= self.shift <= 1e6, f"--shift is {self.shift:g}; it must be from 1e-6 to 1e6, for example 3")
        require(
            self.sigmas is not None or abs(math.log(self.sigma_max)) / self.rho < LARGEST_LOG,
            f"--rho is {self.rho:g}; with it sigma_max^(1/rho) overflows a float; it must be larger, for example 7",
        )


def name_of(schedule: ScheduleOptions) -> str:
    """What gives the levels, in a word."""
    return "explicit" if schedule.sigmas is not None else schedule.schedule or "karras"


def levels_of(schedule: ScheduleOptions, dtype: torch.dtype | None = None, n: int | None = None) -> Tensor:
    """n levels (--steps unless given) that fall from sigma_max to sigma_min, then 0: (n + 1,) on the host.

    Where --sigmas gives the levels, those. float64 unless `dtype` says otherwise.
    """
    import torch

    dtype = dtype or torch.float64
    if schedule.sigmas is not None:
        return torch.tensor([float(part) for part in schedule.sigmas.split(",")], dtype=dtype)
    return torch.as_tensor(
        SCHEDULES[name_of(schedule)](schedule, schedule.steps if n is None else n, dtype), dtype=dtype
    )


def schedule_identity(schedule: ScheduleOptions, used: tuple[str, ...]) -> dict[str, Any]:
    """What decides a sample where a solver uses the values `used`."""
    if schedule.sigmas is not None:
        return {"sigmas": schedule.sigmas}
    name, stepped = name_of(schedule), "steps" in used
    taken = {
        "sigma_max": "sigma_max" in used,
        "sigma_min": "sigma_min" in used,
        "rho": stepped and name == "karras" and schedule.rho != RHO,
        "shift": stepped and name == "shifted",
    }
    result: dict[str, Any] = {key: float(getattr(schedule, key)) for key, decides in taken.items() if decides}
    result |= {"steps": schedule.steps} if stepped else {}
    return result | ({"schedule": name} if stepped and (name != "karras" or "schedule" in used) else {})


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = RHO, dtype: torch.dtype | None = None
) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0: (n + 1,) on the CPU (Karras et al. 2022, eq. 5).

    n = 1 gives [sigma_max, 0]. float32 unless `dtype` says otherwise.
    """
    import torch

    ramp = torch.linspace(0, 1, n, dtype=dtype or torch.float32)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, ramp.new_zeros(1)])


def multistep_sigmas(
    ts: tuple[int, ...], steps: int, sigma_min: float, sigma_max: float, rho: float = RHO
) -> list[float]:
    """The levels at indices `ts` of a schedule of `steps` points.

    The last point is sigma_min itself, free of rounding, so that the solver sees that no noise is due there.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    last = steps - 1
    return [sigma_min if t == last else (high + t / last * (low - high)) ** rho for t in ts]


Scalar = Callable[[float], float]


def even_sigmas(schedule: ScheduleOptions, n: int, of: Scalar, back: Scalar) -> list[float]:
    """n levels from sigma_max to sigma_min that are even in of(sigma), then 0.

    `back` is the inverse of `of`. The ends are sigma_max and sigma_min exactly; n = 1 gives [sigma_max, 0].
    """
    first, last = of(schedule.sigma_max), of(schedule.sigma_min)
    between = [back(first + i / (n - 1) * (last - first)) for i in range(1, n - 1)]
    ends = [schedule.sigma_min] if n > 1 else []
    return [schedule.sigma_max, *between, *ends, 0.0]


def shifted_sigmas(schedule: ScheduleOptions, n: int, dtype: torch.dtype) -> list[float]:
    """Levels t' = s t / (1 + (s - 1) t) of a flow, for even t (Esser et al. 2024, eq. 23), with sigma = t' / (1 - t').

    As sigma = t / (1 - t), a shift by s multiplies sigma by s. The range of t is the one whose ends are sigma_max and
    sigma_min after the shift.
    """
    s = schedule.shift
    return even_sigmas(schedule, n, lambda sigma: sigma / (s + sigma), lambda t: s * t / (1 - t))


SCHEDULES: dict[str, Callable[[ScheduleOptions, int, torch.dtype], Tensor | list[float]]] = {
    "karras": lambda schedule, n, dtype: karras_sigmas(n, schedule.sigma_min, schedule.sigma_max, schedule.rho, dtype),
    "logsnr": lambda schedule, n, dtype: even_sigmas(schedule, n, math.log, math.exp),
    "linear": lambda schedule, n, dtype: even_sigmas(schedule, n, float, float),
    "cosine": lambda schedule, n, dtype: even_sigmas(schedule, n, math.atan, math.tan),
    "shifted": shifted_sigmas,
}
"""By name; another schedule is one line here: (schedule, n, dtype) -> n falling levels and 0, on the host."""
