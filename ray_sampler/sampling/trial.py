"""One call of a user's network before anything is sampled: what is wrong with it is found at once, in one sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any

import torch
from torch import nn

from ray_sampler.errors import RequestError, RunError, require
from ray_sampler.networks.called import Called, place_of
from ray_sampler.networks.user_code import brief
from ray_sampler.sampling.memory import ran_out_of_memory
from ray_sampler.sampling.parameterisation import Parameterisation
from ray_sampler.sampling.plan import GUIDE, MAIN, SamplePlan

TRIAL_S = 60.0
"""Seconds that a trial in the driver may take."""


class WrongNetworkError(RequestError):
    """A user's network cannot be sampled."""


def try_networks(networks: Mapping[str, nn.Module], plan: SamplePlan, batch_size: int) -> list[str]:
    """Try the user's networks of a plan, by role, as `try_network` does; returns warnings."""
    levels = (plan.schedule.sigma_max, plan.schedule.sigma_min)
    classes, null = getattr(plan.condition, "num_classes", 0), getattr(plan.condition, "null_label", None)
    kinds = {MAIN: (plan.parameterisation, classes), GUIDE: (plan.guide, classes if plan.guide_conditioned else 0)}
    warnings = []
    for role, network in networks.items():
        kind, num_classes = kinds.get(role, (None, 0))
        if isinstance(network, Called) and kind is not None:
            labels = (0, num_classes - 1 if null is None else null) if num_classes else None
            warnings += try_network(network, kind, plan.shape, levels, labels, (2, batch_size))
    return warnings


def try_network(
    network: Called,
    kind: Parameterisation,
    shape: tuple[int, int, int],
    levels: tuple[float, float],
    labels: tuple[int, int] | None,
    sizes: Sequence[int] = (2,),
) -> list[str]:
    """Call a network with two samples at the largest and the smallest level; it is left as after loading.

    Args:
        levels: sigma_max and sigma_min.
        labels: two, where it takes any.
        sizes: of batches, of which one must work: what was exported may take one size only.

    Returns:
        Warnings: where no result at the largest level is finite, and where two calls on one input differ.

    Raises:
        WrongNetworkError: it raises, or returns something else than it should.
    """
    tensor = next(iter((*network.parameters(), *network.buffers(), torch.empty(0))))
    refusals: list[RequestError] = []
    for size in sizes:
        x = torch.randn((size, *shape), generator=torch.Generator().manual_seed(0)).to(tensor.device)
        y = None if labels is None else torch.tensor(labels, device=x.device).repeat(-(-size // 2))[:size]
        try:
            return _tried(network, kind.denoiser(network, y), x, levels)
        except Exception as error:
            if ran_out_of_memory(error):
                return []
            ours = isinstance(error, RequestError | RunError)
            refusals.append(WrongNetworkError(str(error) if ours else f"sampling --model raised {brief(error)}"))
    raise refusals[0]


@torch.inference_mode()
def _tried(network: Called, denoise: Callable[..., Any], x: torch.Tensor, levels: tuple[float, float]) -> list[str]:
    results = []
    for level in (levels[0], *levels):
        network.begin()
        results.append(denoise(x * level, torch.tensor(level)))
        fine = isinstance(results[-1], torch.Tensor) and results[-1].shape == x.shape
        require(fine, f"the parameterisation of --model gave {_kind(results[-1])} for x of shape {list(x.shape)}")
    network.begin()
    warnings = []
    if not results[0].isfinite().flatten(1).all(1).any():
        where = place_of(network.network)
        warnings.append(f"the network of --model gave values that are not finite at sigma {levels[0]:g}{where}")
    if not torch.equal(results[0].nan_to_num(), results[1].nan_to_num()):
        warnings.append(
            "the network of --model gave two results for one input: it draws random numbers, or depends on something "
            "outside of its attributes and buffers, so what it samples will differ from run to run"
        )
    return warnings


def _kind(result: Any) -> str:
    return f"shape {list(result.shape)}" if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"


def within(seconds: float, call: Callable[[], list[str]]) -> list[str] | None:
    """What a call gives, or raises; None where that takes longer, and the call is left to itself."""
    ended: Future[list[str]] = Future()

    def work() -> None:
        try:
            ended.set_result(call())
        except BaseException as error:  # raised below, on the thread that waits
            ended.set_exception(error)

    Thread(target=work, name="trial", daemon=True).start()
    return ended.result() if wait([ended], seconds).done else None
