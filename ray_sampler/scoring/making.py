"""References of your own: pictures in, an npz of statistics out, which other evaluators read as well."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ray_sampler.errors import RunError, require
from ray_sampler.sampling.finish import derive
from ray_sampler.sampling.numerics import pin
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.extractors import open_extractor
from ray_sampler.scoring.features import FEATURES, in_blocks
from ray_sampler.scoring.inception import spatial_of
from ray_sampler.scoring.metrics import reduce
from ray_sampler.scoring.options import FeatureOptions
from ray_sampler.scoring.references import check_pictures
from ray_sampler.scoring.scores import product_of
from ray_sampler.storage.connect import check_output, open_store
from ray_sampler.storage.pictures import Pictures, open_pictures

KEPT = 10_000
"""Pictures that a reference holds, at most, for KID, precision and recall: as many as guided-diffusion's."""


@dataclass(frozen=True)
class Computed:
    """Features that are computed as they are asked for, in this process; of the shape of `features.Features`."""

    pictures: Pictures
    extractor: Extractor
    device: torch.device

    @property
    def count(self) -> int:
        return self.pictures.num_samples

    def blocks(self) -> Iterator[np.ndarray]:
        product, networks = product_of(self.extractor), {FEATURES: self.extractor.network.to(self.device)}
        threads = (os.cpu_count() or 1) if self.device.type == "cpu" else 1
        with ThreadPoolExecutor(threads, "features", torch.set_num_threads, (1,)) as pool:
            parts = (
                derive(product, each.images, each.start, networks, self.device, pool) for each in self.pictures.walk()
            )
            yield from in_blocks((part.start, part.columns[FEATURES]) for part in parts)


def make_reference(source: str, options: FeatureOptions, output: str) -> int:
    """Write mu, sigma and the first 10,000 pictures of an archive, a run or a folder, and which extractor it was.

    With inception also mu_s and sigma_s, the statistics of sFID. Returns how many pictures there were.

    Raises:
        RequestError: there are no two pictures, an option is wrong, or nothing can be written to the output.
        RunError: features are not finite, or reading or writing failed.
    """
    check_output(output)
    require(output.endswith(".npz"), f"--output is {output!r}; it must end in .npz, as the readers of references want")
    options.check()
    pictures = open_pictures(source)
    check_pictures(pictures, f"the pictures are {pictures.url}")
    extractor = open_extractor(options, pictures.shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pin(device, "off")
    arrays = statistics(Computed(pictures, extractor, device), "")
    if extractor.name == "inception":
        arrays |= statistics(Computed(pictures, spatial_of(extractor), device), "_s")
    arrays |= {"extractor": np.array(extractor.name), "sha256": np.array(extractor.sha256)}
    folder, _, name = output.rpartition("/")
    size = min(KEPT, pictures.num_samples) * int(np.prod(pictures.shape)) + sum(each.nbytes for each in arrays.values())
    open_store(folder or ("/" if output.startswith("/") else ".")).upload(name, npz(pictures, arrays), size)
    return pictures.num_samples


def statistics(features: Computed, suffix: str) -> dict[str, np.ndarray]:
    """Raises RunError: they are not finite."""
    mu, sigma = reduce(features).moments
    if not np.isfinite(mu).all():
        raise RunError(f"{features.extractor.name} gave features that are not finite; check its weights")
    return {f"mu{suffix}": mu, f"sigma{suffix}": sigma}


def npz(pictures: Pictures, arrays: dict[str, np.ndarray]) -> Iterator[bytes]:
    """An npz file, piece by piece: the first pictures as arr_0, and arrays by name."""
    count, sink = min(KEPT, pictures.num_samples), Sink()
    rows = (each.images[: max(0, count - each.start)] for each in pictures.walk())
    members: Iterable[tuple[str, str, tuple[int, ...], Iterable[np.ndarray]]] = [
        ("arr_0", "|u1", (count, *pictures.shape), rows),
        *((name, array.dtype.str, array.shape, [array]) for name, array in arrays.items()),
    ]
    with zipfile.ZipFile(sink, "w") as archive:
        for name, dtype, shape, parts in members:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(part.tobytes())
                    yield sink.taken()
    yield sink.taken()


class Sink(io.RawIOBase):
    """A target for a zip file whose bytes are passed on at once."""

    def __init__(self) -> None:
        self.held: list[bytes] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]  # zipfile gives bytes alone
        self.held.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        """What was written since."""
        data, self.held = b"".join(self.held), []
        return data
