"""Parameterisations: what a network F computes, and the denoiser D(x, sigma) that this makes of it.

All solvers work in EDM coordinates (Karras et al. 2022): sigma = s / a and x = x_t / a of a path x_t = a x_0 + s noise.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.family import Parameterisation

__all__ = ["Parameterisation", "parameterise"]

SIGMA_DATA = 0.5
"""Standard deviation of the training images, the same for all models of EDM, EDM2 and consistency models."""

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""F(x (B, C, H, W) float32, t (B,) float32, y or None) -> (B, C, H, W). y is the condition of each sample: labels (B,)
int64, or vectors (B, D) float32."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma): images (B, C, H, W) at a noise level -> the images expected without noise, in x's dtype. sigma is one
level for all, 0-d on the host, so that no copy to the device is needed, or one for each, (B,) beside x."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): states (B, C, H, W) of a flow, x_t = (1 - t) data + t noise, at a time, 0-d on the host, from 1 (noise) to 0
(data) -> dx_t/dt = noise - data as expected, in x's dtype."""

Scalings = tuple[Tensor, Tensor, Tensor]
"""c_skip, c_out, c_in at a level, elementwise."""
Time = Callable[[Tensor], Tensor]
"""c_noise of a level, elementwise."""
Skip = Literal["x", "input"] | None


def edm_scalings(sigma: Tensor) -> Scalings:
    """c_skip, c_out, c_in of EDM (Karras et al. 2022, table 1), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance**0.5, 1 / variance**0.5


def consistency_scalings(sigma: Tensor, sigma_min: float) -> Scalings:
    """c_skip, c_out, c_in with D(x, sigma_min) = x (Song et al. 2023, appendix C), elementwise."""
    variance = sigma**2 + SIGMA_DATA**2
    above = sigma - sigma_min
    c_skip = SIGMA_DATA**2 / (above**2 + SIGMA_DATA**2)
    return c_skip, above * SIGMA_DATA / variance**0.5, 1 / variance**0.5


def eps_scalings(sigma: Tensor) -> Scalings:
    """Of the noise on a variance-preserving path (Karras et al. 2022, table 1, VP)."""
    return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1) ** 0.5


def v_scalings(sigma: Tensor) -> Scalings:
    """Of v = a noise - s x_0 on a variance-preserving path (Salimans & Ho 2022); c_skip is of the network's input."""
    scale = 1 / (sigma**2 + 1) ** 0.5
    return scale, -sigma * scale, scale


def ve_scalings(sigma: Tensor) -> Scalings:
    """Of the score on a variance-exploding path (Karras et al. 2022, table 1)."""
    return torch.ones_like(sigma), sigma, torch.ones_like(sigma)


def velocity_scalings(sigma: Tensor, data_at: int) -> Scalings:
    """Of dx_t/dt on the straight path, for the t that holds data (Lipman et al. 2023); c_skip is of the input."""
    clean = 1 / (1 + sigma)
    return torch.ones_like(sigma), sigma * clean if data_at else -sigma * clean, clean


def vp_time(sigma: Tensor) -> Tensor:
    """999 t(sigma) of the continuous VP schedule with beta_d 19.9 and beta_min 0.1 (Karras et al. 2022, table 1)."""
    beta_d, beta_min = 19.9, 0.1
    return 999 * ((beta_min**2 + 2 * beta_d * torch.log1p(sigma**2)).sqrt() - beta_min) / beta_d


TIMES: dict[str, Callable[[Tensor], Tensor]] = {
    "250log": lambda sigma: 250.0 * torch.log(sigma + 1e-44),
    "log/4": lambda sigma: torch.log(sigma) / 4,
    "log/2": lambda sigma: torch.log(sigma / 2),
    "vp": vp_time,
}
"""c_noise, the time that a network is conditioned on, by name: of consistency-models checkpoints, EDM, VE and VP."""


LEVELS = (0.002, 80.0)
"""The range of levels that is sampled by default, where a kind has no other."""
FLOW_LEVELS = (0.002, 1e4)
"""Of flows: the first t is 1e-4 from noise, where Euler's result differs from that of a start at noise by as much."""


@dataclass(frozen=True)
class Preconditioned:
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise(sigma), y), in float32 (Karras et al. 2022, eq. 7)."""

    said: Mapping[str, Any]
    """What of it decides a sample."""
    scalings: Callable[[Tensor], Scalings]
    c_noise: Time
    skip: Skip = "x"
    """What c_skip multiplies: x, or c_in x, which the network gets; None: D is F itself."""
    shared_time: bool = False
    """Whether the network takes one time for all, (1,), as in EDM's own scripts: it embeds it once."""
    levels: tuple[float, float] = LEVELS
    """The lowest and the highest level that are sampled by default."""
    exact: bool = False
    """Whether scalings and time are computed in float64, and rounded once."""
    at_sigma_min: Callable[[float], Preconditioned] | None = field(default=None, kw_only=True)
    """The same for a run that ends at a level, where it depends on that and was given none."""
    alphas: tuple[float, ...] | None = field(default=None, kw_only=True)
    """The table of cumulative alphas of its path, where it has one."""
    data_at: int | None = field(default=None, kw_only=True)
    """The t that holds data, 0 or 1, where its path is the straight one of a flow."""

    def denoiser(self, network: Network, y: Tensor | None, with_variance: bool = False) -> Denoiser:
        """D; what the network gives beyond the channels of x, a learned variance, follows only `with_variance`."""

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            whole, level = x.float(), sigma.double() if self.exact else sigma.float()
            time = self.c_noise(level).float()
            require(
                time.ndim == 0 or len(time) in (1, len(whole)),
                f"Model's c_noise gave shape {list(time.shape)} for a batch of {len(whole)}; it must give one time for "
                "all, or one for each",
            )
            times = time if time.ndim else whole.new_full((1 if self.shared_time else len(whole),), time.item())
            scalings = self.scalings(level if level.ndim == 0 else level[:, None, None, None])
            c_skip, c_out, c_in = (each.float() for each in scalings)
            inputs = c_in * whole
            output = network(inputs, times, y)
            result, variance = output[:, : x.shape[1]], output[:, x.shape[1] :]
            if self.skip:
                result = c_skip * (whole if self.skip == "x" else inputs) + c_out * result
            return (torch.cat([result, variance], dim=1) if with_variance else result).to(x.dtype)

        return denoise

    def velocity(self, network: Network, y: Tensor | None) -> Velocity:
        """The velocity of a flow, whichever way its own time runs."""

        def ask(x: Tensor, t: Tensor) -> Tensor:
            whole, time = x.float(), 1 - t if self.data_at else t
            output = network(whole, whole.new_full((len(whole),), time.item()), y)[:, : x.shape[1]].to(x.dtype)
            if self.skip is None:
                return (x - output) / t
            return -output if self.data_at else output

        return ask

    def identity(self) -> dict[str, Any]:
        return dict(self.said)


def timed(kind: str, c_noise: str | Time, **more: Any) -> tuple[dict[str, Any], Time]:
    """The identity of a kind with a choice of times, without an entry for the default one, and the time.

    Raises:
        RequestError: the choice is unknown.
    """
    known = callable(c_noise) or c_noise in TIMES
    require(known, f"c_noise is {c_noise!r}; it must be a function of sigma or one of {', '.join(TIMES)}")
    said = {} if c_noise == "250log" else {"c_noise": c_noise if isinstance(c_noise, str) else "a function"}
    return {"preconditioning": kind, **more, **said}, TIMES[c_noise] if isinstance(c_noise, str) else partial(
        time_of, c_noise
    )


def time_of(c_noise: Callable[[Tensor], Any], sigma: Tensor) -> Tensor:
    """What a user's function gives for a level. Raises RequestError: it is no tensor and no number."""
    time = c_noise(sigma)
    time = torch.tensor(time) if isinstance(time, int | float) else time
    require(isinstance(time, Tensor), f"Model's c_noise gave a {type(time).__name__}; it must give a tensor like sigma")
    return time


def edm(c_noise: str | Time = "log/4", shared_time: bool = False) -> Preconditioned:
    """EDM's preconditioning (Karras et al. 2022, table 1)."""
    said, time = timed("edm", c_noise)
    return Preconditioned(said, edm_scalings, time, shared_time=shared_time)


def consistency(sigma_min: float | None = None, c_noise: str | Time = "250log") -> Preconditioned:
    """The preconditioning of consistency models (Song et al. 2023, appendix C); sigma_min is the run's unless given."""
    end = 0.002 if sigma_min is None else float(sigma_min)
    said, time = timed("consistency", c_noise, sigma_min=end)
    open_end = partial(consistency, c_noise=c_noise) if sigma_min is None else None
    return Preconditioned(said, lambda sigma: consistency_scalings(sigma, end), time, at_sigma_min=open_end)


LINEAR_ALPHAS = tuple(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).tolist())
"""Cumulative alphas of the linear schedule, betas from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""


def of_table(
    kind: str, scalings: Callable[[Tensor], Scalings], skip: Skip, alphas: Any = None, rounded_index: bool = False
) -> Preconditioned:
    """A network of a variance-preserving path with a table of alphas, cumulative, falling, in (0, 1); DDPM's if None.

    x_t = sqrt(alpha_j) x_0 + sqrt(1 - alpha_j) noise (Ho et al. 2020, eq. 4). The network gets x_t and the time j, an
    index into the table. Between two levels of the table j is interpolated linearly in ln sigma, so it may have a
    fraction unless `rounded_index`; beyond the table's ends it is the end's. The ends are the default range.

    Raises:
        RequestError: alphas is not such a table.
    """
    wanted = "it must be a falling table of cumulative alphas between 0 and 1"
    try:
        table = tuple(float(alpha) for alpha in (LINEAR_ALPHAS if alphas is None else alphas))  # arrays and tensors too
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(f"alphas is a {type(alphas).__name__} that holds no list of numbers; {wanted}") from None
    require(len(table) >= 2, f"alphas has {len(table)} values; {wanted}")
    if all(0 < low <= high < 1 for low, high in itertools.pairwise(table)):
        wanted += "; if these are betas, it is torch.cumprod(1 - betas, 0)"
    bounds = (1.0, *table, 0.0)
    remedy = {
        0.0: f"which is all noise; give alphas[:-{table.count(0.0)}]",
        1.0: f"which has no noise; give alphas[{table.count(1.0)}:]",
    }
    for i, alpha in sorted(enumerate(table), key=lambda item: math.isfinite(item[1])):
        falls = bounds[i] > alpha > bounds[i + 2]
        require(falls, f"alphas has {alpha!r} at index {i}{', ' + remedy[alpha] if alpha in remedy else '; ' + wanted}")
    levels = torch.tensor([0.5 * math.log((1 - a) / a) for a in table], dtype=torch.float64)

    def time(sigma: Tensor) -> Tensor:
        log = sigma.double().log().cpu()
        above = torch.searchsorted(levels, log.reshape(-1)).clamp(1, len(levels) - 1).reshape(log.shape)
        index = above - 1 + ((log - levels[above - 1]) / (levels[above] - levels[above - 1])).clamp(0, 1)
        return (index.round() if rounded_index else index).float().to(sigma.device)

    said: dict[str, Any] = {
        "preconditioning": kind,
        "alphas": hashlib.sha256(np.array(table, "<f8").tobytes()).hexdigest()[:16],
    }
    said |= {"rounded_index": True} if rounded_index else {}
    ends = math.sqrt((1 - table[0]) / table[0]), math.sqrt((1 - table[-1]) / table[-1])
    return Preconditioned(said, scalings, time, skip, levels=ends, alphas=table)


def of_flow(kind: str, skip: Skip, data_at: int | None = None) -> Preconditioned:
    """A network of the straight path between data and noise.

    It gets x_t and t in [0, 1]: with data at 0, x_t = (1 - t) x_0 + t noise; with data at 1, x_t = t x_0 + (1 - t)
    noise (Lipman et al. 2023; Ma et al. 2024). Beyond sigma, t = sigma / (1 + sigma) counted from the data.

    Args:
        data_at: the t that holds data: 0 or 1, and nothing else.

    Raises:
        RequestError: data_at is another.
    """
    if data_at not in (0, 1):
        raise RequestError(f"data_at is {data_at!r}; it must be the t that holds data, 0 or 1")

    def time(sigma: Tensor) -> Tensor:
        return (1 if data_at else sigma) / (1 + sigma)

    said = {"preconditioning": kind, "data_at": data_at}
    scalings = partial(velocity_scalings, data_at=data_at)
    return Preconditioned(said, scalings, time, skip, levels=FLOW_LEVELS, exact=True, data_at=data_at)


def x0(alphas: Any = None, data_at: int | None = None, rounded_index: bool = False) -> Preconditioned:
    """x-prediction, of the straight path where `data_at` is given, else of a table of alphas."""
    if data_at is None:
        return of_table("x0", eps_scalings, None, alphas, rounded_index)
    require(alphas is None and not rounded_index, "alphas and data_at name two paths; give one of the two")
    return of_flow("x0", None, data_at)


PARAMETERISATIONS: dict[str, Callable[..., Parameterisation]] = {
    "edm": edm,
    "consistency": consistency,
    "vp": lambda: Preconditioned({"preconditioning": "vp"}, eps_scalings, vp_time),
    "ve": lambda: Preconditioned({"preconditioning": "ve"}, ve_scalings, TIMES["log/2"]),
    "denoiser": lambda: Preconditioned({"preconditioning": "denoiser"}, ve_scalings, lambda sigma: sigma, None),
    "eps": partial(of_table, "eps", eps_scalings, "x"),
    "v": partial(of_table, "v", v_scalings, "input"),
    "x0": x0,
    "velocity": partial(of_flow, "velocity", "input"),
}
"""By kind; another kind is one line here."""


def parameterise(kind: str | Parameterisation, sigma_min: float | None = None, /, **options: Any) -> Parameterisation:
    """The parameterisation of a kind, or the one that is given, with the options of the kind.

    Args:
        sigma_min: where the run ends, on which consistency models without a given sigma_min depend.

    Raises:
        RequestError: no such kind, or an option that it does not have.
    """
    if isinstance(kind, str):
        require(kind in PARAMETERISATIONS, f"kind is {kind!r}; it must be one of {', '.join(PARAMETERISATIONS)}")
        try:
            kind = PARAMETERISATIONS[kind](**options)
        except (TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            given = ", ".join(sorted(options)) or "none"
            raise RequestError(f"a network of kind {kind!r} does not take these options: {given}") from error
    else:
        require(not options, f"the parameterisation is given as an object, so {', '.join(options)} must be left out")
        check_identity(kind)
    if sigma_min is not None and isinstance(kind, Preconditioned) and kind.at_sigma_min is not None:
        return kind.at_sigma_min(sigma_min)
    return kind


def check_identity(kind: Parameterisation) -> None:
    """Raises RequestError: what identifies a parameterisation of the user's own cannot be part of a fingerprint."""
    name = f"{type(kind).__name__}.identity()"
    try:
        said = kind.identity()
        json.dumps(said, sort_keys=True)
    except Exception as error:  # whatever the user's own raises
        raise RequestError(f"{name} has no plain values: {type(error).__name__}: {error}") from error
    require(
        isinstance(said, dict) and all(isinstance(key, str) for key in said),
        f"{name} gave {said!r}; it must give a dict with names as keys",
    )


def clipped(denoise: Denoiser) -> Denoiser:
    """`denoise`, its result clamped to [-1, 1]."""
    return lambda x, sigma: denoise(x, sigma).clamp(-1, 1)
