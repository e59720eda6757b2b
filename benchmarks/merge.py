"""How long does the merge take, and how much memory, against a plain copy of the archive and against np.savez?

Ours is the merge as a run does it: every fragment is read and checked, the pixel statistics are taken, and the archive
is on the disk when it ends. Theirs is shutil.copyfile of the finished archive, or np.savez of an array that is in
memory already, each followed by fsync. Extra memory is the peak of a fresh process beyond what it held before.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from ray_sampler.cluster.tasks import Merged, merge_fragments, pack_pieces
from ray_sampler.storage.archive import Content, content_of
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir
from table import Goal, Row, in_turn, parser, report

SIDE, SHARD = 64, 512
SHAPE = (SIDE, SIDE, 3)
FINGERPRINT = "ab" * 32
TIME, MEMORY = Goal("at most", 1.2), Goal("at most", 256, "ours")
GB = 10**9
DISK = 40 * GB
"""Fragments, archive and copy of 10 GB, and some room."""

Contents = dict[FragmentName, Content]


def samples_in(size: int) -> int:
    return size // (SIDE * SIDE * 3)


def fill(folder: Path, num_samples: int) -> Contents:
    """Fragments of random images and labels; what the merge counts on of each."""
    run_dir, contents = RunDir(str(folder)), {}
    images = np.random.default_rng(0).integers(0, 256, (SHARD, *SHAPE), np.uint8)
    for start in range(0, num_samples, SHARD):
        images[:, 0, 0, 0] = start // SHARD % 256
        stop = min(num_samples, start + SHARD)
        name = FragmentName(start, stop, "parquet")
        labels = np.arange(start, stop, dtype=np.int32) % 1000
        data, record = encode(Samples.of(start, images[: stop - start], labels), FINGERPRINT, {}, "parquet")
        run_dir.fragments.write(name, data)
        contents[name] = content_of(record)
    return contents


def merge(folder: Path, contents: Contents) -> Path:
    """The archive's path."""
    num_samples = max(name.stop for name in contents)
    packed = pack_pieces(cover(contents, num_samples), contents)
    merged = merge_fragments(str(folder), FINGERPRINT, packed, num_samples, SHAPE, True)
    assert isinstance(merged, Merged)
    return folder / RunDir(str(folder)).archive_name(num_samples, SHAPE)


def synced(path: Path) -> Path:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path


def fetch_memory(size: int) -> None:
    """Touch what a side needs: a virtual machine's host gives memory at first touch, and takes back what is idle."""
    np.ones(min(size, psutil.virtual_memory().available // 2), np.uint8)


def seconds(make: Callable[[], Path], size: int) -> float:
    """Seconds to make a file of `size`, which is removed again; both sides find the disk idle and memory at hand."""
    os.sync()
    fetch_memory(5 * size // 2)
    began = time.perf_counter()
    path = make()
    taken = time.perf_counter() - began
    path.unlink()
    return taken


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM, its peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def extra_mib(folder: Path, contents: Contents) -> float:
    """Peak memory of a merge in a fresh process, beyond what it held before."""
    given = folder / "contents.pickle"
    given.write_bytes(pickle.dumps(contents))
    command = [sys.executable, __file__, "--measure", str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_here(folder: Path) -> None:
    contents = pickle.loads((folder / "contents.pickle").read_bytes())
    before = memory_mib("VmRSS")
    merge(folder, contents).unlink()
    print(memory_mib("VmHWM") - before)


def rows_for(size: int, repeats: int, with_savez: bool) -> list[Row]:
    label = f"{size / GB:.0f} GB"
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        contents = fill(folder, samples_in(size))
        source = merge(folder, contents).rename(folder / "source.npz")
        target = folder / "target.npz"
        sides: list[Callable[[], Path]] = [
            lambda: merge(folder, contents),
            lambda: synced(Path(shutil.copyfile(source, target))),
        ]
        if with_savez:
            with np.load(source) as archive:
                arrays = [archive[key] for key in archive.files]

            def savez() -> Path:
                np.savez(target, *arrays)
                return synced(target)

            sides.append(savez)
        measured = in_turn(repeats, *(lambda side=side: seconds(side, size) for side in sides))
        rows = [Row(f"merge of {label}, against a plain copy", measured[0], measured[1], "s", TIME)]
        if with_savez:
            rows.append(Row(f"merge of {label}, against np.savez", measured[0], measured[2], "s"))
        memory = tuple(extra_mib(folder, contents) for _ in range(min(repeats, 3)))
        rows.append(Row(f"merge of {label}: extra memory", memory, (), "MiB", MEMORY))
    return rows


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--measure", type=Path, help="internal: print the extra memory of one merge in this folder")
    arguments = made.parse_args()
    if arguments.measure:
        measure_here(arguments.measure)
        return
    rows, notes = rows_for(GB, 7, with_savez=True), []
    if shutil.disk_usage(Path.cwd()).free > DISK:
        rows += rows_for(10 * GB, 3, with_savez=False)
    else:
        notes.append(f"10 GB need {DISK // GB} GB of disk, which this machine lacks: unmeasured.")
    report(rows, notes, arguments.json)


if __name__ == "__main__":
    main()
