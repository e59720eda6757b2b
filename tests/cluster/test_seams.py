"""A column beside the images and products in separate folders go through whole jobs: kills, growth and repair.

Each is what its author would write; no codec, no task and no check knows any of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ray_sampler.cli import main
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RunConfig
from ray_sampler.networks.opening import FAMILIES
from ray_sampler.sampling.finish import FINISHERS, Finisher, Product
from ray_sampler.sampling.options import DecoderOptions
from ray_sampler.sampling.solvers import SOLVERS
from ray_sampler.storage.fragment import read_fragment
from ray_sampler.storage.record import Column
from tests.cluster.runs import contents, savez
from tests.cluster.test_walls import PALETTE, driven, expected, normals
from tests.cluster.toys import COLOURS, GRAIN, MEANS, SIZE, mean_colours, negative

pytestmark = pytest.mark.usefixtures("local_ray")

N, MORE, SHARD = 12, 20, 8
FOLDERS = ("fragments", "latents", MEANS)


def spread(options: DecoderOptions) -> Finisher:
    """Pictures, and beside each how far its values spread."""
    pictures = negative(options)
    return pictures._replace(
        finish=lambda x, networks: {
            **pictures.finish(x, networks),
            "spread": x.flatten(1).amax(1) - x.flatten(1).amin(1),
        },
        columns=lambda shape: {**pictures.columns(shape), "spread": Column("float32")},
    )


LATENTS = Product(
    "latents",
    "latents",
    {"latent": Column("float32", (3, SIZE, SIZE))},
    "x",
    lambda x, networks: {"latent": x.float()},
)


@pytest.fixture
def requested(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunConfig:
    monkeypatch.setitem(FAMILIES, "colours", COLOURS)
    monkeypatch.setitem(SOLVERS, "grain", GRAIN)
    monkeypatch.setitem(FINISHERS, "spread", spread)
    save_file({"colours": torch.from_numpy(PALETTE)}, tmp_path / "colours.safetensors")
    return RunConfig(
        model=str(tmp_path / "colours.safetensors"), output=str(tmp_path / "run"), sampler="grain", decoder="spread",
        labels="balanced", num_samples=N, batch_size=4, shard_size=SHARD, gpus_per_actor=0.0, max_actors=1,
    )  # fmt: skip


def latents(count: int) -> np.ndarray:
    """What the solver gives, in numpy: (n, 3, SIZE, SIZE) float32."""
    return np.stack(
        [
            PALETTE[i % 3][:, None, None] + normals(42, i, 0) / 8 + normals(42, i, 1) / 16
            for i in range(count)
        ]
    )  # fmt: skip


def stored(output: Path, folder: str, column: str) -> np.ndarray:
    """A column of all samples, in order."""
    return np.concatenate([read_fragment(path).samples.columns[column] for path in sorted((output / folder).iterdir())])


def check(output: Path, archive: str, count: int) -> None:
    """Everything that the run is to hold is there, and right."""
    x, pictures = latents(count), expected(count=count)
    assert Path(archive).read_bytes() == savez(pictures)
    np.testing.assert_array_equal(stored(output, "fragments", "image"), pictures.images)
    np.testing.assert_allclose(stored(output, "latents", "latent"), x, atol=1e-6)
    np.testing.assert_allclose(stored(output, "fragments", "spread"), np.ptp(x.reshape(count, -1), axis=1), atol=1e-6)
    means = pictures.images.mean((1, 2), dtype=np.float64).astype(np.float32)
    np.testing.assert_array_equal(stored(output, MEANS, "features"), means)


def written(output: Path) -> dict[Path, int]:
    """When each range was written."""
    return {path: path.stat().st_mtime_ns for folder in FOLDERS for path in (output / folder).iterdir()}


def flip(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])


def test_columns_and_products_survive_a_kill_grow_and_are_repaired(requested: RunConfig, tmp_path: Path, capsys):
    output = tmp_path / "run"
    made = {"latents": LATENTS, "means": mean_colours(tmp_path / "killed")}
    (result,) = driven([prepare(requested, made)])
    assert (tmp_path / "killed").exists()
    check(output, result.archive, N)

    # The run grows, and what was written stays.
    before, grown = written(output), replace(requested, num_samples=MORE)
    (result,) = driven([prepare(grown, made)])
    check(output, result.archive, MORE)
    assert {path: time for path, time in written(output).items() if path in before} == before

    # One file of each kind is damaged, in other ranges, and one of each is gone.
    whole, before = contents(output), written(output)
    first, second = "000000000000-000000000008", "000000000008-000000000012"
    hurt = [output / "fragments" / f"{first}.parquet", output / "latents" / f"{second}.parquet"]
    hurt.append(output / MEANS / f"{second}.parquet")
    for path in hurt:
        flip(path)
    gone = [output / "latents" / "000000000012-000000000016.parquet", output / MEANS / f"{first}.parquet"]
    for path in gone:
        path.unlink()
    Path(result.archive).unlink()
    (result,) = driven([prepare(grown, made)])
    check(output, result.archive, MORE)
    # What a fragment that is sampled brings with it is written anew as well, as it was.
    anew = {*hurt, *gone, output / "latents" / f"{first}.parquet"}
    assert {path: time for path, time in before.items() if written(output)[path] != time}.keys() <= anew
    for path in hurt:
        folder = path.parent.relative_to(output)
        there = output / "rejected" / ("" if str(folder) == "fragments" else folder) / path.name
        assert there.exists()
        assert "index column is not" in there.with_name(f"{path.name}.reason.txt").read_text()

    # `verify` looks at all of them.
    flip(gone[0])
    assert main(["verify", str(output)]) == 1
    out = capsys.readouterr().out
    assert f"latents/{gone[0].name}" in out
    assert not gone[0].exists()
    (result,) = driven([prepare(grown, made)])
    check(output, result.archive, MORE)
    assert whole.keys() <= contents(output).keys()


def test_latents_that_are_asked_for_later_are_sampled_without_touching_a_fragment(requested: RunConfig, tmp_path: Path):
    output = tmp_path / "run"
    (before,) = driven([prepare(requested)])
    fragments = contents(output / "fragments")
    times = {path: path.stat().st_mtime_ns for path in (output / "fragments").iterdir()}
    (result,) = driven([prepare(requested, {"latents": LATENTS})])
    np.testing.assert_allclose(stored(output, "latents", "latent"), latents(N), atol=1e-6)
    assert contents(output / "fragments") == fragments
    assert {path: path.stat().st_mtime_ns for path in (output / "fragments").iterdir()} == times
    assert result == before
