"""Solvers: from x_T to x_0, each a plain function of (denoise, x, sigmas, noise).

`denoise(x, sigma)` is D of a batch x, (B, C, H, W) float32; `sigmas` are levels on the host, so that no step waits
for the device; `noise(1 + i)` is the noise of step i, which a solver asks for only where it uses it.
Symbols are those of Karras et al. 2022 ("Elucidating the design space of diffusion-based generative models").
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from ray_sampler.config import Sampling
from ray_sampler.sampling.denoiser import Denoiser
from ray_sampler.sampling.noise import Noise
from ray_sampler.sampling.schedule import RHO, karras_sigmas, multistep_sigmas


@dataclass(frozen=True)
class Churn:
    """Added noise of the stochastic sampler (Karras et al. 2022, algorithm 2)."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = inf
    s_noise: float = 1.0

    def gamma(self, sigma: Tensor, steps: int) -> float:
        """How much the level sigma rises, as a factor above 1."""
        return min(self.s_churn / steps, 2**0.5 - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0


def add_churn(x: Tensor, sigma: Tensor, gamma: float, eps: Noise, draw: int, s_noise: float) -> tuple[Tensor, Tensor]:
    """x and its level, raised from sigma to sigma (1 + gamma) (Karras et al. 2022, algorithm 2, lines 5 and 6)."""
    sigma_hat = sigma * (gamma + 1)
    if gamma > 0:
        x = x + eps(draw) * s_noise * (sigma_hat**2 - sigma**2) ** 0.5
    return x, sigma_hat


def heun(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """Heun's second order method with churn (Karras et al. 2022, algorithm 2); Euler's in the step to 0."""
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma = add_churn(x, sigmas[i], churn.gamma(sigmas[i], steps), noise, 1 + i, churn.s_noise)
        d = (x - denoise(x, sigma)) / sigma
        x_next = x + d * (sigmas[i + 1] - sigma)
        if sigmas[i + 1] > 0:
            d_next = (x_next - denoise(x_next, sigmas[i + 1])) / sigmas[i + 1]
            x_next = x + (d + d_next) / 2 * (sigmas[i + 1] - sigma)
        x = x_next
    return x


def euler(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Euler's method on dx/dsigma = (x - D(x, sigma)) / sigma (Karras et al. 2022, eq. 3)."""
    for sigma, sigma_next in pairwise(sigmas):
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_next - sigma)
    return x


def dpm(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, churn: Churn) -> Tensor:
    """The midpoint method, after DPM-Solver-2 (Lu et al. 2022), with churn; midpoints lie on a rho = 3 schedule."""
    steps = len(sigmas) - 1
    for i in range(steps):
        x, sigma = add_churn(x, sigmas[i], churn.gamma(sigmas[i], steps), noise, 1 + i, churn.s_noise)
        d = (x - denoise(x, sigma)) / sigma
        sigma_mid = ((sigma ** (1 / 3) + sigmas[i + 1] ** (1 / 3)) / 2) ** 3
        x_mid = x + d * (sigma_mid - sigma)
        d_mid = (x_mid - denoise(x_mid, sigma_mid)) / sigma_mid
        x = x + d_mid * (sigmas[i + 1] - sigma)
    return x


def ancestral(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Euler steps down past the next level, then fresh noise up to it (Song et al. 2021, as ancestral sampling)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        sigma_up = (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        d = (x - denoise(x, sigma)) / sigma
        x = x + d * (sigma_down - sigma)
        if sigma_up > 0:
            x = x + noise(1 + i) * sigma_up
    return x


def onestep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """One evaluation at the largest level (Song et al. 2023, "Consistency models")."""
    return denoise(x, sigmas[0])


def progdist(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Tensor:
    """Euler's method without the step to 0 (the sampler of progressively distilled models)."""
    return euler(denoise, x, sigmas[:-1], noise)


def multistep(denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise, sigma_min: float, sigma_max: float) -> Tensor:
    """Denoise, add noise up to the next level, repeat, without the last evaluation (Song et al. 2023, algorithm 1)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = denoise(x, sigma.float())
        level = (sigma_next.clip(sigma_min, sigma_max) ** 2 - sigma_min**2).sqrt()
        x = x_0 + noise(1 + i) * level if level > 0 else x_0
    return x


def draws_after_x_T(sampling: Sampling) -> int:
    """Draws that the original makes after x_T, used or not: where its generators stand after a batch."""
    if sampling.sampler in ("heun", "dpm", "ancestral"):
        return sampling.steps
    return len(sampling.ts) - 1 if sampling.sampler == "multistep" else 0


@torch.no_grad()
def solve(sampling: Sampling, denoise: Denoiser, noise: Noise, rho: float = RHO) -> Tensor:
    """Samples x_0, (B, C, H, W) float32 in [-1, 1], from the noise x_T = noise(0) sigma_max."""
    low, high = sampling.sigma_min, sampling.sigma_max
    x = noise(0) * high
    churn = Churn(sampling.s_churn, sampling.s_tmin, sampling.s_tmax, sampling.s_noise)
    sigmas = karras_sigmas(sampling.steps + (sampling.sampler == "progdist"), low, high, rho)
    match sampling.sampler:
        case "heun":
            x = heun(denoise, x, sigmas, noise, churn)
        case "dpm":
            x = dpm(denoise, x, sigmas, noise, churn)
        case "euler":
            x = euler(denoise, x, sigmas, noise)
        case "ancestral":
            x = ancestral(denoise, x, sigmas, noise)
        case "onestep":
            x = onestep(denoise, x, sigmas, noise)
        case "progdist":
            x = progdist(denoise, x, sigmas, noise)
        case "multistep":
            x = multistep(denoise, x, multistep_sigmas(sampling.ts, sampling.steps, low, high), noise, low, high)
    return x.clamp(-1, 1)
