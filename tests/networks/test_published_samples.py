"""The published samplers' pictures come out of these networks, given those samplers' draws and state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.networks.reference import denoised, network, numbers, saved


@dataclass(frozen=True)
class Case:
    steps: int = 8
    guidance: float = 1.0
    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


PLAIN, CHURN = Case(), Case(churn=3, s_min=0.05, s_max=50, s_noise=1.003)
EDM2 = {
    "plain": PLAIN,
    "guided": Case(guidance=1.7),
    "churn": CHURN,
    "guided_churn": Case(steps=6, guidance=2.2, churn=4),
    "rho5": Case(steps=5, sigma_min=0.01, sigma_max=60, rho=5),
}


def heun(denoise: Callable[[Tensor, Tensor], Tensor], streams: list[torch.Generator], x: Tensor, case: Case) -> Tensor:
    """Karras et al. 2022, algorithm 2, in the dtype of `x`; `streams` draw the noise of churn as those scripts do."""
    edm = x.dtype == torch.float64
    i = torch.arange(case.steps, dtype=x.dtype)
    high, low = case.sigma_max ** (1 / case.rho), case.sigma_min ** (1 / case.rho)
    sigmas = torch.cat([(high + i / (case.steps - 1) * (low - high)) ** case.rho, torch.zeros(1, dtype=x.dtype)])
    x = x * sigmas[0]
    for k, (now, then) in enumerate(pairwise(sigmas)):
        applies = case.churn > 0 and case.s_min <= now <= case.s_max
        gamma = min(case.churn / case.steps, math.sqrt(2) - 1) if applies else 0.0
        hat = now + gamma * now
        if edm or applies:
            draws = torch.stack([torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in streams])
            x = x + (hat**2 - now**2).sqrt() * case.s_noise * draws
        slope = (x - denoise(x, hat)) / hat
        euler = x + (then - hat) * slope
        if k < case.steps - 1:
            slope = slope / 2 + (euler - denoise(euler, then)) / then / 2
        x = x + (then - hat) * slope
    return x


def sampled(name: str, case: Case) -> tuple[Tensor, Tensor | None]:
    expected = numbers(name, "samples")
    classes = saved(name).arguments["label_dim"]
    streams = [torch.Generator().manual_seed(int(seed) % 2**32) for seed in expected["seeds"]]
    noise = torch.stack([torch.randn(expected["noise"].shape[1:], generator=g) for g in streams])
    assert torch.equal(noise, expected["noise"])
    y = torch.stack([torch.randint(classes, (), generator=g) for g in streams]) if classes else None
    main = network(name)
    guide = network(name, "gnet") if case.guidance != 1 else None

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        levels = sigma.reshape(1)
        d = denoised(main, x, levels, y)
        if guide is not None:
            d = torch.lerp(denoised(guide, x, levels, y), d, case.guidance)
        return d.to(x.dtype)

    state = torch.float64 if name.startswith("edm_") else torch.float32
    return heun(denoise, streams, noise.to(state), case), y


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in ("edm2_16", "edm2_half16") for case in EDM2]
    + [(name, case) for name in ("edm_ddpmpp16", "edm_ncsnpp8") for case in ("plain", "churn")],
)
def test_pictures_and_labels_are_those_of_the_published_sampler(name, case):
    expected = numbers(name, "samples")
    x, y = sampled(name, EDM2[case])
    if y is not None:
        assert torch.equal(y, expected["labels"])
    # Random weights under guidance take values to 40, whose last bit is 4e-6.
    torch.testing.assert_close(x, expected[f"x0/{case}"].to(x.dtype), rtol=1e-5, atol=1e-4)
    pixels = (x * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    levels = (pixels.int() - expected[f"uint8/{case}"].int()).abs()
    assert levels.max() <= 1
    assert (levels == 0).float().mean() > 0.99


@pytest.mark.parametrize("name", ["edm2_16", "edm2_half16", "edm_ddpmpp16", "edm_ncsnpp8"])
def test_a_network_is_one_graph_for_the_compiler(name):
    made = network(name)
    expected = numbers(name, "forward")
    compiled = torch.compile(made, backend="eager", fullgraph=True, dynamic=False)
    x, y = expected["x"], expected.get("labels")
    difference = denoised(made, x, expected["sigma"], y) - denoised(compiled, x, expected["sigma"], y)
    assert difference.abs().max() < 1e-5
