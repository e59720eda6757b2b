"""The geometry of the report's charts: paths and ticks that the template puts into inline SVG.

Plots are `PLOT_WIDTH` x `PLOT_HEIGHT` units, stretched to whatever room the page has; ticks are written beside them
as text of the page, so that they stay legible on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ray_sampler.reporting.progress import format_seconds

PLOT_WIDTH = 1000
PLOT_HEIGHT = 240


class Tick(NamedTuple):
    """A mark on an axis."""

    share: float
    """Where: 0 the start of the axis, 1 its end."""
    text: str


class Chart(NamedTuple):
    """A filled curve over two axes."""

    line: str
    """SVG path of the curve; with a line along the axis it bounds what lies under it."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    description: str
    """What a reader who cannot see the chart is told."""


def over_time(seconds: Sequence[float], values: Sequence[float], what: str, steps: bool = False) -> Chart | None:
    """`values` at `seconds`; as stairs where `steps`. None when there are too few points for a curve."""
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return None
    begin, length = seconds[0], seconds[-1] - seconds[0]
    ticks = ticks_up_to(max(values), whole=steps)
    points = [
        ((t - begin) / length * PLOT_WIDTH, (1 - value / ticks[-1]) * PLOT_HEIGHT)
        for t, value in zip(seconds, values, strict=True)
    ]
    if steps:
        points = [points[0], *(p for a, b in itertools.pairwise(points) for p in ((b[0], a[1]), b))]
    return Chart(
        line="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points),
        x_ticks=[Tick(share, format_seconds(begin + share * length)) for share in (0, 0.5, 1)],
        y_ticks=[Tick(tick / ticks[-1], f"{tick:,g}") for tick in ticks],
        description=f"{what} over {format_seconds(length)}: at least {min(values):,.4g}, at most {max(values):,.4g}, "
        f"{values[-1]:,.4g} at the end",
    )


def ticks_up_to(largest: float, whole: bool = False) -> list[float]:
    """Round numbers from 0 to at least `largest`, in about four intervals; whole numbers where `whole`."""
    if largest <= 0:
        return [0.0, 1.0]
    magnitude = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= largest / 4 * (1 - 1e-9))
    step = max(math.ceil(step), 1) if whole else step
    return [float(f"{i * step:.10g}") for i in range(math.ceil(largest / step - 1e-9) + 1)]
