"""The contact sheet of a run directory."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from ray_sampler.errors import RequestError, RunError
from ray_sampler.reporting.preview import choose_indices, class_rows, contact_sheet, reduced
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import DamagedFragment, FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir

PREVIEW = "preview.png"
STEPLESS = ("onestep", "multistep")
"""Solvers of which --steps does not say how many steps they take."""

TILES = 100
REDRAW_S = 20.0
REDRAW_SHARE = 50
"""Redrawing takes a fiftieth of the time at most."""
CLOSING_S = 2.0
NEW_FRAGMENTS = 25
"""Maximum number of fragments that one redrawing reads during the run."""


class Tile(NamedTuple):
    """One sample on the sheet."""

    image: np.ndarray
    """(H, W, C) as `reduced` makes it: small, as it goes from process to process."""
    label: int | None


def tiles_of(samples: Samples, wanted: Sequence[int]) -> dict[int, Tile]:
    """Those of the ascending indices `wanted` that `samples` hold."""
    here = wanted[bisect_left(wanted, samples.start) : bisect_left(wanted, samples.stop)]
    labels = samples.labels
    return {
        i: Tile(reduced(samples.images[i - samples.start]), None if labels is None else int(labels[i - samples.start]))
        for i in here
    }


def read_tiles(run_dir: RunDir, fingerprint: str, wanted: Mapping[FragmentName, Sequence[int]]) -> dict[int, Tile]:
    """Tiles of the samples `wanted` of some fragments; those of a damaged one are left out."""
    tiles: dict[int, Tile] = {}
    for name, indices in wanted.items():
        # The check that follows a damaged one reports it.
        with suppress(DamagedFragment):
            tiles |= tiles_of(run_dir.fragments.read(name, fingerprint).samples, indices)
    return tiles


Read = Callable[[Mapping[FragmentName, Sequence[int]]], dict[int, Tile]]
"""Reads tiles of the given samples of some fragments, wherever that is done."""


def arrays_of(tiles: Mapping[int, Tile]) -> tuple[np.ndarray, np.ndarray | None]:
    """Images (n, H, W, C) and labels (n,) of tiles in the order of their indices; None where they have none."""
    images, labels = zip(*(tiles[i] for i in sorted(tiles)), strict=True)
    return np.stack(images), None if labels[0] is None else np.array(labels)


def class_rows_of(tiles: Mapping[int, Tile]) -> dict[int, bytes] | None:
    """Pictures of each class on a sheet; None for an unconditional model."""
    images, labels = arrays_of(tiles)
    return None if labels is None else class_rows(images, labels)


def heading(settings: Mapping[str, Any], fingerprint: str) -> str:
    """A run in a few words, for its pictures; `settings` are those of run.json."""
    name, sampler, weight = str(settings["model"]).rpartition("/")[2], settings["sampler"], settings.get("guidance", 1)
    steps = "" if sampler in STEPLESS else f" {settings['steps']} steps"
    guided = "" if weight == 1 else f" · guidance {weight:g}"
    return f"{name} · {sampler}{steps}{guided} · seed {settings['seed']} · {fingerprint[:8]}"


class Sheet:
    """The tiles of a contact sheet, each read once.

    Args:
        read: how they are read; by this process unless given.
    """

    def __init__(
        self,
        run_dir: RunDir,
        fingerprint: str,
        num_samples: int,
        settings: Mapping[str, Any],
        read: Read | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.num_samples = num_samples
        self.title = heading(settings, fingerprint)
        self.tiles: dict[int, Tile] = {}
        self._read = read or partial(read_tiles, run_dir, fingerprint)

    def read(self, fragments: Iterable[FragmentName], most: int | None = None) -> dict[int, Tile]:
        """Evenly spaced samples of what `fragments` hold, by index; reads at most `most` new fragments."""
        pieces = cover(fragments, self.num_samples)
        wanted = choose_indices([(piece.start, piece.stop) for piece in pieces], TILES)
        starts = [piece.start for piece in pieces]
        holders: dict[FragmentName, list[int]] = {}
        for i in wanted:
            holders.setdefault(pieces[bisect_right(starts, i) - 1].fragment, []).append(i)
        new = ((name, here) for name, here in holders.items() if not self.tiles.keys() >= {*here})
        if chosen := dict(islice(new, most)):
            self.tiles |= self._read(chosen)
        return {i: self.tiles[i] for i in wanted if i in self.tiles}

    def draw(self, tiles: Mapping[int, Tile]) -> bytes:
        """A PNG of `tiles`, ordered by index."""
        caption = f"{len(tiles)} of {self.num_samples:,} samples, evenly spaced, by index"
        return contact_sheet(*arrays_of(tiles), self.title, caption)


class PreviewKeeper:
    """Redraws preview.png during a run, in a separate thread."""

    def __init__(
        self,
        run_dir: RunDir,
        fingerprint: str,
        num_samples: int,
        settings: Mapping[str, Any],
        names: Collection[FragmentName],
        read: Read | None = None,
    ) -> None:
        self.sheet = Sheet(run_dir, fingerprint, num_samples, settings, read)
        self.names = names
        """Of the run's fragments, as they come and go."""
        self.drawing: Thread | None = None
        self.drawn = 0
        self.due = time.monotonic()

    def redraw_when_due(self) -> None:
        if time.monotonic() < self.due or len(self.names) == self.drawn or (self.drawing and self.drawing.is_alive()):
            return
        self.due, self.drawn = time.monotonic() + REDRAW_S, len(self.names)
        # A daemon: a store that does not answer must not keep the process from ending.
        self.drawing = Thread(target=self._redraw, args=(tuple(self.names),), name="preview", daemon=True)
        self.drawing.start()

    def _redraw(self, names: tuple[FragmentName, ...]) -> None:
        began = time.monotonic()
        # The run's own loop reports errors of the store; the next redrawing tries again.
        with suppress(RequestError, RunError):
            if tiles := self.sheet.read(names, NEW_FRAGMENTS):
                self.sheet.run_dir.write_file(PREVIEW, self.sheet.draw(tiles))
        # Among very many fragments even looking takes seconds, which the driver would miss.
        self.due = max(self.due, began + REDRAW_SHARE * (time.monotonic() - began))

    def finish(self, tiles: Mapping[int, Tile]) -> bytes:
        """Draw the finished run's sheet and write it; returns it."""
        if self.drawing:
            self.drawing.join()
        png = self.sheet.draw(tiles)
        self.sheet.run_dir.write_view(PREVIEW, png)
        return png

    def close(self) -> None:
        """Wait for a redrawing that is near its end, so that nothing half-written stays."""
        if self.drawing:
            self.drawing.join(CLOSING_S)
