"""Tasks beside the actors: checking old fragments, and merging all of them into the archive."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import ray

from ray_sampler.reporting.pixels import PixelStatistics
from ray_sampler.reporting.preview import choose_indices
from ray_sampler.reporting.sheet import TILES, Tile, tiles_of
from ray_sampler.storage.archive import Content, DamagedPiece, merge
from ray_sampler.storage.archive_layout import ArchiveLayout
from ray_sampler.storage.ranges import Piece
from ray_sampler.storage.record import DamagedFragment, FragmentName, MissingFragment, Record, Samples
from ray_sampler.storage.run_dir import RunDir

PICTURES = 20_000
PICTURE_BYTES = 128 * 2**20
"""Images that the pixel statistics look at, at most, evenly spaced: so that their cost does not grow with N."""

PACK_PIECES = 4096
"""Pieces that are pickled at once."""


@dataclass(frozen=True)
class Checked:
    """Fragments that were read and checked."""

    records: dict[FragmentName, Record]
    damaged: list[tuple[FragmentName, str]]
    """With the reason."""
    gone: list[FragmentName]
    """Those that this node does not see."""


@dataclass(frozen=True)
class Merged:
    """The archive, and what was seen of its content on the way."""

    layout: ArchiveLayout
    pixels: PixelStatistics
    labels: Counter[int] | None
    tiles: dict[int, Tile]
    """For the contact sheet, by index."""


@dataclass(frozen=True)
class Damage:
    """Why there is no archive: a fragment failed its check."""

    fragment: FragmentName
    reason: str
    changed: bool
    """Whether it is whole by itself, but another than the one counted on."""
    gone: bool
    """Whether the merging node does not see it."""


def check(output: str, fingerprint: str, names: Sequence[FragmentName]) -> Checked:
    """Read and check fragments, one at a time."""
    run_dir = RunDir(output)
    records: dict[FragmentName, Record] = {}
    damaged: list[tuple[FragmentName, str]] = []
    gone: list[FragmentName] = []
    for name in names:
        try:
            records[name] = run_dir.read_fragment(name, fingerprint).record
        except MissingFragment:
            gone.append(name)
        except DamagedFragment as error:
            damaged.append((name, str(error)))
    return Checked(records, damaged, gone)


def pack_pieces(pieces: Sequence[Piece], contents: Mapping[FragmentName, Content]) -> list[bytes]:
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
) -> Merged | Damage:
    """Write the archive, unless a fragment fails its check; raises RunError where the store fails.

    Args:
        packed: from `pack_pieces`.
    """
    pieces, contents = unpack_pieces(packed)
    pixels = PixelStatistics()
    labels: Counter[int] = Counter()
    most = max(1, min(PICTURES, PICTURE_BYTES // int(np.prod(image_shape))))
    every = -(-num_samples // most)
    wanted = choose_indices(num_samples, [(0, num_samples)], TILES)
    tiles: dict[int, Tile] = {}

    def look(samples: Samples) -> None:
        if samples.images.dtype == np.uint8:  # of latents there is nothing to say
            pixels.add(samples.images[-samples.start % every :: every])
        tiles.update(tiles_of(samples, wanted))
        if samples.labels is not None:
            values, counts = np.unique(samples.labels, return_counts=True)
            labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    try:
        layout = merge(
            RunDir(output), pieces, contents, num_samples, image_shape, labelled, fingerprint, on_samples=look
        )
    except DamagedPiece as damage:
        return Damage(damage.fragment, damage.reason, damage.changed, isinstance(damage.__cause__, MissingFragment))
    return Merged(layout, pixels, labels if labelled else None, tiles)


check_task = ray.remote(num_cpus=0, max_retries=3)(check)
merge_task = ray.remote(num_cpus=0, max_retries=3)(merge_fragments)
