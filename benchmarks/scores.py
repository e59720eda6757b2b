"""What does a score cost, once the features are there: FID of 50,000 x 2,048, and precision and recall against 10,000?

Ours is the reduction as a run's tasks do it, without Ray: files of features are read and checked. For FID theirs is
numpy's mean and covariance of the same array in memory, and scipy's root of the product of the covariances, on all
cores. Extra memory is the peak of a fresh process beyond what it held before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy.linalg import sqrtm

from merge import memory_mib
from ray_sampler.scoring.features import Features, Held, StoredFeatures
from ray_sampler.scoring.metrics import ROWS, Moments, frechet, radii, reduce, within
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir
from table import Goal, Row, in_turn, parser, report

SAMPLES, REFERENCE, DIMS, SHARD = 50_000, 10_000, 2048, 512
FINGERPRINT, FOLDER = "ab" * 32, "features/inception-abababab"
TIME, MEMORY = Goal("at most", 1.2), Goal("at most", 1024, "ours")


def features_like(count: int, seed: int) -> np.ndarray:
    """(count, 2,048) float32, as correlated, skewed and never negative as Inception's."""
    random = np.random.default_rng(seed)
    mix = np.random.default_rng(0).standard_normal((256, DIMS), np.float32) / 16
    return np.maximum(random.standard_normal((count, 256), np.float32) @ mix, 0)


def fill(folder: Path, features: np.ndarray) -> None:
    ranges = RunDir(str(folder)).ranges(FOLDER)
    for start in range(0, len(features), SHARD):
        samples = Samples(start, {"features": features[start : start + SHARD]})
        data, _ = encode(samples, FINGERPRINT, {}, "parquet")
        ranges.write(FragmentName(start, samples.stop, "parquet"), data)


def stored(folder: Path) -> StoredFeatures:
    names = RunDir(str(folder)).ranges(FOLDER).list().fragments
    return StoredFeatures(str(folder), FOLDER, FINGERPRINT, DIMS, tuple(cover(names, SAMPLES)))


def fid(folder: Path, reference: Moments) -> float:
    return frechet(reduce(stored(folder)).moments, reference)


def fid_of_numpy(features: np.ndarray, reference: Moments) -> float:
    mu, sigma = features.mean(axis=0, dtype=np.float64), np.cov(features, rowvar=False)
    difference, root = mu - reference.mu, sqrtm(sigma @ reference.sigma)
    return float(difference @ difference + np.trace(sigma) + np.trace(reference.sigma) - 2 * np.trace(root).real)


def precision_and_recall(folder: Path, reference: np.ndarray) -> tuple[float, float]:
    """The parts that a run has as tasks, on all cores."""
    sides: tuple[Features, Features] = stored(folder), Held(reference)
    starts = [range(0, side.count, ROWS) for side in sides]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        balls = [
            np.concatenate(list(pool.map(partial(radii, side), places)))
            for side, places in zip(sides, starts, strict=True)
        ]
        found = [
            np.concatenate(
                list(pool.map(partial(within, sides[i], others=sides[1 - i], radii=balls[1 - i]), starts[i]))
            )
            for i in range(2)
        ]
    return float(found[0].mean()), float(found[1].mean())


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_here(folder: Path) -> None:
    with np.load(folder / "reference.npz") as held:
        reference = Moments(held["mu"], held["sigma"])
    before = memory_mib("VmRSS")
    fid(folder, reference)
    print(memory_mib("VmHWM") - before)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--measure", type=Path, help="internal: print the extra memory of one reduction in this folder")
    made.add_argument("--repeats", type=int, default=3)
    arguments = made.parse_args()
    if arguments.measure:
        measure_here(arguments.measure)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder, features, others = Path(name), features_like(SAMPLES, 1), features_like(REFERENCE, 2)
        fill(folder, features)
        reference = reduce(Held(others)).moments
        np.savez(folder / "reference.npz", mu=reference.mu, sigma=reference.sigma)
        values = fid(folder, reference), fid_of_numpy(features, reference)
        ours, theirs = in_turn(
            arguments.repeats,
            lambda: seconds(lambda: fid(folder, reference)),
            lambda: seconds(lambda: fid_of_numpy(features, reference)),
        )
        command = [sys.executable, __file__, "--measure", str(folder)]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found: list[tuple[float, float]] = []
        taken = seconds(lambda: found.append(precision_and_recall(folder, others)))
    rows = [
        Row("FID of 50,000 x 2,048 stored features, against numpy and scipy", ours, theirs, "s", TIME),
        Row("the same: extra memory", (memory,), (), "MiB", MEMORY),
        Row("precision and recall of 50,000 against 10,000, on all cores", (taken,), (), "s"),
    ]
    notes = [f"FID {values[0]:.8g}, numpy and scipy {values[1]:.8g}; precision and recall {found[0]}."]
    report(rows, notes, arguments.json)


if __name__ == "__main__":
    main()
