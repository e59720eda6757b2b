"""The geometry of the report's charts: paths and ticks that the template puts into inline SVG.

Plots are `PLOT_WIDTH` x `PLOT_HEIGHT` units, stretched to whatever room the page has; ticks are written beside them
as text of the page, so that they stay legible on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray_sampler.reporting.progress import format_seconds

PLOT_WIDTH = 1000
PLOT_HEIGHT = 240
SERIES = 6
"""Colours of `Strip` segments."""
STRIP_SEGMENTS = 400
"""Segments of a strip, at most."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    share: float
    """Where: 0 the start of the axis, 1 its end."""
    text: str


@dataclass(frozen=True)
class Chart:
    """A filled curve over two axes."""

    line: str
    """SVG path of the curve."""
    area: str
    """SVG path of what lies under it."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    description: str
    """What a reader who cannot see the chart is told."""


@dataclass(frozen=True)
class Segment:
    """A coloured part of a strip, in units of `PLOT_WIDTH`."""

    x: float
    width: float
    series: int


def over_time(seconds: Sequence[float], values: Sequence[float], what: str, steps: bool = False) -> Chart | None:
    """`values` at `seconds`; as stairs where `steps`. None when there are too few points for a curve."""
    if len(seconds) < 2 or seconds[-1] <= seconds[0]:
        return None
    begin, length = seconds[0], seconds[-1] - seconds[0]
    ticks = ticks_up_to(max(values), whole=steps)
    top = max(ticks)
    points = [((t - begin) / length * PLOT_WIDTH, _y(value / top)) for t, value in zip(seconds, values, strict=True)]
    if steps:
        points = [points[0], *(p for a, b in itertools.pairwise(points) for p in ((b[0], a[1]), b))]
    line = _path(points)
    return Chart(
        line=line,
        area=f"{line}L{PLOT_WIDTH},{PLOT_HEIGHT}L0,{PLOT_HEIGHT}Z",
        x_ticks=tuple(Tick(share, format_seconds(begin + share * length)) for share in (0, 0.5, 1)),
        y_ticks=tuple(Tick(tick / top, f"{tick:,g}") for tick in ticks),
        description=f"{what} over {format_seconds(length)}: at least {min(values):,.4g}, at most {max(values):,.4g}, "
        f"{values[-1]:,.4g} at the end",
    )


def histogram(counts: Sequence[int], what: str, labels: Sequence[str], shares: bool = False) -> Chart:
    """Columns of counts; where `shares`, of parts of the total, on a square-root scale on which small ones show too.

    Args:
        labels: texts at the start and the end of the axis, and evenly between them.
    """
    unit = max(sum(counts), 1) / 100 if shares else 1
    ticks = ticks_up_to(max(counts) / unit, steps=2) if shares else ticks_up_to(max(counts), whole=True)
    top = max(ticks)
    width = PLOT_WIDTH / len(counts)
    points = []
    for i, count in enumerate(counts):
        share = count / unit / top
        y = _y(math.sqrt(share) if shares else share)
        points += [(i * width, y), ((i + 1) * width, y)]
    line = _path(points)
    return Chart(
        line=line,
        area=f"{line}L{PLOT_WIDTH},{PLOT_HEIGHT}L0,{PLOT_HEIGHT}Z",
        x_ticks=tuple(Tick(i / max(len(labels) - 1, 1), label) for i, label in enumerate(labels)),
        y_ticks=tuple(
            Tick(math.sqrt(tick / top), f"{tick:,g}%") if shares else Tick(tick / top, f"{tick:,g}") for tick in ticks
        ),
        description=f"{what}: from {min(counts):,} to {max(counts):,} in a column",
    )


def strip(computed_by: Sequence[Mapping[str, Any]], num_samples: int) -> list[Segment]:
    """Who computed which range of the sample indices; ranges too short to be seen are left out when there are many."""
    scale = PLOT_WIDTH / max(num_samples, 1)
    segments = [
        Segment(round(start * scale, 2), round((stop - start) * scale, 2), row % SERIES)
        for row, computed in enumerate(computed_by)
        for start, stop in computed["ranges"]
    ]
    longest = sorted(segments, key=lambda segment: segment.width, reverse=True)[:STRIP_SEGMENTS]
    return sorted(longest, key=lambda segment: segment.x)


def ticks_up_to(largest: float, steps: int = 4, whole: bool = False) -> list[float]:
    """Round numbers from 0 to at least `largest`: about `steps` intervals; whole numbers where `whole`."""
    if largest <= 0:
        return [0.0, 1.0]
    raw = largest / steps
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw * (1 - 1e-9))
    if whole:
        step = max(math.ceil(step), 1)
    count = math.ceil(largest / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(count + 1)]


def _y(share: float) -> float:
    return (1 - share) * PLOT_HEIGHT


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
