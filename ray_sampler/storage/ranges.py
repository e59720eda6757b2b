"""Folders of ranges: what is in them, which range each sample comes from, and which samples are missing."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.connect import Store
from ray_sampler.storage.fragment import Fragment, decode, decode_groups, explained, record_at_end
from ray_sampler.storage.local_store import LinkRefused
from ray_sampler.storage.record import (
    Column,
    DamagedFragment,
    FragmentName,
    MissingFragment,
    Record,
    Samples,
    in_order,
)
from ray_sampler.storage.retry import look_again
from ray_sampler.storage.store import UnreadableFile

logger = logging.getLogger(__name__)

PATIENCE_S = 4.0
"""How long files that cannot be seen are looked for again: in all, as a whole folder of them may be gone."""

FOOTER_BYTES = 64 * 2**10
"""Of a Parquet file's end: more than the footer of a range has."""

NOTE = ".reason.txt"
"""What the name of a rejected file's note ends in."""

FOREIGN = "it is a folder or a link"
READS_AT_ONCE = 4


class Listing(NamedTuple):
    """What lies in a folder of ranges."""

    fragments: list[FragmentName]
    """As `in_order` sorts them."""
    foreign: list[str]
    """Names of ranges that belong to folders and links, which are in the way of a file."""
    modified: dict[FragmentName, float]
    """Unix time of each range's last write, if the store has it."""


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


class RangeSet:
    """A folder of files, each of which holds columns of the samples [start, stop) that its name says.

    Args:
        rejects: the folder to which damaged files move.
        holds: columns without which a file is damaged; None means a column of any shape and dtype.
    """

    def __init__(self, store: Store, folder: str, rejects: str, holds: Mapping[str, Column | None]) -> None:
        self._store = store
        self.folder = folder
        self.rejects = rejects
        self.holds = holds
        self._patience_s = PATIENCE_S
        self._taken: set[str] | None = None
        """Names in `rejects`, once they were asked for."""

    def list(self, times: bool = False) -> Listing:
        """What is there, never from a cache; with `times`, when each was written, where the store says.

        What has no range's name is left out: it is not ours.
        """
        names, foreign, modified = [], [], {}
        for entry in self._store.list(self.folder, times):
            if (name := FragmentName.parse(entry.name)) is None:
                continue
            if not entry.is_file:
                foreign.append(entry.name)
                continue
            names.append(name)
            if entry.modified is not None:
                modified[name] = entry.modified
        return Listing(in_order(names), sorted(foreign), modified)

    def write(self, name: FragmentName, data: bytes) -> None:
        """Write a range, which is complete or absent."""
        self._store.put(f"{self.folder}/{name.filename}", data)

    def read(self, name: FragmentName, fingerprint: str | None) -> Fragment:
        """A range, taken in one read and checked in every way.

        Raises:
            MissingFragment: it is not there.
            DamagedFragment: it is corrupt, or of another run.
        """
        fragment = decode(self._bytes(name), name, fingerprint)
        self._check_columns(fragment.record)
        return fragment

    def read_groups(self, name: FragmentName, fingerprint: str | None) -> tuple[Record, Iterator[Samples]]:
        """As `read`, but the samples come group by group, and are proved when the last one was taken."""
        record, groups = decode_groups(self._bytes(name), name, fingerprint)
        self._check_columns(record)
        return record, groups

    def read_record(self, name: FragmentName, fingerprint: str | None) -> Record:
        """What a range says about itself. Of a Parquet file only the end is read, so its columns are not checked.

        Raises:
            DamagedFragment: it is missing, unreadable, corrupt, or of another run.
        """
        if name.format != "parquet":
            return self.read(name, fingerprint).record
        try:
            data = self._store.read_end(f"{self.folder}/{name.filename}", FOOTER_BYTES)
        except UnreadableFile as error:
            raise DamagedFragment(str(error)) from error
        if data is None:
            raise MissingFragment("it is not there any more")
        with explained(name):
            return record_at_end(data, name, fingerprint)

    def read_samples(self, start: int, stop: int, fingerprint: str | None) -> Samples:
        """The samples [start, stop), from whatever files hold them.

        Raises:
            DamagedFragment: a file is corrupt.
            RunError: a sample is missing.
        """
        parts = []
        for piece in cover(self.list().fragments, stop):
            first = max(piece.start, start)
            if first < piece.stop:
                parts.append(self.read(piece.fragment, fingerprint).samples.part(first, piece.stop))
        if sum(part.stop - part.start for part in parts) != stop - start:
            raise RunError(
                f"samples {start} to {stop - 1} are not all in {self._store.url}/{self.folder}; "
                "run the same command again"
            )
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        return Samples(start, columns)

    def check(self, names: Sequence[FragmentName], fingerprint: str | None, workers: int = 1) -> Checked:
        """Read and check files, `workers` at a time."""
        result = Checked()

        def read(name: FragmentName) -> Record | DamagedFragment:
            try:
                return self.read(name, fingerprint).record
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

    def verify(self, fingerprint: str | None) -> Checked:
        """Check every file, and reject what is damaged."""
        listing, notes = self.list(), self.noted()
        result = self.check(listing.fragments, fingerprint, READS_AT_ONCE)
        for name in result.records.keys() & notes.keys():
            self.clear(notes[name])
        result.rejected = [(filename, FOREIGN) for filename in listing.foreign]
        result.rejected += [(name.filename, reason) for name, reason in result.damaged]
        for filename, reason in result.rejected:
            self.reject(filename, reason)
        return result

    def _check_columns(self, record: Record) -> None:
        for name, column in self.holds.items():
            found = record.columns.get(name)
            if found is None or column not in (None, found):
                raise DamagedFragment(f"its column {name} is {found}, not {column}" if found else f"it has no {name}")

    def _bytes(self, name: FragmentName) -> bytes:
        path = f"{self.folder}/{name.filename}"
        began = time.monotonic()
        try:
            # Whoever asks knows that it was there, or was written a moment ago.
            data = look_again(lambda: self._store.read(path), f"{self._store.url}/{path}", self._patience_s)
        except UnreadableFile as error:
            raise DamagedFragment(str(error)) from error
        if data is None:
            self._patience_s -= time.monotonic() - began
            raise MissingFragment("it is not there any more")
        return data

    def reject(self, filename: str, reason: str) -> None:
        """Move a file or folder to where rejected ones lie, with `reason` beside it.

        What cannot be moved is left where it is, with a warning; its note stays, for `noted` to find.

        Raises:
            RequestError: a link is in the place of one of the two folders.
        """
        if not is_plain(filename):
            logger.warning("%s/%s holds %r, which cannot be moved", self._store.url, self.folder, filename)
            return
        target = urllib.parse.quote(filename, safe=" ", errors="surrogateescape").replace(" ", "%20")[:180]
        with housekeeping(f"{self.folder}/{filename} could not be moved to {self.rejects}/, and is not used"):
            if self._taken is None:
                self._taken = {entry.name for entry in self._store.list(self.rejects)}
            if target in self._taken:
                target = f"{target}.{secrets.token_hex(4)}"
            self._store.put(f"{self.rejects}/{target}{NOTE}", f"{reason}\n".encode())
            self._store.move(f"{self.folder}/{filename}", f"{self.rejects}/{target}")
            self._taken.add(target)

    def noted(self) -> dict[FragmentName, str]:
        """Ranges that were found damaged and could not be moved, with the path of the note about it.

        Each may have been replaced by a valid one since: only reading it shows that.
        """
        there = {entry.name for entry in self._store.list(self.rejects)}
        notes = {name.removesuffix(NOTE): f"{self.rejects}/{name}" for name in there if name.endswith(NOTE)}
        # Of a name that was rejected before, the note has some digits more.
        stayed = {FragmentName.parse(".".join(name.split(".")[:2])): notes[name] for name in notes.keys() - there}
        return {name: note for name, note in stayed.items() if name is not None}

    def clear(self, note: str) -> None:
        """Remove the note of a range that is whole."""
        with housekeeping(f"{note} could not be deleted"):
            self._store.remove(note)


@contextlib.contextmanager
def housekeeping(what: str) -> Iterator[None]:
    """Warn of a failure in what a run can do without."""
    try:
        yield
    except LinkRefused:
        raise
    except (RequestError, RunError) as error:
        logger.warning("%s: %s", what, error)


def is_plain(name: str) -> bool:
    """Whether a name is one step of a path, inside whatever folder it is put."""
    return bool(name) and name not in (".", "..") and "/" not in name and os.sep not in name and "\0" not in name


class Piece(NamedTuple):
    """Samples [start, stop) come from this fragment."""

    start: int
    stop: int
    fragment: FragmentName


def cover(fragments: Iterable[FragmentName], num_samples: int) -> list[Piece]:
    """The pieces that make up as much of [0, num_samples) as there is, in order and without overlap.

    Where fragments overlap, a sample comes from the first one `in_order`. In that order each fragment adds what lies
    beyond all before it, so one pass does.
    """
    pieces = []
    reached = 0
    for name in in_order(fragments):
        start, stop, _ = name
        # Plain comparisons: there may be a million names, and max() and min() take twice as long.
        if start < reached:
            start = reached
        if stop > num_samples:
            stop = num_samples
        if start < stop:
            pieces.append(Piece(start, stop, name))
            reached = stop
    return pieces


def missing(pieces: Iterable[Piece], num_samples: int) -> list[tuple[int, int]]:
    """The ranges of [0, num_samples) that `pieces`, as `cover` gives them, leave out."""
    gaps = []
    reached = 0
    for piece in pieces:
        if piece.start > reached:
            gaps.append((reached, piece.start))
        reached = piece.stop
    if reached < num_samples:
        gaps.append((reached, num_samples))
    return gaps
