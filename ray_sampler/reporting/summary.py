"""What a run did, in figures: the content of summary.json, and the accumulators that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray_sampler.reporting.pixels import PixelStatistics

SUMMARY_FORMAT = 1
"""Raised whenever a key of summary.json changes its meaning."""

TIMELINE_POINTS = 500
"""Points of a timeline, at most."""


class Timeline:
    """Throughput and fleet size over time, in bounded memory.

    When it is full, every second point goes and points are taken half as often from then on.
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, float, int]] = []
        self._spacing_s = 1.0

    def add(self, elapsed_s: float, rate: float, actors: int) -> None:
        """At `elapsed_s` seconds after the first shard: `rate` samples a second, `actors` ready."""
        if self.points and elapsed_s < self.points[-1][0] + self._spacing_s:
            return
        self.points.append((elapsed_s, rate, actors))
        if len(self.points) > TIMELINE_POINTS:
            self.points = self.points[::2]
            self._spacing_s *= 2

    def as_json(self) -> dict[str, list[float]]:
        """Three lists of one length: elapsed_s, samples_per_second and actors."""
        return {
            "elapsed_s": [round(t, 3) for t, _, _ in self.points],
            "samples_per_second": [round(rate, 4) for _, rate, _ in self.points],
            "actors": [actors for _, _, actors in self.points],
        }


@dataclass(frozen=True)
class Part:
    """What computed the samples [start, stop) of a run."""

    start: int
    stop: int
    numerics: str
    """The numerics key: samples of equal keys are equal bit for bit."""
    device: str
    """The device's model, as people call it."""


def computed_by(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Who computed what: for each numerics key its device, the number of samples and the joined ranges [start, stop).

    Args:
        parts: without overlap, in any order.
    """
    rows: dict[str, dict[str, Any]] = {}
    for part in sorted(parts, key=lambda part: part.start):
        row = rows.setdefault(part.numerics, {"key": part.numerics, "device": part.device, "samples": 0, "ranges": []})
        row["samples"] += part.stop - part.start
        if row["ranges"] and row["ranges"][-1][1] == part.start:
            row["ranges"][-1][1] = part.stop
        else:
            row["ranges"].append([part.start, part.stop])
    return list(rows.values())


@dataclass(frozen=True)
class ArchiveMember:
    """A file within the archive."""

    name: str
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a run did."""

    fingerprint: str
    """64 hexadecimal digits."""
    settings: Mapping[str, Any]
    """Every setting under its flag's name, as `Run.as_json` gives them."""
    identity: Mapping[str, Any]
    """All that decides a sample's content, as `Run.identity` gives it."""
    num_samples: int
    nfe: int = 0
    """Evaluations of the denoiser for one sample."""
    sigmas: tuple[float, ...] = ()
    """The noise levels that the solver visits."""
    reused: int
    """Samples that earlier runs left."""
    computed: int
    """Samples that this run computed."""
    start_s: float
    """Seconds from the start of the driver to the first shard."""
    sampling_s: float
    """Seconds from the first shard to the last sample."""
    merge_s: float
    """Seconds that the archive took."""
    max_actors: int
    """Actors ready at one time, at most."""
    failures: int
    """Shards and actors that failed."""
    retries: int
    """Times that a shard was put back in the queue."""
    rejected: tuple[tuple[str, str], ...] = ()
    """Name and reason of every fragment set aside."""
    parts: tuple[Part, ...] = ()
    """Who computed what, without overlap."""
    archive: str = ""
    """The archive's name."""
    archive_bytes: int = 0
    archive_members: tuple[ArchiveMember, ...] = ()
    labels: Mapping[int, int] | None = None
    """Samples of each label; None for an unconditional model."""
    pixels: PixelStatistics | None = None
    timeline: Timeline | None = None
    device_s: tuple[float, float] | None = None
    """Seconds that GPUs computed, and that they had nothing to do between two shards; None for CPUs."""
    weights: Mapping[str, Any] = field(default_factory=dict)
    """By role of a network: url, sha256 of the file, hash of the weights, and key; only where a file was fetched."""

    @property
    def samples_per_second(self) -> float:
        """Samples that this run computed, a second of sampling."""
        return self.computed / self.sampling_s if self.sampling_s > 0 else 0.0

    def _of_gpus(self) -> dict[str, float]:
        if self.device_s is None:
            return {}
        return {"gpu_computing": round(self.device_s[0], 3), "gpu_idle": round(self.device_s[1], 3)}

    def as_json(self) -> dict[str, Any]:
        """The content of summary.json: plain JSON values, finite numbers only."""
        computed = computed_by(self.parts)
        return {
            "format": SUMMARY_FORMAT,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "identity": dict(self.identity),
            "num_samples": self.num_samples,
            "nfe": self.nfe,
            "sigmas": list(self.sigmas),
            "reused": self.reused,
            "computed": self.computed,
            "seconds": {
                "start": round(self.start_s, 3),
                "sampling": round(self.sampling_s, 3),
                "merge": round(self.merge_s, 3),
                **self._of_gpus(),
            },
            "samples_per_second": round(self.samples_per_second, 4),
            "max_actors": self.max_actors,
            "failures": self.failures,
            "retries": self.retries,
            "rejected": [{"name": name, "reason": reason} for name, reason in self.rejected],
            "computed_by": computed,
            "mixed_numerics": len(computed) > 1,
            "archive": {
                "name": self.archive,
                "bytes": self.archive_bytes,
                "members": [
                    {"name": member.name, "bytes": member.bytes, "crc32": f"{member.crc32:08x}"}
                    for member in self.archive_members
                ],
            },
            "labels": None if self.labels is None else {str(k): int(n) for k, n in sorted(self.labels.items())},
            "pixels": None if self.pixels is None or not self.pixels.images else self.pixels.as_json(),
            "timeline": (self.timeline or Timeline()).as_json(),
        } | ({"weights": dict(self.weights)} if self.weights else {})
