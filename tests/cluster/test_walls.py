"""A family, a solver, a decoder or a product is one object in one place, and the rest of the house serves it.

Each is registered as its author would do it; whole jobs then run on Ray, and end in bytes that are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray._private.state import state as cluster_state
from safetensors.torch import save_file

from ray_sampler.cluster.driver import RunResult, drive
from ray_sampler.cluster.job import Job, prepare
from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from ray_sampler.networks.opening import FAMILIES
from ray_sampler.reporting.progress import reporter
from ray_sampler.sampling.finish import FINISHERS
from ray_sampler.sampling.solvers import SOLVERS
from ray_sampler.storage.fragment import encode, read_fragment
from ray_sampler.storage.record import FragmentName, Samples
from tests.cluster.runs import fragments, savez
from tests.cluster.toys import COLOURS, GRAIN, MEANS, SIZE, mean_colours, negative
from tests.sampling.conftest import philox4x32_10

pytestmark = pytest.mark.usefixtures("local_ray", "registered")

N, SHARD = 22, 8
RANGES = [(0, 8), (8, 16), (16, 22)]
PALETTE = np.array([[0.5, -0.25, 0.0], [-0.75, 0.5, 0.25], [0.125, 0.0, -0.5]], np.float32)
"""The network's colours, one a class."""

Request = Callable[..., RunConfig]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of ours in its one place."""
    monkeypatch.setitem(FAMILIES, "colours", COLOURS)
    monkeypatch.setitem(SOLVERS, "grain", GRAIN)
    monkeypatch.setitem(FINISHERS, "negative", negative)


@pytest.fixture
def request_for(tmp_path: Path) -> Request:
    """A request for a run of ours into a folder of tmp_path."""
    save_file({"colours": torch.from_numpy(PALETTE)}, tmp_path / "colours.safetensors")

    def request(output: str, **flags: Any) -> RunConfig:
        given: dict[str, Any] = {
            "model": str(tmp_path / "colours.safetensors"),
            "output": str(tmp_path / output),
            "sampler": "grain",
            "decoder": "negative",
            "labels": "balanced",
            "num_samples": N,
            "batch_size": 4,
            "shard_size": SHARD,
            "gpus_per_actor": 0.0,
            "max_actors": 1,
        }
        return RunConfig(**given | flags)

    return request


def driven(jobs: Sequence[Job]) -> list[RunResult]:
    with reporter("none", False) as report:
        return drive(jobs, report)


def normals(seed: int, index: int, draw: int) -> np.ndarray:
    """A draw of a sample, from Python integers and the math module: (3, SIZE, SIZE) float32."""
    values: list[float] = []
    for block in range(3 * SIZE * SIZE // 4):
        words = philox4x32_10((block, draw, index % 2**32, index // 2**32), seed)
        for one, other in (words[:2], words[2:]):
            radius, angle = math.sqrt(-2 * math.log((one + 0.5) / 2**32)), 2 * math.pi * other / 2**32
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(values, np.float32).reshape(3, SIZE, SIZE)


def expected(seed: int = 42, count: int = N) -> Samples:
    """What the family, the solver and the decoder mean, in numpy."""
    images, labels = [], np.arange(count, dtype=np.int32) % len(PALETTE)
    for index, label in enumerate(labels):
        x = PALETTE[label][:, None, None] + normals(seed, index, 0) / 8 + normals(seed, index, 1) / 16
        pixels = ((1 - x.clip(-1, 1)) * np.float32(127.5)).astype(np.uint8).transpose(1, 2, 0)
        images.append(pixels.repeat(2, axis=0).repeat(2, axis=1))
    return Samples.of(0, np.stack(images), labels)


def products(output: Path) -> dict[str, list[list[float]]]:
    """The features in each range, by file name."""
    files = sorted((output / MEANS).iterdir())
    return {path.name: read_fragment(path).samples.columns["features"].tolist() for path in files}


def expected_products(samples: Samples) -> dict[str, list[list[float]]]:
    means = samples.images.mean((1, 2), dtype=np.float64).astype(np.float32)
    return {FragmentName(a, b, "parquet").filename: means[a:b].tolist() for a, b in RANGES}


def actors() -> set[str]:
    """Ids of all workers that were ever started in the shared Ray."""
    table = cluster_state.actor_table(None)
    return {actor_id for actor_id, actor in table.items() if actor["ActorClassName"] == "Worker"}


def test_a_family_a_solver_a_decoder_and_a_product_run_through_the_whole_job(request_for: Request, tmp_path: Path):
    job = prepare(request_for("run"), {"means": mean_colours()})
    (result,) = driven([job])
    samples = expected()
    assert Path(result.archive) == tmp_path / "run" / "samples_22x8x8x3.npz"
    assert Path(result.archive).read_bytes() == savez(samples)
    assert products(tmp_path / "run") == expected_products(samples)
    assert result.summary["labels"] == {"0": 8, "1": 7, "2": 7}
    named = {"family": "colours", "classes": 3, "sampler": "grain", "decoder": "negative"}
    assert job.identity.items() >= named.items()


def test_what_is_registered_nowhere_is_refused_with_what_there_is(request_for: Request, monkeypatch, tmp_path: Path):
    for flags, named in (
        ({"sampler": "grains"}, "--sampler is 'grains'; it must be one of heun, .*grain"),
        ({"decoder": "positive"}, "--decoder is 'positive'; .*none or negative"),
    ):
        with pytest.raises(RequestError, match=named):
            prepare(request_for("run", **flags))
    monkeypatch.delitem(FAMILIES, "colours")
    with pytest.raises(RequestError, match=r"--model is .*colours.safetensors; its tensors \(colours, ...\)"):
        prepare(request_for("run"))
    assert not (tmp_path / "run").exists()


def test_two_jobs_share_a_pool_and_end_as_they_would_alone(request_for: Request, tmp_path: Path):
    before = actors()
    jobs = [prepare(request_for("one")), prepare(request_for("two", seed=7, num_samples=12), {"means": mean_colours()})]
    one, two = driven(jobs)
    assert len(actors() - before) == 1
    assert Path(one.archive).read_bytes() == savez(expected())
    assert Path(two.archive).read_bytes() == savez(expected(7, 12))
    assert (one.summary["computed"], two.summary["computed"]) == (N, 12)
    assert set(products(tmp_path / "two")) == set(fragments(tmp_path / "two"))
    assert not (tmp_path / "one" / "features").exists()


def test_jobs_of_other_networks_or_batches_do_not_share_a_pool(request_for: Request, tmp_path: Path):
    save_file({"colours": torch.from_numpy(-PALETTE)}, tmp_path / "others.safetensors")
    alike, other_batch, other_network = (
        prepare(request_for(output, **flags)).loads()
        for output, flags in (
            ("a", {"seed": 7, "sampler": "onestep"}),
            ("b", {"batch_size": 2}),
            ("c", {"model": str(tmp_path / "others.safetensors")}),
        )
    )
    loads = prepare(request_for("d")).loads()
    assert alike == loads
    assert other_batch != loads
    assert other_network != loads


def test_an_actor_that_dies_in_a_drive_of_two_jobs_costs_neither_a_sample(request_for: Request, tmp_path: Path):
    before, deadly = actors(), {"means": mean_colours(tmp_path / "killed")}
    jobs = [prepare(request_for("one"), deadly), prepare(request_for("two", seed=7), deadly)]
    results = driven(jobs)
    assert (tmp_path / "killed").exists()
    assert len(actors() - before) == 2
    for result, seed in zip(results, (42, 7), strict=True):
        assert Path(result.archive).read_bytes() == savez(expected(seed))
    for output, seed in (("one", 42), ("two", 7)):
        assert products(tmp_path / output) == expected_products(expected(seed))


def test_a_product_that_an_earlier_start_left_unfinished_is_made_of_the_fragments(request_for: Request, tmp_path: Path):
    (before,) = driven([prepare(request_for("run"))])
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "fragments").iterdir()}
    Path(before.archive).unlink()
    samples = expected()
    kept = tmp_path / "run" / MEANS / "000000000008-000000000016.parquet"
    kept.parent.mkdir(parents=True)
    means = samples.images[8:16].mean((1, 2), dtype=np.float64).astype(np.float32)
    kept.write_bytes(encode(Samples(8, {"features": means}), before.summary["fingerprint"], {}, "parquet")[0])
    written = kept.stat().st_mtime_ns
    (result,) = driven([prepare(request_for("run"), {"means": mean_colours()})])
    assert products(tmp_path / "run") == expected_products(samples)
    assert kept.stat().st_mtime_ns == written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "fragments").iterdir()} == times
    assert Path(result.archive).read_bytes() == savez(samples)
