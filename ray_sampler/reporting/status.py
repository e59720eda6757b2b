"""The state of a run, from its directory, without a cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ray_sampler.errors import printable
from ray_sampler.reporting.progress import format_rate, format_seconds
from ray_sampler.reporting.scores import described
from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import FragmentName

RATE_FRAGMENTS = 20
"""Latest fragments that the rate comes from."""
QUIET_S = 120.0
"""Seconds without a new fragment after which a run counts as not running, at least; slow runs get five times their
usual interval."""
RANGES_SHOWN = 8
"""Missing ranges that are printed."""


class FragmentFact(NamedTuple):
    """What is known of a fragment: its name, and perhaps more."""

    name: FragmentName
    modified: float | None = None
    """Unix time of the last write, in seconds; None where the store does not say."""
    device: str | None = None
    """The model of the device that computed it; None where the record was not read."""
    numerics: str | None = None
    """Its numerics key; None where the record was not read."""


@dataclass(frozen=True)
class Status:
    """The state of a run."""

    fingerprint: str
    num_samples: int
    finished: int
    """Samples that exist."""
    missing: tuple[tuple[int, int], ...]
    """Ranges [start, stop) that do not exist, ascending."""
    archive: str | None
    """Name of the archive; None while there is none."""
    running: bool
    """Whether fragments arrived lately."""
    quiet_s: float | None
    """Seconds since the last fragment; None if unknown."""
    rate: float | None
    """Samples a second over the last fragments; None if unknown."""
    devices: tuple[tuple[str, int], ...]
    """Device models with their samples among the fragments whose records were read, most samples first."""
    numerics_keys: tuple[str, ...]
    """Numerics keys among them."""
    fragments: int = 0
    records_read: int = 0
    """Fragments whose records were read and are valid."""
    products: Mapping[str, int] = field(default_factory=dict)
    """Samples that exist of each product beside the pictures, by folder."""
    scores: Mapping[str, Any] | None = None
    """The content of scores.json."""
    archive_damaged: bool = False
    """Whether a file of the archive's name is there that is cut short or of another size."""

    @property
    def state(self) -> str:
        """done, sampling, sampled (only the archive is missing), stopped, or empty."""
        if self.archive is not None and not self.missing:
            return "done"
        if self.running and self.missing:
            return "sampling"
        return "sampled" if not self.missing else "stopped" if self.finished else "empty"

    @property
    def mixed_numerics(self) -> bool:
        """Whether different hardware, versions or batch sizes computed the run."""
        return len(self.numerics_keys) > 1

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last sample at the rate of the last fragments; None unless the run is running."""
        if not self.missing:
            return 0.0
        return (self.num_samples - self.finished) / self.rate if self.running and self.rate else None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, for scripts."""
        return {
            "state": self.state,
            "fingerprint": self.fingerprint,
            "num_samples": self.num_samples,
            "finished": self.finished,
            "missing": [list(gap) for gap in self.missing],
            "archive": self.archive,
            "quiet_s": self.quiet_s,
            "samples_per_second": self.rate,
            "eta_s": self.eta_s,
            "devices": dict(self.devices),
            "numerics_keys": list(self.numerics_keys),
            "mixed_numerics": self.mixed_numerics,
            "fragments": self.fragments,
            "records_read": self.records_read,
            "products": dict(self.products),
            "scores": self.scores,
            "archive_damaged": self.archive_damaged,
        }


def status(
    fingerprint: str, num_samples: int, fragments: Iterable[FragmentFact], archive: str | None, now: float
) -> Status:
    """The state of a run.

    Args:
        fingerprint: of the run.
        num_samples: samples that the run shall have.
        fragments: all that exist, in any order, possibly overlapping or beyond num_samples.
        archive: name of the archive, None if there is none.
        now: unix time in seconds.
    """
    facts = list(fragments)
    gaps = missing(cover((fact.name for fact in facts), num_samples), num_samples)
    samples: Counter[str] = Counter()
    for fact in facts:
        if fact.device is not None:
            samples[fact.device] += fact.name.stop - fact.name.start
    rate, quiet, running = _pace(facts, now)
    return Status(
        fingerprint=fingerprint,
        num_samples=num_samples,
        finished=num_samples - sum(stop - start for start, stop in gaps),
        missing=tuple(gaps),
        archive=archive,
        running=running,
        quiet_s=quiet,
        rate=rate,
        devices=tuple(sorted(samples.items(), key=lambda item: (-item[1], item[0]))),
        numerics_keys=tuple(sorted({fact.numerics for fact in facts if fact.numerics is not None})),
        fragments=len(facts),
        records_read=sum(fact.device is not None for fact in facts),
    )


def _pace(facts: Iterable[FragmentFact], now: float) -> tuple[float | None, float | None, bool]:
    """Samples a second over the last fragments, seconds since the last one, and whether that is usual.

    A pause of an earlier interruption does not count: only fragments after the last one are looked at.
    """
    written = sorted((fact.modified, fact.name.stop - fact.name.start) for fact in facts if fact.modified is not None)
    if not written:
        return None, None, False
    latest = written[-RATE_FRAGMENTS - 1 :]
    intervals = sorted(b[0] - a[0] for a, b in pairwise(latest))
    patience = max(QUIET_S, 5 * intervals[len(intervals) // 2] if intervals else 0.0)
    pauses = [i for i, (a, b) in enumerate(pairwise(latest), start=1) if b[0] - a[0] > patience]
    latest = latest[pauses[-1] if pauses else 0 :]
    span = latest[-1][0] - latest[0][0]
    rate = sum(samples for _, samples in latest[1:]) / span if span > 0 else None
    quiet = max(now - latest[-1][0], 0.0)
    return rate, quiet, quiet <= patience


def describe_ranges(ranges: Iterable[tuple[int, int]], shown: int = RANGES_SHOWN) -> str:
    """Ranges [start, stop) for people, first and last index each: 0-511, 1,024-1,535 and 3 more."""
    ranges = list(ranges)
    text = ", ".join(f"{start:,}-{stop - 1:,}" for start, stop in ranges[:shown])
    return f"{text} and {len(ranges) - shown:,} more" if len(ranges) > shown else text


def render(status: Status) -> Group:
    """A status for a terminal, 80 columns wide or less."""
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(status.state, style="bold green" if status.state == "done" else "bold cyan"),
        ProgressBar(total=max(status.num_samples, 1), completed=status.finished, width=24),
        Text(f"{status.finished:,} of {status.num_samples:,} samples"),
    )
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in _rows(status):
        rows.add_row(name, Text(printable(value, None)))
    return Group(head, rows)


def _rows(status: Status) -> list[tuple[str, str]]:
    rows = [("fingerprint", status.fingerprint)]
    if status.missing:
        rate, eta = status.rate, status.eta_s
        rows += [
            ("missing", describe_ranges(status.missing)),
            ("rate", "unknown" if rate is None else f"{format_rate(rate)} over the last fragments"),
            ("ETA", "unknown while nothing arrives" if eta is None else format_seconds(eta)),
        ]
    if status.quiet_s is not None:
        rows.append(("last fragment", f"{format_seconds(status.quiet_s)} ago"))
    if status.devices:
        devices = ", ".join(f"{device} ({samples:,} samples)" for device, samples in status.devices)
        part = f", in {status.records_read:,} of {status.fragments:,} fragments that were looked at"
        rows.append(("devices", devices + (part if status.records_read < status.fragments else "")))
    if status.mixed_numerics:
        keys = f"{len(status.numerics_keys)} numerics keys"
        rows.append(("mixed", f"{keys}: pixels may differ by rounding from a run on one kind"))
    rows += [(folder, f"{samples:,} samples") for folder, samples in status.products.items()]
    lacking = "damaged (another size); rerun the command to write it" if status.archive_damaged else "not written yet"
    rows.append(("archive", status.archive or lacking))
    if status.scores:
        rows.append(("score", described(status.scores)))
    return rows
