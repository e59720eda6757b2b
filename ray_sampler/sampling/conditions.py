"""Conditions: what a network is given of each sample beside its state, as class labels. Solvers do not read it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ray_sampler.errors import RequestError, require
from ray_sampler.sampling.noise import Draws, on_device
from ray_sampler.storage.record import Column


class Condition(Protocol):
    """What the samples show."""

    @property
    def num_classes(self) -> int:
        """Of the labels that the scripts of EDM draw before their noise; 0 for no labels."""

    def at(self, draws: Draws, indices: Tensor, device: torch.device | None = None) -> Tensor:
        """What the network receives of the samples `indices`, (B,) int64: (B, ...), on `device` or beside them.

        Best made on the host of `indices` that are there, so that nothing waits for the device.
        """

    def null(self, y: Tensor) -> Tensor:
        """The null condition, shaped as y, for guidance."""

    def columns(self) -> dict[str, Column]:
        """What of it is stored."""

    def stored(self, y: Tensor) -> Mapping[str, Tensor]:
        """These columns, each (B, ...), of what `at` gave."""

    def identity(self) -> dict[str, Any]:
        """What of it decides a sample, flat."""


@dataclass(frozen=True)
class LabelRule:
    """Class labels. random: by seed and index; balanced: index mod num_classes; listed: `values`, repeated."""

    kind: Literal["random", "balanced", "listed"]
    num_classes: int
    values: np.ndarray | None = None
    """(n,) int64, for listed labels."""
    null_label: int | None = None
    """The null label (no class); None where the network has none."""

    def at(self, draws: Draws, indices: Tensor, device: torch.device | None = None) -> Tensor:
        """Labels, (B,) int64 in [0, num_classes)."""
        if self.kind == "random":
            return draws.labels(self.num_classes)
        device = device or indices.device
        if self.values is None:
            return on_device(indices % self.num_classes, device)
        return on_device(torch.from_numpy(self.values)[(indices % len(self.values)).cpu()], device)

    def null(self, y: Tensor) -> Tensor:
        assert self.null_label is not None, "guidance without a guide needs a null label"
        return torch.full_like(y, self.null_label)

    def columns(self) -> dict[str, Column]:
        return {"label": Column("int32")}

    def stored(self, y: Tensor) -> dict[str, Tensor]:
        return {"label": y.int()}

    def identity(self) -> dict[str, Any]:
        """The rule and the values used."""
        if self.values is None:
            return {"labels_rule": self.kind}
        digest = hashlib.sha256(self.values.astype("<i8").tobytes()).hexdigest()
        return {"labels_rule": self.kind, "labels_count": len(self.values), "labels_sha256": digest}


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
        raise RequestError(
            f"--labels {source} has {values[wrong[0]]} at position {wrong[0]}; labels must be from 0 to "
            f"{num_classes - 1}"
        )
    return LabelRule("listed", num_classes, values.astype(np.int64))
