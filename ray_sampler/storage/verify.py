"""Check files of a product of a run, and move damaged ones to rejected/."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ray_sampler.storage.ranges import RangeSet
from ray_sampler.storage.record import DamagedFragment, FragmentName, MissingFragment, Record
from ray_sampler.storage.run_dir import FRAGMENTS, RunDir

FOREIGN = "it is a folder or a link"


@dataclass
class Checked:
    """Files of a folder of ranges that were read and checked."""

    records: dict[FragmentName, Record] = field(default_factory=dict)
    """Of the valid ones."""
    damaged: list[tuple[FragmentName, str]] = field(default_factory=list)
    """With the reason."""
    gone: list[FragmentName] = field(default_factory=list)
    """Those that are not seen from here."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """File name and reason of each that `verify` moved."""


def check(ranges: RangeSet, names: Sequence[FragmentName], fingerprint: str | None, workers: int = 1) -> Checked:
    """Read and check files of a folder of ranges, `workers` at a time."""
    result = Checked()

    def read(name: FragmentName) -> Record | DamagedFragment:
        try:
            return ranges.read(name, fingerprint).record
        except DamagedFragment as damage:
            return damage

    with ThreadPoolExecutor(workers) as pool:
        for name, found in zip(names, pool.map(read, names), strict=True):
            if isinstance(found, Record):
                result.records[name] = found
            elif isinstance(found, MissingFragment):
                result.gone.append(name)
            else:
                result.damaged.append((name, str(found)))
    return result


def verify(run_dir: RunDir, fingerprint: str | None, folder: str = FRAGMENTS, workers: int = 4) -> Checked:
    """Check every file of a folder of ranges, and reject what is damaged."""
    ranges = run_dir.ranges(folder)
    listing, notes = ranges.list(), ranges.noted()
    result = check(ranges, listing.fragments, fingerprint, workers)
    for name in result.records.keys() & notes.keys():
        ranges.clear(notes[name])
    result.rejected = [(filename, FOREIGN) for filename in listing.foreign]
    result.rejected += [(name.filename, reason) for name, reason in result.damaged]
    for filename, reason in result.rejected:
        ranges.reject(filename, reason)
    return result
