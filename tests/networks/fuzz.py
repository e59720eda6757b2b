"""Spoil the bytes of snapshots, thousands of times; to be run in a separate process, which a reader may crash.

python -m tests.networks.fuzz 0 1000
"""

from __future__ import annotations

import io
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_sampler.networks import edm, edm2
from ray_sampler.networks.edm_family import dhariwal_to_adm
from ray_sampler.networks.nvidia import Refused, SavedNetwork, read_pickle
from tests.faults.fuzz import spoiled
from tests.networks.nvidia_files import random_tensors, snapshot

ROOM_BYTES = 256 * 2**20
"""Memory that the reading of a snapshot of a few kilobytes may take."""

LONGEST_S = 2.0

RUNS_CODE = ("compile", "exec", "import", "os.", "pickle.find_class", "subprocess.", "socket.", "open", "ctypes.")
"""Events of Python's audit that no reading may cause."""

watching = False


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if watching and event.startswith(RUNS_CODE):
        raise AssertionError(f"a snapshot led to {event} {arguments!r}")


def small(seed: int) -> bytes:
    """A snapshot of about 4 kB."""
    shapes = {"unet.out_gain": (), "unet.enc.8x8_conv.weight": (2, 3), "unet.emb_fourier.freqs": (2,)}
    arguments = {"img_resolution": 8, "channel_mult": [1, 2], "scale": np.float64(seed), "mean": np.ones(2)}
    return snapshot("Precond", random_tensors(shapes, seed, torch.float16), arguments, "StandardRGBEncoder")


NAMES = (
    ("torch_utils.persistence", "_reconstruct_persistent_obj"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)
WORDS = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "state", "class_name", "unet", "f4", "<")
PLAIN = (b")", b"}", b"]", b"\x8f", b"N", b"\x88", b"(", b"\x94", b"0", b"K\x00", b"K\x02", b"K\xff", b"C\x04abcd")
BUILDING = (b"R", b"\x81", b"b", b"s", b"u", b"a", b"e", b"t", b"\x85", b"\x86", b"\x87", b"\x90", b"\x91")


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def programs(chance: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Pickles of instructions by chance, within what looks like a network's state."""
    before = b"\x80\x04}" + text("ema") + name(*NAMES[0]) + b"}(" + text("class_name") + text("Precond") + text("state")
    for _ in range(count):
        tokens = [text(chance.choice(WORDS))]
        for _ in range(chance.randrange(1, 15)):
            get = b"h" + bytes([chance.randrange(8)])
            pools = (PLAIN, BUILDING, BUILDING, (get, text(chance.choice(WORDS)), name(*chance.choice(NAMES))))
            tokens.append(chance.choice(chance.choice(pools)))
        yield "program", before + b"}(" + b"".join(tokens) + b"uu\x85Rs."


def interpret(network: SavedNetwork) -> None:
    """What is done with a snapshot next, which may refuse it as well."""
    for reading in (edm.options_from, edm2.options_from, dhariwal_to_adm):
        with suppress(Refused):
            reading(network)
    with suppress(Refused):
        edm2.options_from_shapes(network.tensors)


def attack(seed: int, count: int) -> Counter[str]:
    """How many spoiled snapshots were refused, and how many read.

    Raises:
        AssertionError: one ran code, took long, or gave what is not data.
        Exception: one made the reader fail otherwise than by Refused.
    """
    global watching
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for kind, spoilt in chain(spoiled(small(seed), small(seed + 1), chance, count), programs(chance, 20 * count)):
        began = time.process_time()
        watching = True
        try:
            found = read_pickle(io.BytesIO(spoilt))
        except Refused as refusal:
            outcomes["refused" if str(refusal).isprintable() else "unprintable"] += 1
        except BaseException:
            print(f"{kind} of seed {seed}: {spoilt!r}", file=sys.stderr)
            raise
        else:
            size = sum(t.untyped_storage().nbytes() for network in found.values() for t in network.tensors.values())
            assert size <= len(spoilt), f"{kind} of seed {seed}: {spoilt!r}"
            for network in found.values():
                interpret(network)
            outcomes["read"] += 1
        finally:
            watching = False
        assert time.process_time() - began < LONGEST_S, f"{kind} of seed {seed} takes long: {spoilt!r}"
    return outcomes


if __name__ == "__main__":
    read_pickle(io.BytesIO(small(0)))  # imports what it needs
    sys.addaudithook(watch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES,) * 2)
    print(dict(attack(int(sys.argv[1]), int(sys.argv[2]))))
