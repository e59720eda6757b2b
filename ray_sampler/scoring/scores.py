"""A score: what is compared with what, what a request for it must satisfy, and what is written of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ray_sampler.errors import redact, require
from ray_sampler.networks.family import Network, NetworkSpec, as_it_is
from ray_sampler.sampling.finish import Product
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.extractors import open_extractor
from ray_sampler.scoring.features import FEATURES
from ray_sampler.scoring.inception import spatial_of
from ray_sampler.scoring.metrics import NEIGHBOUR, SPLITS, kid_subset_size
from ray_sampler.scoring.options import FUNCTION, ScoreOptions
from ray_sampler.scoring.references import Reference, open_reference
from ray_sampler.storage.record import Column
from ray_sampler.storage.run_dir import FEATURES as FEATURES_FOLDER

FEWEST = {"fid": 2, "kid": 2, "pr": NEIGHBOUR + 1, "is": SPLITS, "sfid": 2}
"""Samples that a metric needs."""


@dataclass(frozen=True)
class Scoring:
    """What samples are compared with, by which features."""

    asked: tuple[str, ...]
    """Metrics."""
    extractor: Extractor
    reference: Reference
    spatial: Extractor | None = None
    """Of sFID, where that is asked for."""

    def check_count(self, count: int) -> None:
        """Raises RequestError: there are too few samples, or pictures of the reference, for what is asked for."""
        held = (self.reference.features, self.reference.images)
        there = len(held[0]) if held[0] is not None else held[1].num_samples if held[1] else None
        for metric in self.asked:
            fewest = FEWEST[metric]
            require(count >= fewest, f"--metrics {metric} needs {fewest} samples, and there are {count}")
            require(
                metric in ("is", "sfid") or there is None or there >= fewest,
                f"--metrics {metric} needs {fewest} pictures of a reference, and {self.reference.name} has {there}",
            )

    def notes(self, count: int) -> list[str]:
        """What the user should know of a score of this number of samples."""
        notes = []
        if "fid" in self.asked and count <= self.extractor.dims:
            notes.append(
                f"{count:,} samples do not determine a covariance of {self.extractor.dims:,} features, so their FID is "
                "biased upwards: compare it with that of as many samples only"
            )
        if not self.checked:
            notes.append(
                f"{self.reference.name} does not say which features it is of; they are taken for those of "
                f"{self.extractor.name}, unchecked"
            )
        return notes

    @property
    def checked(self) -> bool:
        """Whether the reference is known to be of the extractor's features."""
        return self.reference.extractor is not None or self.reference.images is not None

    def identity(self, count: int) -> dict[str, Any]:
        """What of scores.json is not measured."""
        return {
            "num_samples": count,
            "features": {"name": self.extractor.name, "sha256": self.extractor.sha256},
            "reference": {"name": self.reference.name, "sha256": self.reference.sha256, "checked": self.checked},
            "resize": self.extractor.resize,
        }

    def result(self, count: int, reference_count: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The content of scores.json."""
        subsets = {"kid_subset_size": kid_subset_size(count, reference_count)} if "kid" in self.asked else {}
        return self.identity(count) | subsets | {"metrics": dict(metrics)}

    def answered_by(self, scores: Mapping[str, Any], count: int) -> bool:
        """Whether the content of a scores.json is what this would give for this number of samples."""
        wanted = {name for metric in self.asked for name in KEYS[metric]}
        return scores.items() >= self.identity(count).items() and scores.get("metrics", {}).keys() == wanted


KEYS = {"fid": ("fid",), "is": ("is",), "kid": ("kid",), "pr": ("precision", "recall"), "sfid": ("sfid",)}
"""Under which scores.json has a metric."""


def open_scoring(options: ScoreOptions, shape: tuple[int, ...], flag: str = "--score") -> Scoring:
    """Open the extractor and the reference that a request names.

    Args:
        shape: (H, W, C) of the pictures.
        flag: that named the reference, for messages.

    Raises:
        RequestError: they cannot be read, do not fit each other, or lack what a metric needs.
    """
    assert options.score is not None
    extractor = open_extractor(options, shape)
    reference = open_reference(options.score, extractor, flag)
    lacking = (
        f"{reference.name} has mu and sigma alone, so give an archive, a run, a folder of pictures, or a file of "
        "`ray-sampler reference`"
    )
    for metric in options.asked:
        require(
            metric not in ("kid", "pr") or reference.features is not None or reference.images is not None,
            f"--metrics {metric} needs pictures or features of the reference; {reference.refused or lacking}",
        )
        require(
            metric != "is" or extractor.head is not None,
            f"--metrics is needs the logits of a classifier, which {extractor.name} does not give; leave it out, or "
            "give --features inception or digits",
        )
        require(
            metric != "sfid" or (extractor.name == "inception" and reference.spatial is not None),
            "--metrics sfid needs --features inception and a reference with mu_s and sigma_s, and these are "
            f"{extractor.name} and {reference.name}; give guided-diffusion's VIRTUAL file, or one of `reference` with "
            "inception",
        )
    spatial = spatial_of(extractor) if "sfid" in options.asked else None
    if spatial and reference.spatial:
        found, dims = [each.shape for each in reference.spatial], spatial.dims
        require(
            found == [(dims,), (dims, dims)],
            f"{flag} is {redact(options.score)}, whose mu_s and sigma_s are of shapes {found[0]} and {found[1]}; sFID "
            f"needs {dims} features",
        )
    return Scoring(options.asked, extractor, reference, spatial)


def folder_of(extractor: Extractor) -> str:
    """The folder of its features in a run directory, which is named after its weights too."""
    name = re.sub(r"[^\w.-]+", "-", extractor.name.removeprefix(FUNCTION), flags=re.ASCII)
    return f"{FEATURES_FOLDER}/{name}-{extractor.sha256[:8]}"


def extract(images: Tensor, networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """(B, H, W, C) uint8 -> features (B, D) float32."""
    return {FEATURES: networks[FEATURES](images)}


def product_of(extractor: Extractor, folder: str | None = None) -> Product:
    """The features of pictures, as what a run keeps of its samples."""
    columns = {FEATURES: Column("float32", (extractor.dims,))}
    return Product(FEATURES, folder or folder_of(extractor), columns, "image", extract)


def network_of(extractor: Extractor) -> Network:
    """The extractor as a network that travels to actors."""
    return Network(
        spec=NetworkSpec(FEATURES, None, (3, 1, 1), None),
        build=lambda precision: extractor.network,
        prepare=as_it_is,
        tensors={},
        weights=extractor.sha256,
        parameters=0,
        by_value=extractor.by_value,
    )
