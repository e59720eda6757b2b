"""Fill a run directory with samples that are told apart by their bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import FragmentName, Record, Samples
from ray_sampler.storage.run_dir import RunDir

FINGERPRINT = "ab" * 32
NAME = FragmentName(0, 4, "parquet")


def make_samples(start: int, stop: int, shape=(8, 8, 3), labelled=True, seed=0) -> Samples:
    """Samples that are a function of seed and index alone."""
    images = np.stack([np.random.default_rng([seed, i]).integers(0, 256, shape, np.uint8) for i in range(start, stop)])
    labels = np.array([(i * 7 + seed) % 10 for i in range(start, stop)], np.int32) if labelled else None
    return Samples.of(start, images, labels)


def encoded(format, start=4, stop=12, **kwargs):
    """A fragment's name, its file, its record and what is in it."""
    samples = make_samples(start, stop, **kwargs)
    data, record = encode(samples, FINGERPRINT, {"device": "cpu", "seconds": 1.5}, format)
    return FragmentName(start, stop, format), data, record, samples


def fill(run_dir: RunDir, names: Sequence[FragmentName], **kwargs) -> dict[FragmentName, Record]:
    """Write a fragment under each name."""
    records = {}
    for name in names:
        data, records[name] = encode(
            make_samples(name.start, name.stop, **kwargs), FINGERPRINT, {"device": "cpu"}, name.format
        )
        run_dir.fragments.write(name, data)
    return records


def names_in(run_dir: RunDir, folder: str = "") -> set[str]:
    return {entry.name for entry in run_dir._store.list(folder)}
