"""What fragments a run has: those that earlier runs left, checked while sampling runs, and the new ones."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import groupby
from typing import Any, NamedTuple

import ray

from ray_sampler.cluster.dispatch import tasks_of
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.pool import reason_of
from ray_sampler.cluster.session import beside_driver
from ray_sampler.cluster.shards import cut
from ray_sampler.cluster.tasks import Checked, Damage, check_task
from ray_sampler.cluster.worker import Task
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import Reporter
from ray_sampler.reporting.summary import Part
from ray_sampler.storage.archive import Content, content_of
from ray_sampler.storage.ranges import Piece, cover, missing
from ray_sampler.storage.record import FragmentName, Record
from ray_sampler.storage.verify import FOREIGN

CHECK_FRAGMENTS = 32
"""Fragments that one task checks."""

CHECK_TASKS = 4
"""Such tasks at once."""


END = (sys.maxsize, sys.maxsize)
"""A range beyond all others."""


class Maker(NamedTuple):
    """What computed a fragment."""

    numerics: str
    """The numerics key."""
    device: str


class Inventory:
    """The fragments of a run directory, by name, and what is known of them."""

    def __init__(self, job: Job, reporter: Reporter, run: int = 0) -> None:
        self.job = job
        self.run = run
        """The job's place among those that share a pool."""
        self.reporter = reporter
        self.num_samples = job.num_samples
        self.rejected: list[tuple[str, str]] = []
        self.contents: dict[FragmentName, Content] = {}
        """Of the fragments that were checked, or written by this run."""
        self.makers: dict[FragmentName, Maker] = {}
        """Of the same."""
        self._pieces: list[Piece] | None = None
        """What `cover` gives for the names, until those change."""
        self._shared: dict[Any, Any] = {}
        """One copy of each value that most fragments have in common."""
        listing = job.run_dir.fragments()
        # Keys keep the order in which fragments come, which is nearly the sorted one: with a million of them a
        # set's order costs seconds to sort.
        self.names = dict.fromkeys(listing.fragments)
        self.to_check = [piece.fragment for piece in self.cover()][::-1]
        self.checking: list[ray.ObjectRef[Checked]] = []
        for filename in listing.foreign:
            self._set_aside(filename, FOREIGN)

    def cover(self) -> list[Piece]:
        """Which fragment each sample comes from, as far as there is one."""
        if self._pieces is None:
            self._pieces = cover(self.names, self.num_samples)
        return self._pieces

    def missing(self) -> list[tuple[int, int]]:
        """Ranges that no fragment covers, as far as is known."""
        return missing(self.cover(), self.num_samples)

    def tasks(self) -> list[Task]:
        """What is to be sampled, as far as is known."""
        return cut(self.job, self.missing(), self.run)

    def products_to_make(self) -> list[Task]:
        """What the job's other products lack, once every picture is there."""
        return products_to_make(self.job, self.run)

    def missing_samples(self) -> int:
        return sum(stop - start for start, stop in self.missing())

    def unchecked(self) -> bool:
        """Whether fragments that the archive needs have not been checked."""
        return any(piece.fragment not in self.contents for piece in self.cover())

    def add(self, name: FragmentName, record: Record) -> None:
        """An actor wrote a fragment."""
        self.names[name] = None
        self._pieces = None
        self._know(name, record)

    def _know(self, name: FragmentName, record: Record) -> None:
        """Keep of a record what the archive and the summary need: there may be a million."""
        made = record.computed_by
        maker = Maker(str(made.get("numerics_key", "unknown")), str(made.get("device", "unknown")))
        self.makers[name] = self._shared.setdefault(maker, maker)
        content = content_of(record)
        self.contents[name] = content._replace(
            image_shape=self._shared.setdefault(content.image_shape, content.image_shape)
        )

    def reject(self, name: FragmentName, reason: str) -> None:
        """Set a fragment aside, so that its range is missing again."""
        self._drop(name)
        self._set_aside(name.filename, reason)

    def forget(self, name: FragmentName) -> None:
        """Count a fragment as missing that a node does not see; where it is there all the same, it stays."""
        self._drop(name)
        self.reporter.message(f"{name.filename} is not there any more; its samples are computed again", "warning")

    def _drop(self, name: FragmentName) -> None:
        self.names.pop(name, None)
        self._pieces = None
        self.contents.pop(name, None)
        self.makers.pop(name, None)

    def repair(self, damage: Damage) -> None:
        """Act on what the merge found: the range is sampled again, and as more may be wrong, all others are checked."""
        if damage.gone:
            self.forget(damage.fragment)
        elif not damage.changed:
            self.reject(damage.fragment, damage.reason)
        self.contents.clear()
        self.makers.clear()
        self.to_check = [piece.fragment for piece in self.cover()][::-1]

    def _set_aside(self, filename: str, reason: str) -> None:
        self.rejected.append((filename, reason))
        self.reporter.message(f"set aside {filename}: {reason}", "warning")
        self.job.run_dir.reject(filename, reason)

    def check_some(self) -> list[Task] | None:
        """Collect checks that are done and start more; returns the shards to sample in place of damaged fragments.

        None says that nothing is left to check.
        """
        if not self.to_check and not self.checking:
            return None
        done: list[ray.ObjectRef[Checked]] = []
        if self.checking:
            done, self.checking = ray.wait(self.checking, num_returns=len(self.checking), timeout=0)
        damaged: list[tuple[FragmentName, str]] = []
        gone: list[FragmentName] = []
        for checked in map(self._result, done):
            for name, record in checked.records.items():
                if name in self.names:
                    self._know(name, record)
            damaged += checked.damaged
            gone += checked.gone
        shards = self._replace(damaged, gone) if damaged or gone else []
        while self.to_check and len(self.checking) < CHECK_TASKS:
            names = [self.to_check.pop() for _ in range(min(CHECK_FRAGMENTS, len(self.to_check)))]
            task = check_task.options(scheduling_strategy=beside_driver())
            self.checking.append(task.remote(self.job.output, self.job.fingerprint, names))
        return shards

    def _replace(self, damaged: list[tuple[FragmentName, str]], gone: list[FragmentName]) -> list[Task]:
        """Do without fragments; what they had hidden is checked now, and what nothing else covers is to be sampled."""
        before = self.missing()
        for name, reason in damaged:
            self.reject(name, reason)
        for name in gone:
            self.forget(name)
        pieces = self.cover()
        known = self.contents.keys() | set(self.to_check)
        self.to_check += [piece.fragment for piece in pieces if piece.fragment not in known]
        gaps = newly(missing(pieces, self.num_samples), before)
        return cut(self.job, gaps, self.run)

    def _result(self, ref: ray.ObjectRef[Checked]) -> Checked:
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise RunError(f"the fragments in {self.job.run_dir.url} cannot be checked: {reason_of(error)}") from error

    def parts(self) -> tuple[Part, ...]:
        """Who computed what, once nothing is missing."""
        by_maker = groupby(self.cover(), lambda piece: self.makers[piece.fragment])
        runs = ((maker, list(pieces)) for maker, pieces in by_maker)
        return tuple(Part(pieces[0].start, pieces[-1].stop, maker.numerics, maker.device) for maker, pieces in runs)


def products_to_make(job: Job, run: int = 0) -> list[Task]:
    """What a job's products lack beside its pictures, from the names in their folders."""
    tasks: list[Task] = []
    for name, product in job.products.items():
        there = job.run_dir.ranges(product.folder).list().fragments
        gaps = missing(cover(there, job.num_samples), job.num_samples)
        tasks += tasks_of(gaps, job.run.shard_size, run, name)
    return tasks


def newly(now: Iterable[tuple[int, int]], before: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
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
