"""Spoil the bytes of fragments, thousands of times; to be run in a separate process, which a reader may crash.

python -m tests.faults.fuzz parquet 0 1000
"""

from __future__ import annotations

import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ray_sampler.storage.fragment import Fragment, decode, encode
from ray_sampler.storage.record import DamagedFragment, FragmentFormat, FragmentName
from tests.storage.fill import FINGERPRINT, make_samples

ROOM_BYTES = 512 * 2**20
"""Memory that the decoding of a fragment of a few kilobytes may take, libraries included."""

LONGEST_S = 5.0


def spoiled(data: bytes, other: bytes, chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Each byte flipped, each length, and `count` of each kind of chance; `other` is another fragment."""
    for i in range(len(data)):
        yield "flip", data[:i] + bytes([data[i] ^ 1 << chance.randrange(8)]) + data[i + 1 :]
    for i in range(len(data)):
        yield "truncation", data[:i]
    for _ in range(count):
        garbage = chance.randbytes(chance.randrange(1, 200))
        start, stop = sorted(chance.choices(range(len(data) + 1), k=2))
        where = chance.randrange(len(other))
        yield "extension", data + garbage
        yield "extension before", garbage + data
        yield "overwritten", data[:start] + garbage + data[start + len(garbage) :]
        yield "inserted", data[:start] + garbage + data[start:]
        yield "removed", data[:start] + data[stop:]
        yield "repeated", data[:stop] + data[start:]
        yield "spliced", data[:start] + other[where:]
        spots = bytearray(data)
        for _ in range(chance.randrange(2, 6)):  # near the end, where both formats keep their directory
            spots[-chance.randrange(1, min(len(data), 1500))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
        yield "several bytes", bytes(spots)


def equal(a: Fragment, b: Fragment) -> bool:
    """Whether two fragments hold the same, what computed them apart."""
    columns = [(a.samples.images, b.samples.images)]
    if a.samples.labels is not None and b.samples.labels is not None:
        columns.append((a.samples.labels, b.samples.labels))
    return a.record == b.record and all(np.array_equal(*pair) for pair in columns)


def attack(format: FragmentFormat, seed: int, count: int) -> Counter[str]:
    """How many spoiled fragments were found, and how many hold what they held.

    Raises:
        AssertionError: one holds something else, or took too long.
        Exception: one made the reader fail otherwise than by DamagedFragment.
    """
    chance = random.Random(seed)
    name = FragmentName(4, 9, format)
    labelled = bool(seed % 2)
    made = {"device": "cpu", "numerics_key": "k"}
    data, _ = encode(make_samples(4, 9, (4, 4, 3), labelled), FINGERPRINT, made, format)
    other, _ = encode(make_samples(4, 9, (4, 4, 3), labelled, seed=1), FINGERPRINT, made, format)
    whole = decode(data, name, FINGERPRINT)
    outcomes: Counter[str] = Counter()
    for kind, spoilt in spoiled(data, other, chance, count):
        began = time.process_time()
        try:
            fragment = decode(spoilt, name, FINGERPRINT)
        except DamagedFragment as damage:
            outcomes["found" if str(damage).isprintable() else "unprintable"] += 1
        except BaseException:
            print(f"{kind} of seed {seed}: {spoilt!r}", file=sys.stderr)
            raise
        else:
            swapped = equal(fragment, decode(other, name, FINGERPRINT))  # a splice at 0 is the other, whole
            assert equal(fragment, whole) or (kind == "spliced" and swapped), f"{kind} of seed {seed}: {spoilt!r}"
            outcomes["harmless"] += 1
        assert time.process_time() - began < LONGEST_S, f"{kind} of seed {seed} takes long: {spoilt!r}"
    return outcomes


if __name__ == "__main__":
    decode(encode(make_samples(0, 1), "f", {}, "parquet")[0], FragmentName(0, 1, "parquet"), None)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES,) * 2)
    print(dict(attack("npz" if sys.argv[1] == "npz" else "parquet", int(sys.argv[2]), int(sys.argv[3]))))
