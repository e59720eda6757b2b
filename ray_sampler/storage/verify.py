"""Check every file of a product of a run, and move damaged ones to rejected/."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ray_sampler.storage.record import DamagedFragment, FragmentName, MissingFragment, Record
from ray_sampler.storage.run_dir import FRAGMENTS, RunDir

FOREIGN = "it is a folder or a link"


@dataclass
class Verification:
    """What a check of all files found."""

    records: dict[FragmentName, Record] = field(default_factory=dict)
    """Of the whole ones."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """File name and reason of each that is damaged."""


def verify(run_dir: RunDir, fingerprint: str | None, folder: str = FRAGMENTS, workers: int = 4) -> Verification:
    """Read and check every file of a folder of ranges, `workers` at a time, and reject what is damaged."""
    ranges = run_dir.ranges(folder)
    listing, notes = ranges.list(), ranges.noted()
    result = Verification()
    damaged = [(filename, FOREIGN) for filename in listing.foreign]

    def check(name: FragmentName) -> Record | DamagedFragment:
        try:
            return ranges.read(name, fingerprint).record
        except DamagedFragment as damage:
            return damage

    with ThreadPoolExecutor(workers) as pool:
        for name, found in zip(listing.fragments, pool.map(check, listing.fragments), strict=True):
            if isinstance(found, Record):
                result.records[name] = found
                if name in notes:
                    ranges.clear(notes[name])
            elif not isinstance(found, MissingFragment):
                damaged.append((name.filename, str(found)))
    for filename, reason in damaged:
        ranges.reject(filename, reason)
    result.rejected += damaged
    return result
