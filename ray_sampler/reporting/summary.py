"""What a run did, in figures: the content of summary.json, and the accumulators that it comes from.

`summary_of` takes, beside what its arguments' names say:
    fingerprint: 64 hexadecimal digits.
    settings: every setting under its flag's name, as `settings_json` gives them.
    identity: all that decides a sample's content.
    nfe: evaluations of the denoiser for one sample.
    sigmas: the noise levels that the solver visits.
    reused, computed: samples that earlier runs left, and that this run computed.
    seconds: computing: that actors took to compute the fragments of the archive, summed over all starts. Of this
        start: from the start of the driver to the first shard (start), from there to the last sample (sampling), to
        write the archive (merge); and of GPUs, that they computed (gpu_computing) and that they had nothing to do
        between two shards (gpu_idle).
    max_actors: actors ready at one time, at most.
    failures: shards and actors that failed; retries: times that a shard was put back in the queue.
    rejected: name and reason of every rejected fragment.
    parts: who computed what, without overlap.
    archive_members: name, bytes and CRC-32 of each array.
    labels: samples of each label; None for an unconditional model.
    made: when, where and by what: command, folder, output, date, commit, versions.
    weights: by role of a network: url, sha256 of the file, hash of the weights, and key; only where a file was fetched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Part(NamedTuple):
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


def summary_of(
    *,
    fingerprint: str,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    num_samples: int,
    nfe: int = 0,
    sigmas: Sequence[float] = (),
    reused: int,
    computed: int,
    seconds: Mapping[str, float],
    max_actors: int,
    failures: int,
    retries: int,
    rejected: Iterable[tuple[str, str]] = (),
    parts: Iterable[Part] = (),
    archive: str = "",
    archive_bytes: int = 0,
    archive_members: Iterable[tuple[str, int, int]] = (),
    labels: Mapping[int, int] | None = None,
    pixels: PixelStatistics | None = None,
    timeline: Timeline | None = None,
    weights: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of summary.json: plain JSON values, finite numbers only."""
    makers = computed_by(parts)
    return {
        "format": SUMMARY_FORMAT,
        "fingerprint": fingerprint,
        "settings": dict(settings),
        "identity": dict(identity),
        "num_samples": num_samples,
        "nfe": nfe,
        "sigmas": list(sigmas),
        "reused": reused,
        "computed": computed,
        "seconds": {stage: round(taken, 3) for stage, taken in seconds.items()},
        "samples_per_second": round(computed / seconds["sampling"], 4) if seconds["sampling"] > 0 else 0.0,
        "max_actors": max_actors,
        "failures": failures,
        "retries": retries,
        "rejected": [{"name": name, "reason": reason} for name, reason in rejected],
        "computed_by": makers,
        "mixed_numerics": len(makers) > 1,
        "archive": {
            "name": archive,
            "bytes": archive_bytes,
            "members": [{"name": name, "bytes": size, "crc32": f"{crc:08x}"} for name, size, crc in archive_members],
        },
        "labels": None if labels is None else {str(label): int(n) for label, n in sorted(labels.items())},
        "pixels": pixels.as_json() if pixels and pixels.images else None,
        "timeline": (timeline or Timeline()).as_json(),
    } | {name: dict(value) for name, value in (("weights", weights), ("made", made)) if value}
