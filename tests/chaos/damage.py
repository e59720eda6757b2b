"""Ways to spoil a fragment on disk, each of which a run must notice and repair."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ray_sampler.storage.record import FragmentName

Damage = Callable[[Path, Path, random.Random], None]
"""Spoils one fragment; the other path is a fragment of another run."""


def flip(victim: Path, foreign: Path, chance: random.Random) -> None:
    """A byte changes, somewhere among the images: what is not decoded may change and do no harm."""
    data = bytearray(victim.read_bytes())
    at = data.find(b"\xff" * 3, len(data) // 4) if chance.random() < 0.5 else len(data) // 4
    if len(data) > max(at, 4):
        data[max(at, 4)] ^= 1 << chance.randrange(8)
    victim.write_bytes(data)


def truncate(victim: Path, foreign: Path, chance: random.Random) -> None:
    """The end is missing."""
    os.truncate(victim, chance.randrange(max(1, victim.stat().st_size)))


def empty(victim: Path, foreign: Path, chance: random.Random) -> None:
    """Nothing is left."""
    os.truncate(victim, 0)


def garbage(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It is not a Parquet."""
    victim.write_bytes(chance.randbytes(victim.stat().st_size))


def exchange(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It has another fragment's name."""
    others = [path for path in victim.parent.iterdir() if path != victim]
    if not others:
        return empty(victim, foreign, chance)
    shutil.copyfile(chance.choice(others), victim)


def another_run(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It is of another run."""
    shutil.copyfile(foreign, victim)


def another_schema(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It is Parquet of something else."""
    pq.write_table(pa.table({"index": [1, 2, 3], "text": ["a", "b", "c"]}), victim)


def wrong_range(victim: Path, foreign: Path, chance: random.Random) -> None:
    """Its name says more than it holds, so that it covers its neighbours."""
    name = FragmentName.parse(victim.name)
    assert name
    victim.rename(victim.with_name(FragmentName(name.start, name.stop + 4, name.format).filename))


def not_a_fragment(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It has no fragment's name."""
    victim.rename(victim.with_name(f"{victim.stem} copy.parquet"))


def gone(victim: Path, foreign: Path, chance: random.Random) -> None:
    """It is deleted."""
    victim.unlink()


DAMAGES: tuple[Damage, ...] = (
    flip,
    truncate,
    empty,
    garbage,
    exchange,
    another_run,
    another_schema,
    wrong_range,
    not_a_fragment,
    gone,
)


def spoil(folder: Path, foreign: Path, count: int, chance: random.Random) -> list[str]:
    """Damage up to `count` fragments of a folder; returns the kinds."""
    kinds = []
    for _ in range(count):
        victims = [path for path in folder.glob("*.parquet") if FragmentName.parse(path.name)]
        if not victims:
            break
        damage = chance.choice(DAMAGES)
        try:
            damage(chance.choice(sorted(victims)), foreign, chance)
        except FileNotFoundError:
            continue  # the run set it aside a moment before
        kinds.append(damage.__name__)
    return kinds
