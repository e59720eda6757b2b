"""Noise schedules: the levels that a solver visits. They live on the host: solvers take their entries as scalars."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_sampler.errors import require
from ray_sampler.options import option

RHO = 7.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many noise levels there are, and where."""

    steps: int = option(40, "Points of the noise schedule.")
    sigma_min: float = option(0.002, "Smallest noise level.")
    sigma_max: float = option(80.0, "Largest noise level.")
    rho: float = option(
        RHO, "Exponent of the Karras schedule: the higher, the more levels near sigma_min.", recorded=False
    )

    def validate(self) -> None:
        """Raises RequestError: a value is wrong, by itself or beside another."""
        require(self.steps >= 1, f"--steps is {self.steps}; it must be at least 1")
        require(
            0 < self.sigma_min < self.sigma_max < math.inf,
            f"--sigma_min is {self.sigma_min:g} and --sigma_max {self.sigma_max:g}; "
            "they must satisfy 0 < sigma_min < sigma_max",
        )
        require(0 < self.rho < math.inf, f"--rho is {self.rho:g}; it must be above 0, as in 7")

    def identity(self, used: tuple[str, ...]) -> dict[str, Any]:
        """What decides a sample where a solver takes the values `used`."""
        result: dict[str, Any] = {"sigma_max": float(self.sigma_max)}
        if "sigma_min" in used:
            result["sigma_min"] = float(self.sigma_min)
        if "steps" in used:
            result["steps"] = self.steps
            if self.rho != RHO:
                result["rho"] = float(self.rho)
        return result


def karras_sigmas(
    n: int, sigma_min: float, sigma_max: float, rho: float = RHO, dtype: torch.dtype = torch.float32
) -> Tensor:
    """n noise levels from sigma_max down to sigma_min, then 0: (n + 1,) on the CPU (Karras et al. 2022, eq. 5).

    n = 1 gives [sigma_max, 0].
    """
    ramp = torch.linspace(0, 1, n, dtype=dtype)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=dtype)])


def multistep_sigmas(ts: tuple[int, ...], steps: int, sigma_min: float, sigma_max: float, rho: float = RHO) -> Tensor:
    """The levels at indices `ts` of a schedule of `steps` points: (len(ts),) float64 on the CPU.

    The last point is sigma_min itself, free of rounding, so that the solver sees that no noise is due there.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    last = steps - 1
    levels = [sigma_min if t == last else (high + t / last * (low - high)) ** rho for t in ts]
    return torch.tensor(levels, dtype=torch.float64)
