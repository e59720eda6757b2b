"""Computing a block never reads a value back from the device, so a GPU's queue never runs dry.

The device here is torch's meta, which has no values: whoever asks for one fails, and so does whoever mixes what is on
the host with what is on the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.conditions import LabelRule, listed_labels
from ray_sampler.sampling.options import GuidanceOptions
from ray_sampler.sampling.plan import MAIN, SamplePlan, sample_block
from ray_sampler.sampling.solvers import SOLVERS
from tests.gpu.networks import plan_of, tiny

META = torch.device("meta")
NEEDED: dict[str, dict[str, Any]] = {"multistep": {"ts": "0,1,2"}, "restart": {"restarts": "2,1,0.1,1"}}
"""Flags that a solver asks for."""
RULES = [LabelRule("random", 10), LabelRule("balanced", 10), listed_labels(np.array([3, 1, 4]), 10, "a list")]


def block(plan: SamplePlan) -> tuple[Tensor, Tensor | None]:
    with META:
        network = UNet(tiny()).requires_grad_(False).eval()
    with torch.inference_mode():
        return sample_block({MAIN: network}, plan, torch.arange(4, 8), META)


@pytest.mark.parametrize("sampler", [name for name, solver in SOLVERS.items() if solver.path == "any"])
def test_no_solver_waits(sampler: str) -> None:
    x, labels = block(plan_of(tiny(), sampler=sampler, num_samples=8, **NEEDED.get(sampler, {})))
    assert x.shape == (4, 3, 16, 16)
    assert labels is not None
    assert x.device == labels.device == META


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_no_label_rule_waits(rule: LabelRule) -> None:
    _, labels = block(plan_of(tiny(), rule, num_samples=8))
    assert labels is not None
    assert labels.shape == (4,)
    assert labels.device == META


def test_guidance_does_not_wait() -> None:
    plan = replace(
        plan_of(tiny(), num_samples=8),
        condition=LabelRule("random", 10, null_label=0),
        guidance=GuidanceOptions(guidance=2.0, guidance_interval="0.1,5"),
    )
    assert block(plan)[0].shape == (4, 3, 16, 16)


def test_a_device_that_is_asked_for_a_value_reports_it() -> None:
    """Else the tests above would prove nothing."""
    with pytest.raises(RuntimeError, match="meta tensors"):
        torch.ones((), device=META).item()
