"""What ranges a run has of each product: those of earlier starts, checked while sampling runs, and the new ones."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import ray

from ray_sampler.cluster.calls import reason_of
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.session import beside_driver
from ray_sampler.cluster.shards import cut
from ray_sampler.cluster.tasks import check_fragments, check_task
from ray_sampler.cluster.worker import IMAGES, Task
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import Reporter
from ray_sampler.reporting.summary import Part
from ray_sampler.storage.archive import Content, DamagedPiece, content_of
from ray_sampler.storage.ranges import FOREIGN, Checked, Listing, Piece, RangeSet, cover, missing
from ray_sampler.storage.record import FragmentName, Record

CHECK_FRAGMENTS = 32
"""Files that one task checks."""

CHECK_TASKS = 4
"""Such tasks at once."""

REPLACE_SHARE = 20
"""Looking for the gaps that damaged files leave takes a twentieth of the time at most."""


END = (sys.maxsize, sys.maxsize)
"""A range beyond all others."""


class Shelf:
    """The ranges of one product, by name, and which of them are known to be whole."""

    def __init__(self, ranges: RangeSet, num_samples: int, overwrite: bool) -> None:
        self.ranges = ranges
        self.num_samples = num_samples
        listing = Listing([], [], {}) if overwrite else ranges.list()
        self.foreign = listing.foreign
        # Keys keep the order in which fragments come, which is nearly the sorted one: with a million of them a
        # set's order costs seconds to sort.
        self.names = dict.fromkeys(listing.fragments)
        self.known: dict[FragmentName, Content | None] = {}
        """Those that were checked, or written by this run; of fragments with what the archive needs of them."""
        self._pieces: list[Piece] | None = None
        """What `cover` gives for the names, until those change."""
        self.recheck()

    def recheck(self) -> None:
        """Count none as known to be whole."""
        self.known.clear()
        self.to_check = [piece.fragment for piece in self.cover()][::-1]

    def cover(self) -> list[Piece]:
        """Which file each sample comes from, as far as there is one."""
        if self._pieces is None:
            self._pieces = cover(self.names, self.num_samples)
        return self._pieces

    def missing(self) -> list[tuple[int, int]]:
        """Ranges that no file covers, as far as is known."""
        return missing(self.cover(), self.num_samples)

    def add(self, name: FragmentName, content: Content | None) -> None:
        """A file was written."""
        self.names[name] = None
        self._pieces = None
        self.known[name] = content

    def drop(self, name: FragmentName) -> None:
        self.names.pop(name, None)
        self._pieces = None
        self.known.pop(name, None)

    def unchecked(self) -> bool:
        """Whether files that are needed have not been checked."""
        return any(piece.fragment not in self.known for piece in self.cover())

    def next_to_check(self) -> list[FragmentName]:
        return [self.to_check.pop() for _ in range(min(CHECK_FRAGMENTS, len(self.to_check)))]


class Inventory:
    """The ranges of a run directory, and what is known of them."""

    def __init__(self, job: Job, reporter: Reporter, run: int = 0) -> None:
        self.job = job
        self.run = run
        """The job's place among those that share a pool."""
        self.reporter = reporter
        self.rejected: list[tuple[str, str]] = []
        self._shared: dict[Any, Any] = {}
        """One copy of each value that most fragments have in common."""
        self.shelves = {IMAGES: Shelf(job.run_dir.ranges(), job.num_samples, job.overwrite)}
        for name, product in job.products.items():
            ranges = job.run_dir.ranges(product.folder, product.columns)
            self.shelves[name] = Shelf(ranges, job.num_samples, job.overwrite)
        self.fragments = self.shelves[IMAGES]
        self.checking: dict[ray.ObjectRef[Checked], Shelf] = {}
        self.damage: list[tuple[Shelf, Checked]] = []
        """What checks found since the gaps were last looked for."""
        self.due = time.monotonic()
        for shelf in self.shelves.values():
            for filename in shelf.foreign:
                self._reject(shelf, filename, FOREIGN)
            self._check_noted(shelf)

    def missing(self) -> list[tuple[int, int]]:
        """Ranges that no fragment covers, as far as is known."""
        return self.fragments.missing()

    def tasks(self) -> list[Task]:
        """What is to be sampled, as far as is known: what comes of it are all products."""
        gaps = self.missing()
        tasks = cut(self.job, gaps, self.run)
        for name in self.job.products:
            if self.job.products[name].takes == "x":
                tasks += cut(self.job, without(self.shelves[name].missing(), gaps), self.run, name)
        return tasks

    def products_to_make(self) -> list[Task]:
        """What the products lack that are made of pictures, once every picture is there."""
        made_of_pictures = [name for name, product in self.job.products.items() if product.takes == "image"]
        return [
            task for name in made_of_pictures for task in cut(self.job, self.shelves[name].missing(), self.run, name)
        ]

    def unchecked(self) -> bool:
        """Whether files that are needed have not been checked."""
        return any(shelf.unchecked() for shelf in self.shelves.values())

    def add(self, name: FragmentName, record: Record | None, product: str = IMAGES) -> None:
        """An actor wrote a range: of a product, or a fragment and the same range of all products."""
        if record is None:
            self.shelves[product].add(name, None)
            return
        for shelf in self.shelves.values():
            if shelf is self.fragments:
                shelf.add(name, self._content(record))
            else:
                shelf.add(name._replace(format="parquet"), None)

    def _content(self, record: Record) -> Content:
        """What the archive and the summary need of a record: there may be a million."""
        content = content_of(record)
        shared = {name: getattr(content, name) for name in ("image", "numerics", "device")}
        return content._replace(**{name: self._shared.setdefault(value, value) for name, value in shared.items()})

    def repair(self, damage: DamagedPiece) -> None:
        """Act on what the merge found: the range is sampled again, and as more may be wrong, all others are checked."""
        if damage.gone:
            self._forget(self.fragments, damage.fragment)
        elif not damage.changed:
            self.fragments.drop(damage.fragment)
            self._reject(self.fragments, damage.fragment.filename, damage.reason)
        self.fragments.recheck()

    def _reject(self, shelf: Shelf, filename: str, reason: str) -> None:
        """Move a file out of the way, so that its range is missing again."""
        self.rejected.append((filename, reason))
        self.reporter.message(f"rejected {filename}: {reason}", "warning")
        shelf.ranges.reject(filename, reason)

    def _forget(self, shelf: Shelf, name: FragmentName) -> None:
        """Count a file as missing that a node does not see; where it is there all the same, it stays."""
        shelf.drop(name)
        self.reporter.message(f"{name.filename} is not there any more; its samples are computed again", "warning")

    def _check_noted(self, shelf: Shelf) -> None:
        """Check the files that an earlier run found damaged and could not move, before they count as done."""
        notes = {name: note for name, note in shelf.ranges.noted().items() if name in shelf.names}
        if not notes:
            return
        checked = self._result(self._check(shelf, list(notes)))
        for name in checked.records:
            shelf.ranges.clear(notes[name])
        self._drop(shelf, checked)

    def check_some(self) -> list[Task] | None:
        """Collect checks that are done and start more; returns the shards to sample in place of damaged files.

        None says that nothing is left to check.
        """
        if not self.checking and not self.damage and not any(shelf.to_check for shelf in self.shelves.values()):
            return None
        if self.checking:
            for ref in ray.wait(list(self.checking), num_returns=len(self.checking), timeout=0)[0]:
                self._take(self.checking.pop(ref), self._result(ref))
        for shelf in self.shelves.values():
            while shelf.to_check and len(self.checking) < CHECK_TASKS:
                self.checking[self._check(shelf, shelf.next_to_check())] = shelf
        began = time.monotonic()
        if not self.damage or (began < self.due and self.checking):
            return []
        damage, self.damage = self.damage, []
        tasks = [
            task
            for product, shelf in self.shelves.items()
            for task in self._replace(product, shelf, [checked for each, checked in damage if each is shelf])
        ]
        # Among very many names this takes seconds: where many are damaged, it is not done for each.
        self.due = began + REPLACE_SHARE * (time.monotonic() - began)
        return tasks

    def check_here(self) -> bool:
        """Check everything in this process, which needs no Ray; returns whether all files are intact."""
        for shelf in self.shelves.values():
            while shelf.to_check:
                self._take(shelf, check_fragments(*self._request(shelf, shelf.next_to_check())))
        return not self.damage

    def _check(self, shelf: Shelf, names: list[FragmentName]) -> ray.ObjectRef[Checked]:
        return check_task.options(scheduling_strategy=beside_driver()).remote(*self._request(shelf, names))

    def _request(self, shelf: Shelf, names: list[FragmentName]) -> tuple[Any, ...]:
        return self.job.output, self.job.fingerprint, names, shelf.ranges.folder, shelf.ranges.holds

    def _take(self, shelf: Shelf, checked: Checked) -> None:
        """Take in what a check found."""
        for name, record in checked.records.items():
            if name in shelf.names:
                shelf.known[name] = self._content(record) if shelf is self.fragments else None
        if checked.damaged or checked.gone:
            self.damage.append((shelf, checked))

    def _replace(self, product: str, shelf: Shelf, found: list[Checked]) -> list[Task]:
        """Do without what is damaged or gone; returns what is to be sampled in place of it."""
        if not found:
            return []
        before = shelf.missing()
        for checked in found:
            self._drop(shelf, checked)
        # What the damaged ones had hidden is checked now.
        known = shelf.known.keys() | set(shelf.to_check)
        shelf.to_check += [piece.fragment for piece in shelf.cover() if piece.fragment not in known]
        gaps = without(shelf.missing(), before)
        if product == IMAGES:
            return cut(self.job, gaps, self.run)
        if self.job.products[product].takes == "image":
            return []  # they are made when every picture is there
        return cut(self.job, without(gaps, self.missing()), self.run, product)

    def _drop(self, shelf: Shelf, checked: Checked) -> None:
        """Do without what a check found damaged or gone."""
        for name, reason in checked.damaged:
            shelf.drop(name)
            self._reject(shelf, name.filename, reason)
        for name in checked.gone:
            self._forget(shelf, name)

    def _result(self, ref: ray.ObjectRef[Checked]) -> Checked:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise RunError(f"the fragments in {self.job.run_dir.url} cannot be checked: {reason_of(error)}") from error

    def seconds(self) -> float:
        """That actors took to compute the fragments in use, in whichever start that was, once nothing is missing."""
        contents = (self.fragments.known[piece.fragment] for piece in self.fragments.cover())
        return sum(content.seconds for content in contents if content)

    def parts(self) -> tuple[Part, ...]:
        """Who computed what, once nothing is missing."""

        def maker(piece: Piece) -> tuple[str, str]:
            content = self.fragments.known[piece.fragment]
            assert content
            return content.numerics, content.device

        runs = ((made, list(pieces)) for made, pieces in groupby(self.fragments.cover(), maker))
        return tuple(Part(pieces[0].start, pieces[-1].stop, *made) for made, pieces in runs)


def complete(job: Job) -> bool:
    """Whether all products of a job have all their ranges, from the names in their folders."""
    products = (job.run_dir.ranges(product.folder, product.columns) for product in job.products.values())
    return all(is_full(ranges, job.num_samples) for ranges in products)


def only_to_merge(job: Job) -> bool:
    """Whether a local run has every range of every product, from their names, so that it needs no Ray."""
    local = job.local and not (job.overwrite or job.scoring)
    return local and is_full(job.run_dir.ranges(), job.num_samples) and complete(job)


def is_full(ranges: RangeSet, num_samples: int) -> bool:
    """Whether a folder has all ranges up to `num_samples`, those not counted that an earlier start found damaged."""
    there = [name for name in ranges.list().fragments if name not in ranges.noted()]
    return not missing(cover(there, num_samples), num_samples)


def without(now: Iterable[tuple[int, int]], before: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts of the ranges `now` that are not in `before`; each is a sorted list of ranges without overlap."""
    result: list[tuple[int, int]] = []
    old = iter(before)
    known_start, known_stop = next(old, END)
    for start, stop in now:
        while start < stop:
            if known_stop <= start:
                known_start, known_stop = next(old, END)
                continue
            if start < known_start:
                result.append((start, min(stop, known_start)))
            start = known_stop
    return result
