"""Halving and doubling are the filter's definition, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ray_sampler.networks.layers import double, halve

FILTERS = [(1.0, 1.0), (1.0, 3.0, 3.0, 1.0), (1.0, 2.0, 1.0), (1.0, 4.0, 6.0, 4.0, 1.0), (0.5, 1.0, 2.0, 3.0)]


def row(values: np.ndarray, taps: tuple[float, ...], up: bool) -> np.ndarray:
    """One row, with zeros outside: padded by (K - 1) // 2 on both sides."""
    kernel, pad = np.array(taps) / sum(taps), (len(taps) - 1) // 2
    if up:
        spread = np.zeros(2 * len(values) - 1 + len(taps))
        for i, value in enumerate(values):
            spread[2 * i : 2 * i + len(taps)] += 2 * value * kernel
        return spread[pad : pad + 2 * (len(values) - 1) + len(taps) - 2 * pad]
    padded = np.pad(values, pad)
    return np.array([padded[i : i + len(taps)] @ kernel for i in range(0, len(padded) - len(taps) + 1, 2)])


@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("up", [False, True])
def test_rows_then_columns(taps, up):
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    found = (double if up else halve)(x.float(), taps)
    expected = np.apply_along_axis(row, 2, np.apply_along_axis(row, 3, x.numpy(), taps, up), taps, up)
    assert found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-6


def test_the_box_repeats_and_averages():
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert double(x, (1.0, 1.0)).tolist() == [[[[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]]]
    assert halve(x, (1.0, 1.0)).tolist() == [[[[1.5]]]]
