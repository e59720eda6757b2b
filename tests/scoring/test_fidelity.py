"""FID, Inception Score, KID, precision and recall are torch-fidelity's own, on the same features."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler.scoring.features import Held
from ray_sampler.scoring.metrics import Head, frechet, kid_part, kid_subsets, radii, reduce, within

pytestmark = pytest.mark.usefixtures("torchvision")


def ours(one: np.ndarray, other: np.ndarray, head: Head) -> dict[str, float]:
    """Of generated and real features, and what makes logits of them, by torch-fidelity's names."""
    generated, real = Held(one), Held(other)
    reduced = reduce(generated, head)
    assert reduced.inception_score is not None
    kid = kid_part(generated, real, kid_subsets(len(one), len(other)))
    return {
        "frechet_inception_distance": frechet(reduced.moments, reduce(real).moments),
        "inception_score_mean": reduced.inception_score[0],
        "inception_score_std": reduced.inception_score[1],
        "kernel_inception_distance_mean": float(np.mean(kid)),
        "kernel_inception_distance_std": float(np.std(kid)),
        "precision": float(within(generated, 0, real, radii(real, 0)).mean()),
        "recall": float(within(real, 0, generated, radii(generated, 0)).mean()),
    }


def theirs(one: np.ndarray, other: np.ndarray, head: Head) -> dict[str, float]:
    """The same by torch-fidelity's functions of features."""
    fid: Any = importlib.import_module("torch_fidelity.metric_fid")
    kid: Any = importlib.import_module("torch_fidelity.metric_kid")
    generated, real = torch.from_numpy(one), torch.from_numpy(other)
    statistics = [fid.fid_features_to_statistics(features.double()) for features in (generated, real)]
    size = min(1000, len(one), len(other))
    result: dict[str, float] = {
        **fid.fid_statistics_to_metric(*statistics, verbose=False),
        **importlib.import_module("torch_fidelity.metric_isc").isc_features_to_metric(torch.from_numpy(head(one))),
        **kid.kid_features_to_metric(generated.double(), real.double(), kid_subset_size=size, verbose=False),
        **importlib.import_module("torch_fidelity.metric_prc").prc_features_to_metric(generated, real, verbose=False),
    }
    return {name: value for name, value in result.items() if name != "f_score"}


def test_the_same_on_the_same_features() -> None:
    random = np.random.default_rng(0)
    mix = random.standard_normal((48, 48)) / 5
    one = np.maximum(random.standard_normal((400, 48)) @ mix, 0).astype(np.float32)
    other = np.maximum(random.standard_normal((300, 48)) @ mix + 0.05, 0).astype(np.float32)
    weight = random.standard_normal((48, 11)).astype(np.float32)
    found, wanted = (tool(one, other, lambda features: features @ weight) for tool in (ours, theirs))
    assert 0.1 < wanted["precision"] < 1
    assert 0.1 < wanted["recall"] < 1
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-12)
