"""Arguments recorded in a file, each checked before a network is made with it."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from ray_sampler.networks.nvidia import Refused

T = TypeVar("T")
S = TypeVar("S", bound=str)

MOST = 2**20
"""No width, size or number of classes of a network comes near."""
LEAST = 2**-10
MOST_VALUES = 16
MOST_BLOCKS = 64


class Arguments:
    """Recorded arguments by name, with the default of those that are absent or None."""

    def __init__(self, recorded: dict[str, Any]) -> None:
        self.recorded = recorded

    def _value(self, name: str, default: Any) -> Any:
        value = self.recorded.get(name)
        if value is None and default is None:
            raise Refused(f"its network does not say what its {name} is")
        return default if value is None else value

    def number(self, name: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """A whole number."""
        value = self._value(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.refused(name, value, f"a whole number from {least} to {most}")
        return value

    def numbers(self, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """A few positive numbers."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MOST_VALUES:
            raise self.refused(name, value, f"a list of 1 to {MOST_VALUES} numbers")
        if not all(type(n) in (int, float) and LEAST <= n <= MOST for n in value):
            raise self.refused(name, value, "a list of positive numbers")
        return tuple(map(float, value))

    def taps(self, name: str) -> tuple[float, ...]:
        """A resampling filter. With an odd number of taps nothing could be doubled."""
        taps = self.numbers(name, (1.0, 1.0))
        if len(taps) % 2:
            raise self.refused(name, list(taps), "a filter with an even number of taps")
        return taps

    def resolutions(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Pixels a side, any number of them."""
        value = self._value(name, default)
        if not isinstance(value, (list, tuple)) or len(value) > MOST_VALUES or not all(type(n) is int for n in value):
            raise self.refused(name, value, "a list of whole numbers")
        return tuple(value)

    def factor(self, name: str, default: T) -> float | T:
        """A positive number."""
        value = self.recorded.get(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not LEAST <= value <= MOST:
            raise self.refused(name, value, "a positive number")
        return float(value)

    def fraction(self, name: str, default: float) -> float:
        """A number from 0 to 1."""
        value = self._value(name, default)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self.refused(name, value, "a number from 0 to 1")
        return float(value)

    def clip(self, name: str, default: float) -> float:
        """A bound of absolute values; None means none."""
        value = self.recorded.get(name, default)
        if value is None:
            return math.inf
        if type(value) not in (int, float) or not value > 0:
            raise self.refused(name, value, "a positive number")
        return float(value)

    def choice(self, name: str, choices: tuple[S, ...]) -> S:
        """One of `choices`, the first where it is absent."""
        value = self._value(name, choices[0])
        if value not in choices:
            raise self.refused(name, value, " or ".join(choices))
        return choices[choices.index(value)]

    def blocks(self, default: int) -> int:
        """Residual blocks of a level."""
        return self.number("num_blocks", default, most=MOST_BLOCKS)

    @staticmethod
    def refused(name: str, value: Any, right: str) -> Refused:
        shown = ascii(value)
        return Refused(f"its network has {name} {shown[:60]}; only {right} can be sampled")


def check_sizes(resolution: int, channels: tuple[int, ...], *embedded: int) -> None:
    """Refuses levels that do not halve the resolution, and widths that no network has."""
    if resolution % 2 ** (len(channels) - 1):
        raise Refused(f"its network has {len(channels)} levels, but {resolution} pixels a side")
    for width in (*channels, *embedded):
        if not 1 <= width <= MOST:
            raise Refused(f"its network has a layer of {width} channels")
