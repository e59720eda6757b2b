"""Check every fragment of a run, and set aside what is none of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ray_sampler.storage.record import DamagedFragment, FragmentName, MissingFragment, Record
from ray_sampler.storage.run_dir import RunDir

FOREIGN = "its name is no fragment's, or it is a folder or a link"


@dataclass
class Verification:
    """What a check of all fragments found."""

    records: dict[FragmentName, Record] = field(default_factory=dict)
    """Of the whole ones."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """File name and reason of each that was set aside."""


def verify(run_dir: RunDir, fingerprint: str | None, workers: int = 4) -> Verification:
    """Read and check every fragment, `workers` at a time; the damaged and the foreign move to rejected/."""
    listing = run_dir.fragments()
    result = Verification()
    for filename in listing.foreign:
        run_dir.reject(filename, FOREIGN)
        result.rejected.append((filename, FOREIGN))

    def check(name: FragmentName) -> Record | DamagedFragment:
        try:
            return run_dir.read_fragment(name, fingerprint).record
        except DamagedFragment as damage:
            return damage

    with ThreadPoolExecutor(workers) as pool:
        for name, found in zip(listing.fragments, pool.map(check, listing.fragments), strict=True):
            if isinstance(found, Record):
                result.records[name] = found
            elif not isinstance(found, MissingFragment):
                run_dir.reject(name.filename, str(found))
                result.rejected.append((name.filename, str(found)))
    return result
