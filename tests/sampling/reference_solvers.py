"""The formulas of the multistep solvers and of restart, written down once more, term by term and without shortcuts.

Each takes (denoise, x, levels, noise, ...) with levels as a list of floats, and shares no code with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Denoise = Callable[[Any, float], Any]
Draw = Callable[[int], Any]


def lam(level: float) -> float:
    return -math.log(level)


def dpmpp_2m(D: Denoise, x: Any, s: list[float], noise: Draw, eta: float = 0.0, s_noise: float = 1.0) -> Any:
    results: list[Any] = []
    for i in range(len(s) - 1):
        results.append(D(x, s[i]))
        if s[i + 1] == 0:
            return results[i]
        h = lam(s[i + 1]) - lam(s[i])
        y = (1 + eta) * h
        x = math.exp(-y) * x + (1 - math.exp(-y)) * results[i]
        if i >= 1:
            r = (lam(s[i]) - lam(s[i - 1])) / h
            x = x + (1 - math.exp(-y)) / 2 * (results[i] - results[i - 1]) / r
        if eta:
            x = x + s_noise * s[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * noise(1 + i)
    return x


def dpmpp_3m(D: Denoise, x: Any, s: list[float], noise: Draw, eta: float = 0.0, s_noise: float = 1.0) -> Any:
    results: list[Any] = []
    for i in range(len(s) - 1):
        results.append(D(x, s[i]))
        if s[i + 1] == 0:
            return results[i]
        h = lam(s[i + 1]) - lam(s[i])
        y = (1 + eta) * h
        x = math.exp(-y) * x + (1 - math.exp(-y)) * results[i]
        if i == 1:
            r = (lam(s[1]) - lam(s[0])) / h
            x = x + (1 - math.exp(-y)) / 2 * (results[1] - results[0]) / r
        if i >= 2:
            r = (lam(s[i]) - lam(s[i - 1])) / h
            r1 = (lam(s[i - 1]) - lam(s[i - 2])) / h
            a = (results[i] - results[i - 1]) / r
            b = (results[i - 1] - results[i - 2]) / r1
            D1 = a + r / (r + r1) * (a - b)
            D2 = (a - b) / (r + r1)
            phi2 = 1 - (1 - math.exp(-y)) / y
            phi3 = phi2 / y - 0.5
            x = x + phi2 * D1 - phi3 * D2
        if eta:
            x = x + s_noise * s[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * noise(1 + i)
    return x


def unipc(D: Denoise, x: Any, s: list[float], noise: Draw, p: int) -> Any:
    n = len(s) - 1
    results = [D(x, s[0])]
    for i in range(n):
        if s[i + 1] == 0:
            return results[i]
        order = min(p, i + 1, n - i)
        h = lam(s[i + 1]) - lam(s[i])
        hh = -h
        B = math.exp(hh) - 1
        g1 = (math.exp(hh) - 1) / hh - 1
        G2 = g1 / hh - 1 / 2
        G3 = G2 / hh - 1 / 6
        b = np.array([g1 / B, 2 * G2 / B, 6 * G3 / B])
        r = [(lam(s[i - k]) - lam(s[i])) / h for k in range(1, order)]
        d = [(results[i - k] - results[i]) / r[k - 1] for k in range(1, order)]
        rho_p = {1: [], 2: [0.5], 3: None}[order]
        if rho_p is None:
            rho_p = list(np.linalg.solve(np.array([[1.0, 1.0], [r[0], r[1]]]), b[:2]))
        first = math.exp(-h) * x + (1 - math.exp(-h)) * results[i]
        x = first - B * sum(rho_p[k] * d[k] for k in range(order - 1))
        if i == n - 1:
            return x
        results.append(D(x, s[i + 1]))
        nodes = np.array([*r, 1.0])
        rho_c = [0.5] if order == 1 else list(np.linalg.solve(np.stack([nodes**j for j in range(order)]), b[:order]))
        correction = sum(rho_c[k] * d[k] for k in range(order - 1)) + rho_c[-1] * (results[i + 1] - results[i])
        x = first - B * correction
    return x


def ipndm(D: Denoise, x: Any, s: list[float], noise: Draw, p: int) -> Any:
    d: list[Any] = []
    for i in range(len(s) - 1):
        d.insert(0, (x - D(x, s[i])) / s[i])
        order = min(p, i + 1)
        if order == 1:
            slope = d[0]
        elif order == 2:
            slope = (3 * d[0] - d[1]) / 2
        elif order == 3:
            slope = (23 * d[0] - 16 * d[1] + 5 * d[2]) / 12
        else:
            slope = (55 * d[0] - 59 * d[1] + 37 * d[2] - 9 * d[3]) / 24
        x = x + (s[i + 1] - s[i]) * slope
    return x


def deis(D: Denoise, x: Any, s: list[float], noise: Draw, p: int) -> Any:
    """With the integrals in closed form: of 1, ln s, and (ln s)^2 over s."""

    def integrals(low: float, high: float) -> tuple[float, float, float]:
        ends = [(t, t * (math.log(t) - 1), t * (math.log(t) ** 2 - 2 * math.log(t) + 2)) for t in (low, high)]
        return ends[1][0] - ends[0][0], ends[1][1] - ends[0][1], ends[1][2] - ends[0][2]

    eps: list[Any] = []
    for i in range(len(s) - 1):
        denoised = D(x, s[i])
        if s[i + 1] == 0:
            return denoised
        eps.append((x - denoised) / s[i])
        one, log1, log2 = integrals(s[i], s[i + 1])
        nodes = [math.log(s[i - j]) for j in range(min(p, i + 1))]
        for j, a in enumerate(nodes):
            others = [node for node in nodes if node != a]
            if len(others) == 0:
                C = one
            elif len(others) == 1:
                C = (log1 - others[0] * one) / (a - others[0])
            else:
                b, c = others
                C = (log2 - (b + c) * log1 + b * c * one) / ((a - b) * (a - c))
            x = x + C * eps[i - j]
    return x


def restart(
    D: Denoise,
    x: Any,
    s: list[float],
    noise: Draw,
    intervals: list[tuple[int, int, float, float]],
    s_noise: float = 1.0,
) -> Any:
    def heun(x: Any, a: float, b: float) -> Any:
        d = (x - D(x, a)) / a
        there = x + (b - a) * d
        return there if b == 0 else x + (b - a) * (d + (there - D(there, b)) / b) / 2

    draw = 0
    for i in range(len(s) - 1):
        x = heun(x, s[i], s[i + 1])
        for N, K, low, high in intervals:
            distances = [abs(level - low) for level in s if level > 0]
            if distances.index(min(distances)) != i + 1:
                continue
            for _ in range(K):
                draw += 1
                x = x + s_noise * math.sqrt(high**2 - s[i + 1] ** 2) * noise(draw)
                ramp = [high ** (1 / 7) + k / (N - 1) * (s[i + 1] ** (1 / 7) - high ** (1 / 7)) for k in range(N)]
                for a, b in itertools.pairwise(ramp):
                    x = heun(x, a**7, b**7)
    return x
