"""Parameterisations: what a network F computes, and the denoiser D(x, sigma) that this makes of it.

All solvers work in EDM coordinates (Karras et al. 2022): sigma = s / a and x = x_t / a of a path x_t = a x_0 + s noise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_sampler.errors import RequestError, require

SIGMA_DATA = 0.5
"""Standard deviation of the training images, the same for all models of EDM, EDM2 and consistency models."""

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""F(x (B, C, H, W) float32, t (B,) float32, y (B,) int64 or None) -> (B, C, H, W)."""
Scalings = tuple[Tensor, Tensor, Tensor]


class Denoiser(Protocol):
    """D(x, sigma): images (B, C, H, W) at a noise level -> the images expected without noise, in x's dtype."""

    def __call__(self, x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        """
        Args:
            sigma: one level for all, 0-d on the host, so that no copy to the device is needed, or one for each, (B,)
                beside x.
            step: the level at which the solver's step began, which decides whether guidance applies; None: sigma.
        """


class Parameterisation(Protocol):
    """What a network computes."""

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        """D of a network and the labels of a batch, (B,) int64 or None."""

    def identity(self) -> dict[str, Any]:
        """What of it decides a sample."""


def edm_scalings(sigma: Tensor) -> Scalings:
    """c_skip, c_out, c_in of EDM (Karras et al. 2022, table 1), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance**0.5, 1 / variance**0.5


def consistency_scalings(sigma: Tensor, sigma_min: float) -> Scalings:
    """c_skip, c_out, c_in with D(x, sigma_min) = x (Song et al. 2023, appendix C), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    above = sigma - sigma_min
    return (
        SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2),
        above * SIGMA_DATA / variance**0.5,
        1 / variance**0.5,
    )


def vp_scalings(sigma: Tensor) -> Scalings:
    """c_skip, c_out, c_in of a network that predicts the noise of a variance-preserving path (ibid., table 1)."""
    return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1) ** 0.5


def ve_scalings(sigma: Tensor) -> Scalings:
    """c_skip, c_out, c_in of a network that predicts the score of a variance-exploding path (ibid., table 1)."""
    return torch.ones_like(sigma), sigma, torch.ones_like(sigma)


def vp_time(sigma: Tensor) -> Tensor:
    """999 t(sigma) of the continuous VP schedule with beta_d 19.9 and beta_min 0.1 (ibid., table 1)."""
    beta_d, beta_min = 19.9, 0.1
    return 999 * ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d


TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "250log": lambda sigma: 250.0 * torch.log(sigma + 1e-44),
    "log/4": lambda sigma: torch.log(sigma) / 4,
    "log/2": lambda sigma: torch.log(sigma / 2),
    "vp": vp_time,
}
"""c_noise, the time that a network is conditioned on, by name: of consistency-models checkpoints, EDM, VE and VP."""

Time = str | Callable[[Tensor], Tensor]


def _time(c_noise: Time, sigma: Tensor) -> Tensor:
    return TIMES[c_noise](sigma) if isinstance(c_noise, str) else c_noise(sigma)


def _check_time(c_noise: Time) -> None:
    known = callable(c_noise) or c_noise in TIMES
    require(known, f"c_noise is {c_noise!r}; it must be a function of sigma or one of {', '.join(TIMES)}")


def _of_batch(value: Tensor, x: Tensor) -> Tensor:
    """A level or time, 0-d or (B,), as (B,) float32 beside x."""
    return value if value.ndim else x.new_full((len(x),), value.item())


def preconditioned(
    network: Network,
    labels: Tensor | None,
    scalings: Callable[[Tensor], Scalings],
    c_noise: Time,
    shared_time: bool = False,
) -> Denoiser:
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise(sigma), y), in float32 (Karras et al. 2022, eq. 7).

    Args:
        shared_time: one time for the batch is given as (1,) and not as (B,).
    """

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        inputs, level = x.float(), sigma.float()
        c_skip, c_out, c_in = scalings(level) if sigma.ndim == 0 else (s[:, None, None, None] for s in scalings(level))
        times = _of_batch(_time(c_noise, level), inputs[:1] if shared_time else inputs)
        return (c_skip * inputs + c_out * network(c_in * inputs, times, labels)).to(x.dtype)

    return denoise


@dataclass(frozen=True)
class Edm:
    """EDM's preconditioning (Karras et al. 2022, table 1)."""

    c_noise: Time = "log/4"
    shared_time: bool = False
    """Whether the network takes one time for all, (1,), as in EDM's own scripts: it embeds it once."""

    def __post_init__(self) -> None:
        _check_time(self.c_noise)

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        return preconditioned(network, labels, edm_scalings, self.c_noise, self.shared_time)

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": "edm"} | _time_identity(self.c_noise)


@dataclass(frozen=True)
class Consistency:
    """The preconditioning of consistency models (Song et al. 2023, appendix C)."""

    sigma_min: float = 0.002
    c_noise: Time = "250log"

    def __post_init__(self) -> None:
        _check_time(self.c_noise)

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        return preconditioned(network, labels, lambda s: consistency_scalings(s, self.sigma_min), self.c_noise)

    def identity(self) -> dict[str, Any]:
        result = {"preconditioning": "consistency", "sigma_min": float(self.sigma_min)}
        return result | _time_identity(self.c_noise)


@dataclass(frozen=True)
class Vp:
    """The continuous VP preconditioning (Karras et al. 2022, table 1)."""

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        return preconditioned(network, labels, vp_scalings, "vp")

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": "vp"}


@dataclass(frozen=True)
class Ve:
    """The VE preconditioning (Karras et al. 2022, table 1)."""

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        return preconditioned(network, labels, ve_scalings, "log/2")

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": "ve"}


@dataclass(frozen=True)
class Direct:
    """The network is D itself: network(x, sigma, y)."""

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
            inputs = x.float()
            return network(inputs, _of_batch(sigma.float(), inputs), labels).to(x.dtype)

        return denoise

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": "denoiser"}


def linear_alphas(steps: int = 1000) -> tuple[float, ...]:
    """Cumulative alphas of the linear schedule, betas from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""
    return tuple(np.cumprod(1 - np.linspace(1e-4, 0.02, steps)).tolist())


@dataclass(frozen=True)
class Diffusion:
    """A network of a variance-preserving path with a table of alphas.

    x_t = sqrt(alpha_j) x_0 + sqrt(1 - alpha_j) noise (Ho et al. 2020, eq. 4, with alphas cumulative). The network gets
    x_t and the time j, an index into the table. Between two levels of the table j is interpolated linearly in ln sigma,
    so it may have a fraction; beyond the table's ends it is the end's.
    """

    predicts: str
    """eps, v (sqrt(alpha) noise - sqrt(1 - alpha) x_0; Salimans & Ho 2022) or x0."""
    alphas: tuple[float, ...] = linear_alphas()
    """Cumulative, falling, in (0, 1)."""

    def __post_init__(self) -> None:
        wanted = "it must be a falling table of cumulative alphas between 0 and 1"
        try:
            table = tuple(float(alpha) for alpha in self.alphas)  # arrays and tensors too
        except (TypeError, ValueError, RuntimeError):
            raise RequestError(
                f"alphas is a {type(self.alphas).__name__} that holds no list of numbers; {wanted}"
            ) from None
        falling = all(1 > a > b > 0 for a, b in pairwise(table))
        require(len(table) >= 2 and falling, f"alphas has {len(table)} values; {wanted}")
        object.__setattr__(self, "alphas", table)

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        levels = torch.tensor([0.5 * math.log((1 - a) / a) for a in self.alphas], dtype=torch.float64)

        def time(sigma: Tensor) -> Tensor:
            log = sigma.double().log().cpu()
            above = torch.searchsorted(levels, log.reshape(-1)).clamp(1, len(levels) - 1).reshape(log.shape)
            share = (log - levels[above - 1]) / (levels[above] - levels[above - 1])
            return (above - 1 + share.clamp(0, 1)).float()

        def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
            inputs, level = x.float(), sigma.float()
            times = _of_batch(time(level).to(level.device), inputs)
            level = level if level.ndim == 0 else level[:, None, None, None]
            scale = 1 / (level**2 + 1) ** 0.5
            x_t = inputs * scale
            output = network(x_t, times, labels)
            if self.predicts == "eps":
                denoised = inputs - level * output
            elif self.predicts == "v":
                denoised = scale * x_t - level * scale * output
            else:
                denoised = output
            return denoised.to(x.dtype)

        return denoise

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(np.array(self.alphas, "<f8").tobytes()).hexdigest()
        return {"preconditioning": self.predicts, "alphas": digest[:16]}


@dataclass(frozen=True)
class Flow:
    """A network of the linear path between data and noise, with its velocity dx_t/dt or x_0 as output.

    The network gets x_t and t in [0, 1]: with data at 0, x_t = (1 - t) x_0 + t noise; with data at 1, x_t = t x_0 +
    (1 - t) noise (Lipman et al. 2023; Ma et al. 2024). Beyond sigma, t = sigma / (1 + sigma) counted from the data.
    """

    data_at: int | None = None
    """The t that holds data: 0 or 1, and nothing else."""
    predicts: str = "velocity"

    def __post_init__(self) -> None:
        require(self.data_at in (0, 1), f"data_at is {self.data_at!r}; it must be the t that holds data, 0 or 1")

    def denoiser(self, network: Network, labels: Tensor | None) -> Denoiser:
        def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
            inputs, level = x.float(), sigma.float()
            noisy = level / (1 + level)
            times = _of_batch(1 - noisy if self.data_at else noisy, inputs)
            noisy = noisy if noisy.ndim == 0 else noisy[:, None, None, None]
            x_t = (1 - noisy) * inputs
            output = network(x_t, times, labels)
            if self.predicts == "velocity":
                output = x_t + noisy * output if self.data_at else x_t - noisy * output
            return output.to(x.dtype)

        return denoise

    def identity(self) -> dict[str, Any]:
        return {"preconditioning": self.predicts, "data_at": self.data_at}


def _x0(alphas: tuple[float, ...] | None = None, data_at: int | None = None) -> Parameterisation:
    """x-prediction, of the linear path where `data_at` is given, else of a table of alphas."""
    if data_at is None:
        return Diffusion("x0", linear_alphas() if alphas is None else alphas)
    require(alphas is None, "alphas and data_at name two paths; give one of the two")
    return Flow(data_at, "x0")


PARAMETERISATIONS: dict[str, Callable[..., Parameterisation]] = {
    "edm": Edm,
    "consistency": Consistency,
    "vp": Vp,
    "ve": Ve,
    "denoiser": Direct,
    "eps": partial(Diffusion, "eps"),
    "v": partial(Diffusion, "v"),
    "x0": _x0,
    "velocity": Flow,
}
"""By kind; another kind is one line here."""


def parameterise(kind: str | Parameterisation, **options: Any) -> Parameterisation:
    """The parameterisation of a kind.

    Raises:
        RequestError: no such kind, or an option that it does not have.
    """
    if not isinstance(kind, str):
        require(not options, f"the parameterisation is given as an object, so {', '.join(options)} must be left out")
        return kind
    require(kind in PARAMETERISATIONS, f"kind is {kind!r}; it must be one of {', '.join(PARAMETERISATIONS)}")
    try:
        return PARAMETERISATIONS[kind](**options)
    except RequestError:
        raise
    except (TypeError, ValueError):
        given = ", ".join(sorted(options)) or "none"
        require(False, f"a network of kind {kind!r} does not take these options: {given}")
        raise


def at_sigma_min(parameterisation: Parameterisation, sigma_min: float) -> Parameterisation:
    """The parameterisation for a run that ends at sigma_min, on which consistency models depend."""
    if isinstance(parameterisation, Consistency):
        return Consistency(sigma_min, parameterisation.c_noise)
    return parameterisation


def _time_identity(c_noise: Time) -> dict[str, Any]:
    """Nothing for the time of the first version's networks."""
    if c_noise == "250log":
        return {}
    return {"c_noise": c_noise if isinstance(c_noise, str) else "a function"}


def clipped(denoise: Denoiser) -> Denoiser:
    """`denoise`, its result clamped to [-1, 1]."""
    return lambda x, sigma, step=None: denoise(x, sigma, step).clamp(-1, 1)
