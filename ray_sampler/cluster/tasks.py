"""Tasks beside the actors: checking old files, looking at pictures, and merging all fragments into the archive."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray

from ray_sampler.reporting.pixels import PixelStatistics
from ray_sampler.reporting.preview import choose_indices
from ray_sampler.reporting.sheet import TILES, Tile, read_tiles, tiles_of
from ray_sampler.storage.archive import Content, DamagedPiece, merge
from ray_sampler.storage.archive_layout import ArchiveLayout
from ray_sampler.storage.ranges import Checked, Piece
from ray_sampler.storage.record import Column, FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir

PIXEL_SAMPLES = 20_000
PIXEL_BYTES = 128 * 2**20
"""Images that the pixel statistics look at, at most, evenly spaced: so that their cost does not grow with N."""

PACK_PIECES = 4096
"""Pieces that are pickled at once."""


@dataclass(frozen=True)
class Merged:
    """The archive, and what was seen of its content on the way."""

    layout: ArchiveLayout
    pixels: PixelStatistics
    labels: Counter[int] | None
    tiles: dict[int, Tile]
    """For the contact sheet, by index."""


def check_fragments(
    output: str,
    fingerprint: str,
    names: Sequence[FragmentName],
    folder: str,
    holds: Mapping[str, Column | None],
) -> Checked:
    """Read and check files of a folder of ranges, one at a time; `holds` as of a RangeSet."""
    return RunDir(output).ranges(folder, holds).check(names, fingerprint)


def pack_pieces(pieces: Sequence[Piece], contents: Mapping[FragmentName, Content | None]) -> list[bytes]:
    """Pieces with the contents of their fragments, as `merge_fragments` takes them.

    Pickled a few thousand at a time: a pickler remembers every object that it has met, and there may be a million.
    """
    packs = (pieces[i : i + PACK_PIECES] for i in range(0, len(pieces), PACK_PIECES))
    return [pickle.dumps([(piece, contents[piece.fragment]) for piece in pack]) for pack in packs]


def unpack_pieces(packed: Iterable[bytes]) -> tuple[list[Piece], dict[FragmentName, Content]]:
    pieces: list[Piece] = []
    contents: dict[FragmentName, Content] = {}
    for pack in packed:
        for piece, content in pickle.loads(pack):
            pieces.append(piece)
            contents[piece.fragment] = content
    return pieces, contents


def merge_fragments(
    output: str,
    fingerprint: str,
    packed: Sequence[bytes],
    num_samples: int,
    image_shape: tuple[int, int, int],
    labelled: bool,
) -> Merged | DamagedPiece:
    """Write the archive, unless a fragment fails its check; raises RunError where the store fails.

    Args:
        packed: from `pack_pieces`.
    """
    pieces, contents = unpack_pieces(packed)
    seen = Seen(num_samples, image_shape)

    def viewer() -> Callable[[Samples], None]:
        nonlocal seen
        seen = Seen(num_samples, image_shape)
        return seen.add

    try:
        layout = merge(RunDir(output), pieces, contents, num_samples, image_shape, labelled, fingerprint, viewer)
    except DamagedPiece as damage:
        return damage
    return Merged(layout, seen.pixels, seen.labels if labelled else None, seen.tiles)


class Seen:
    """What one attempt at an archive has seen of its samples."""

    def __init__(self, num_samples: int, image_shape: tuple[int, int, int]) -> None:
        self.pixels = PixelStatistics()
        self.labels: Counter[int] = Counter()
        self.tiles: dict[int, Tile] = {}
        most = max(1, min(PIXEL_SAMPLES, PIXEL_BYTES // int(np.prod(image_shape))))
        self.every = -(-num_samples // most)
        self.wanted = choose_indices([(0, num_samples)], TILES)

    def add(self, samples: Samples) -> None:
        if samples.images.dtype == np.uint8:  # of latents there is nothing to say
            self.pixels.add(samples.images[-samples.start % self.every :: self.every])
        self.tiles |= tiles_of(samples, self.wanted)
        if samples.labels is not None:
            values, counts = np.unique(samples.labels, return_counts=True)
            self.labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def show(output: str, fingerprint: str, wanted: Mapping[FragmentName, Sequence[int]]) -> dict[int, Tile]:
    """Tiles of the samples `wanted` of some fragments; those of a damaged one are left out."""
    return read_tiles(RunDir(output), fingerprint, wanted)


show_task = ray.remote(num_cpus=0, max_retries=0)(show)
check_task = ray.remote(num_cpus=0, max_retries=3)(check_fragments)
merge_task = ray.remote(num_cpus=0, max_retries=0)(merge_fragments)  # the driver starts it again, with a warning
