"""One command fills the archive and continues wherever it stopped: the same bytes, whatever happened on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.torch import save_file

from ray_sampler.cli import main
from ray_sampler.cluster import actors, driver, inventory, outcome
from ray_sampler.cluster.driver import run
from ray_sampler.cluster.tasks import check_fragments
from ray_sampler.cluster.worker import Worker, WorkerInfo
from ray_sampler.errors import RunError
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import Samples
from tests.cluster.runs import (
    ARCHIVE,
    contents,
    flags_of,
    fragments,
    leave,
    part,
    random_weights,
    recorded_seconds,
    sampled,
    savez,
)

pytestmark = pytest.mark.usefixtures("local_ray")

OLD = 1e9
"""When everything in the fixture `copy` was last written."""


def old(folder: Path) -> set[str]:
    """Files below a folder that were not written since."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.stat().st_mtime == OLD}


# A first run.


def test_the_archive_is_what_savez_writes_of_what_one_engine_computes(finished, samples):
    assert (finished / ARCHIVE).read_bytes() == savez(samples)
    assert set(np.load(finished / ARCHIVE)) == {"arr_0", "arr_1"}


def test_a_finished_run_leaves_these_files_and_no_other(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        ["fragments", "preview.png", "report.html", "run.json", ARCHIVE, "summary.json"]
    )
    assert fragments(finished) == [f"{i:012d}-{i + 8:012d}.parquet" for i in range(0, 40, 8)]


def test_the_summary_counts_every_sample_once(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["num_samples"], summary["reused"], summary["computed"]) == (40, 0, 40)
    assert sum(summary["labels"].values()) == 40
    assert sum(row["samples"] for row in summary["computed_by"]) == 40
    assert summary["archive"]["bytes"] == (finished / ARCHIVE).stat().st_size
    assert summary["mixed_numerics"] is False


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param({"shard_size": 13, "max_actors": 1, "fragment_format": "npz"}, id="one actor, large shards, npz"),
        pytest.param({"shard_size": 4, "max_actors": 3}, id="more actors than there is room for, small shards"),
    ],
)
def test_shards_fleet_and_format_change_no_byte(configure, tmp_path, samples, flags):
    run(configure(**flags))
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_an_unconditional_run_has_images_alone(configure, tmp_path):
    save_file(random_weights(class_cond=False), tmp_path / "unconditional.safetensors")
    config = configure(
        model=str(tmp_path / "unconditional.safetensors"), class_cond=False, sampler="ancestral", num_samples=11
    )
    result = run(config)
    assert Path(result.archive).read_bytes() == savez(sampled(config))
    assert set(np.load(result.archive)) == {"arr_0"}
    assert result.summary["labels"] is None


def test_a_relative_output_is_relative_to_the_driver_whatever_directory_ray_was_started_in(
    configure, tmp_path, samples, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    leave(configure(), samples, [(0, 40)])
    result = run(configure(output="run"))
    assert result.archive == str(tmp_path / "run" / ARCHIVE)
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


# A run again.


def test_a_complete_run_again_touches_nothing_and_reports_that(configure, copy, capsys):
    before = old(copy)
    result = run(configure())
    assert old(copy) == before
    assert "complete already" in capsys.readouterr().err
    assert result.archive == str(copy / ARCHIVE)
    assert result.summary == json.loads((copy / "summary.json").read_text())


def cut(path: Path, samples: Samples) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, samples: Samples) -> None:
    """Flip a bit of the last image that is in a file."""
    data = bytearray(path.read_bytes())
    data[max(data.find(image.tobytes()) for image in samples.images) + 100] ^= 1
    path.write_bytes(data)


def delete(path: Path, samples: Samples) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut, flip, delete])
def test_a_damaged_archive_is_written_again_from_the_fragments(configure, copy, samples, damage):
    damage(copy / ARCHIVE, samples)
    summary = run(configure()).summary
    assert (copy / ARCHIVE).read_bytes() == savez(samples)
    assert (summary["reused"], summary["computed"]) == (40, 0)
    assert summary["seconds"]["computing"] == pytest.approx(recorded_seconds(copy), abs=1e-3)
    assert summary["seconds"]["computing"] > 0
    assert old(copy) >= {f"fragments/{name}" for name in fragments(copy)}


def test_a_larger_num_samples_adds_only_the_new_ones(configure, copy, samples):
    before = fragments(copy)
    config = configure(num_samples=51, batch_size=6, shard_size=12, fragment_format="npz", max_actors=1)
    summary = run(config).summary
    assert old(copy) >= {f"fragments/{name}" for name in before}
    assert set(fragments(copy)) - set(before) == {
        "000000000040-000000000048.npz",
        "000000000048-000000000051.npz",
    }
    assert (summary["reused"], summary["computed"]) == (40, 11)
    assert summary["seconds"]["computing"] == pytest.approx(recorded_seconds(copy), abs=1e-3)
    new = part(sampled(config), 40, 51)
    assert samples.labels is not None
    assert new.labels is not None
    both = Samples.of(0, np.concatenate([samples.images, new.images]), np.concatenate([samples.labels, new.labels]))
    assert (copy / "samples_51x8x8x3.npz").read_bytes() == savez(both)
    assert json.loads((copy / "run.json").read_text())["num_samples"] == 51
    assert summary["mixed_numerics"] is True  # the batch size decides last bits


def test_a_smaller_num_samples_computes_nothing(configure, copy, samples):
    assert run(configure(num_samples=30)).summary["computed"] == 0
    assert (copy / "samples_30x8x8x3.npz").read_bytes() == savez(part(samples, 0, 30))


def test_another_batch_size_reuses_what_is_there_and_writes_only_what_is_missing(configure, tmp_path, samples):
    leave(configure(), samples, [(0, 8), (24, 32)])
    summary = run(configure(batch_size=5, shard_size=10)).summary
    assert (summary["reused"], summary["computed"]) == (16, 24)
    starts = [int(name[:12]) for name in fragments(tmp_path / "run")]
    assert starts == [0, 8, 10, 20, 24, 32]
    images = np.load(tmp_path / "run" / ARCHIVE)["arr_0"]
    whole = sampled(configure(batch_size=5)).images
    whole[0:8], whole[24:32] = samples.images[0:8], samples.images[24:32]
    assert np.array_equal(images, whole)


# Another run's directory.


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"seed": 7}, ["seed 42, not 7"]),
        (
            {"steps": 6, "labels": "balanced"},
            ["steps 4, not 6", "labels_rule random, not balanced"],
        ),
        ({"sampler": "dpm", "rounding": "nearest"}, ["sampler heun, not dpm", "rounding truncate, not"]),
        ({"generator": "determ", "num_samples": 4}, ["generator philox, not", "num_samples none, not 4"]),
    ],
)
def test_another_run_is_refused_with_every_setting_that_differs_and_nothing_changes(
    configure, tmp_path, samples, capsys, flags, named
):
    leave(configure(), samples, [(0, 8)])
    before = contents(tmp_path)
    assert main(["sample", *flags_of(configure(**flags))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(difference in line for difference in named)
    assert line.count(", not ") == len(flags)
    assert "--overwrite" in line
    assert contents(tmp_path) == before


def test_other_weights_are_refused(configure, tmp_path, samples, capsys):
    leave(configure(), samples, [(0, 8)])
    weights = random_weights()
    weights["out.2.bias"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    assert main(["sample", *flags_of(configure(model=str(tmp_path / "other.safetensors")))]) == 2
    assert "belongs to a run with other settings (weights " in capsys.readouterr().err


def test_overwrite_deletes_the_earlier_run_and_nothing_that_is_not_its_own(configure, copy):
    (copy / "notes.txt").write_text("mine")
    config = configure(seed=7, num_samples=12, overwrite=True)
    result = run(config)
    assert Path(result.archive).read_bytes() == savez(sampled(config))
    assert (copy / "notes.txt").read_text() == "mine"
    assert not (copy / ARCHIVE).exists()
    assert fragments(copy) == ["000000000000-000000000008.parquet", "000000000008-000000000012.parquet"]


class Unloadable(Worker):
    """An actor on a node where nothing starts."""

    def start(self, patience_s: float = 0.0) -> WorkerInfo:
        raise RunError("nothing starts here")


def test_overwrite_deletes_nothing_where_no_actor_starts(configure, copy, monkeypatch):
    before = contents(copy)
    monkeypatch.setattr(actors, "Worker", Unloadable)
    with pytest.raises(RunError, match="actors in a row could not start; the last one said: nothing starts here"):
        run(configure(seed=7, num_samples=12, overwrite=True))
    assert contents(copy) == before


# What lies there and does not belong.


def name(start: int, stop: int) -> str:
    return f"{start:012d}-{stop:012d}.parquet"


def test_damaged_foreign_and_overlapping_fragments_are_rejected_and_the_archive_is_right(configure, tmp_path, samples):
    leave(configure(), samples, [(0, 8), (4, 12), (8, 16), (12, 20), (16, 24), (30, 38)])
    folder = tmp_path / "run" / "fragments"
    cut(folder / name(0, 8), samples)
    flip(folder / name(8, 16), samples)
    another_runs, _ = encode(part(samples, 24, 32), "ab" * 32, {}, "parquet")
    (folder / name(24, 32)).write_bytes(another_runs)
    shutil.copy(folder / name(16, 24), folder / name(32, 40))
    (folder / name(38, 40)).touch()
    (folder / "notes.txt").write_text("not a fragment")
    (folder / name(20, 30)).mkdir()
    (folder / name(0, 40)).symlink_to(folder / name(16, 24))
    summary = run(configure()).summary
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
    reasons = {row["name"]: row["reason"] for row in summary["rejected"]}
    expected = {
        name(0, 8): "not a readable parquet",
        name(8, 16): "CRC-32 of image",
        name(24, 32): "belongs to another run",
        name(32, 40): "its name says samples 32 to 40, its record 16 to 24",
        name(38, 40): "not a readable parquet",
        name(20, 30): "a folder or a link",
        name(0, 40): "a folder or a link",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[filename] for filename, text in expected.items())
    beside = {path.name for path in (tmp_path / "run" / "rejected").iterdir()}
    assert beside == expected.keys() | {f"{filename}.reason.txt" for filename in expected}
    for start, stop in ((4, 12), (12, 20), (16, 24), (30, 38)):
        assert name(start, stop) in fragments(tmp_path / "run")
    assert summary["computed"] == 40 - 28


def test_a_fragment_that_changes_between_its_check_and_the_merge_never_gets_into_the_archive(
    configure, copy, samples, monkeypatch
):
    checked = outcome.merge

    def damage_first(*arguments):
        monkeypatch.setattr(driver, "merge", checked)
        flip(copy / "fragments" / name(16, 24), samples)
        return checked(*arguments)

    monkeypatch.setattr(driver, "merge", damage_first)
    (copy / ARCHIVE).unlink()
    summary = run(configure()).summary
    assert (copy / ARCHIVE).read_bytes() == savez(samples)
    assert [row["name"] for row in summary["rejected"]] == [name(16, 24)]
    assert summary["computed"] == 8


def test_fragments_that_another_node_does_not_see_are_left_where_they_are(
    configure, copy, tmp_path, samples, monkeypatch
):
    elsewhere = str(tmp_path / "elsewhere")
    blind: Any = ray.remote(num_cpus=0)(lambda output, *rest: check_fragments(elsewhere, *rest))
    monkeypatch.setattr(inventory, "check_task", blind)
    before = fragments(copy)
    (copy / ARCHIVE).unlink()
    run(configure())
    assert fragments(copy) == before
    assert not (copy / "rejected").exists()
    assert (copy / ARCHIVE).read_bytes() == savez(samples)
