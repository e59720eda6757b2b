"""Conditions: the class labels of a sample index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ray_sampler.errors import require
from ray_sampler.sampling.noise import Draws, on_device


@dataclass(frozen=True)
class LabelRule:
    """random: by seed and index; balanced: index mod num_classes; listed: `values`, repeated."""

    kind: Literal["random", "balanced", "listed"]
    num_classes: int
    values: np.ndarray | None = None
    """(n,) int64, for listed labels."""

    def labels(self, draws: Draws, indices: Tensor, device: torch.device | None = None) -> Tensor:
        """Labels of the samples `indices`, (B,) int64: (B,) int64 in [0, num_classes), on `device` or beside them.

        They are looked up on the host, so that none waits for the device where `indices` are there.
        """
        if self.kind == "random":
            return draws.labels(self.num_classes)
        device = device or indices.device
        if self.values is None:
            return on_device(indices % self.num_classes, device)
        return on_device(torch.from_numpy(self.values)[(indices % len(self.values)).cpu()], device)

    def identity(self) -> dict[str, Any]:
        """The rule and the values used, for the fingerprint."""
        if self.values is None:
            return {"rule": self.kind}
        return {
            "rule": self.kind,
            "count": len(self.values),
            "sha256": hashlib.sha256(self.values.astype("<i8").tobytes()).hexdigest(),
        }


def listed_labels(values: np.ndarray, num_classes: int, source: str) -> LabelRule:
    """Labels as given, (n,) integers.

    Raises:
        RequestError: there is none, or one is not in [0, num_classes).
    """
    require(
        values.ndim == 1 and values.size > 0, f"--labels {source} holds no list of labels; it must hold at least one"
    )
    wrong = np.flatnonzero((values < 0) | (values >= num_classes))
    if wrong.size:
        at = int(wrong[0])
        require(
            False, f"--labels {source} has {values[at]} at position {at}; labels must be from 0 to {num_classes - 1}"
        )
    return LabelRule("listed", num_classes, values.astype(np.int64))
