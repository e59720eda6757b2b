"""`ray-sampler export`: every picture as a PNG, by index."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ray import cloudpickle

from ray_sampler.cli import main
from ray_sampler.storage import pictures as module
from ray_sampler.storage.connect import open_store
from ray_sampler.storage.pictures import export, open_pictures
from ray_sampler.storage.record import Samples
from tests.cluster.runs import ARCHIVE, leave, small
from tests.cluster.runs import contents as files_of

RANGES = [(0, 8), (4, 24), (24, 40)]
"""Fragments that overlap."""


@pytest.fixture
def run(checkpoint: Path, samples: Samples, tmp_path: Path) -> Path:
    leave(small(checkpoint, tmp_path / "run"), samples, RANGES)
    return tmp_path / "run"


def savez(path: Path, *arrays: np.ndarray) -> Path:
    np.savez(path, *arrays)
    return path


@pytest.fixture
def archive(samples: Samples, tmp_path: Path) -> Path:
    assert samples.labels is not None
    return savez(tmp_path / ARCHIVE, samples.images, samples.labels.astype(np.int64))


def test_a_run_and_its_archive_give_the_same_pngs_and_labels(
    run: Path, archive: Path, samples: Samples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in (run, archive):
        output = tmp_path / f"png-{source.name}"
        assert main(["export", str(source), "--output", str(output)]) == 0
        assert capsys.readouterr().out == f"40 PNGs written, 0 were there: {output}\n"
        names = [f"{index:06d}.png" for index in range(40)]
        assert sorted(path.name for path in output.iterdir()) == [*names, "labels.csv"]
        np.testing.assert_array_equal(np.stack([np.asarray(Image.open(output / n)) for n in names]), samples.images)
        assert samples.labels is not None
        rows = [f"{name},{label}" for name, label in zip(names, samples.labels, strict=True)]
        assert (output / "labels.csv").read_text().split("\n") == ["file,label", *rows, ""]


def test_grey_pictures_without_labels_go_into_a_folder_for_each_thousand(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1002, 2, 2, 1), np.uint8)
    output = tmp_path / "png"
    assert export(str(savez(tmp_path / "grey.npz", images)), str(output), subdirs=True) == (1002, 0)
    assert sorted(path.name for path in output.iterdir()) == ["000000", "001000"]
    assert len(list((output / "000000").iterdir())) == 1000
    np.testing.assert_array_equal(np.asarray(Image.open(output / "001000" / "001001.png")), images[1001, ..., 0])


def test_an_index_past_a_million_has_more_digits() -> None:
    digits = max(module.DIGITS, len(str(1_234_566)))
    assert module._name(7, digits, False) == "0000007.png"
    assert module._name(1_234_566, digits, True) == "1234000/1234566.png"


def test_what_is_there_is_kept_and_what_is_damaged_or_different_is_written_again(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "png"
    export(str(archive), str(output))
    before = files_of(output)
    (output / "000003.png").write_bytes(before["000003.png"][:-20])
    (output / "000004.png").write_bytes(before["000005.png"])
    (output / "000006.png").unlink()
    kept = {path: path.stat().st_ino for path in output.glob("00001*.png")}
    assert main(["export", str(archive), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"3 PNGs written, 37 were there: {output}\n"
    assert files_of(output) == before
    assert kept == {path: path.stat().st_ino for path in kept}


@pytest.mark.parametrize("subdirs", [False, True])
def test_a_folder_with_other_pngs_is_refused_before_anything_is_written(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], subdirs: bool
) -> None:
    foreign = tmp_path / "png" / ("000000.png" if subdirs else "000000/000000.png")
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"")
    flags = ["--subdirs"] if subdirs else []
    assert main(["export", str(archive), "--output", str(tmp_path / "png"), *flags]) == 2
    assert f"holds {foreign.relative_to(tmp_path / 'png')}, none of these 40 pictures" in capsys.readouterr().err
    assert len(files_of(tmp_path / "png")) == 1


def test_what_cannot_be_exported_is_one_sentence(
    checkpoint: Path, samples: Samples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floats = savez(tmp_path / "floats.npz", samples.images.astype(np.float32))
    channels_first = savez(tmp_path / "channels_first.npz", np.zeros((2, 3, 8, 8), np.uint8))
    leave(small(checkpoint, tmp_path / "part"), samples, [(0, 8), (16, 24)])
    (tmp_path / "empty").mkdir()
    for source, sentence in {
        channels_first: "pictures are of shape [3, 8, 8]; they must be (H, W, C) with C 1 or 3",
        floats: "holds float32 results of a solver, of which no PNG can be made",
        tmp_path / "part": "lacks 24 of its samples; run its command again first",
        tmp_path / "empty": "holds no pictures",
        tmp_path / "absent.npz": "there is no",
    }.items():
        assert main(["export", str(source), "--output", str(tmp_path / "png")]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert main(["export", str(floats)]) == 2
    assert "needs a run directory or an archive, and --output DIR" in capsys.readouterr().err
    assert main(["export", str(floats), "--output", "memory://png"]) == 2
    assert not (tmp_path / "png").exists()


def test_a_damaged_fragment_stops_the_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fragment = run / "fragments" / "000000000024-000000000040.parquet"
    data = bytearray(fragment.read_bytes())
    data[2000] ^= 1
    fragment.write_bytes(data)
    assert main(["export", str(run), "--output", str(tmp_path / "png")]) == 1
    assert f"{fragment.name} is damaged" in capsys.readouterr().err
    assert not (tmp_path / "png" / "labels.csv").exists()


def test_pictures_of_a_folder_come_in_the_natural_order_of_their_names(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    Image.fromarray(images[11, ..., 0]).save(tmp_path / "11.png")
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = open_pictures(tmp_path)
    (found,) = pictures.walk()
    assert (pictures.num_samples, pictures.shape, found.start, found.labels) == (12, (4, 4, 3), 0, None)
    np.testing.assert_array_equal(found.images[:11], images[:11])
    np.testing.assert_array_equal(found.images[11], np.repeat(images[11, ..., :1], 3, axis=-1))


def test_pictures_of_an_unfinished_run_are_those_that_are_there_and_can_be_read_elsewhere(
    checkpoint: Path, samples: Samples, tmp_path: Path
) -> None:
    leave(small(checkpoint, tmp_path / "part"), samples, [(0, 8), (4, 12), (24, 32)])
    pictures = cloudpickle.loads(cloudpickle.dumps(open_pictures(tmp_path / "part")))
    assert (pictures.num_samples, pictures.lacking, pictures.ranges) == (20, 20, [(0, 8), (8, 12), (24, 32)])
    np.testing.assert_array_equal(pictures.read(25, 28).images, samples.images[25:28])
    np.testing.assert_array_equal(np.concatenate([each.images for each in pictures.walk()])[8:12], samples.images[8:12])


def test_a_fingerprint_is_that_of_the_content(run: Path, archive: Path, tmp_path: Path) -> None:
    export(str(archive), str(tmp_path / "png"))
    sources = (run, archive, tmp_path / "png")
    before = [open_pictures(source).fingerprint() for source in sources]
    assert before == [open_pictures(source).fingerprint() for source in sources]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "png" / "000007.png")
    assert open_pictures(tmp_path / "png").fingerprint() != before[2]
    images = open_pictures(archive).read(0, 40).images
    savez(archive, images[::-1].copy())
    assert open_pictures(archive).fingerprint() != before[1]


def test_an_export_into_a_bucket_resumes(archive: Path, moto: str) -> None:
    output = "s3://samples/export/png"
    assert export(str(archive), output, subdirs=True) == (40, 0)
    store = open_store(output)
    store.remove("000000/000007.png")
    assert export(str(archive), output, subdirs=True) == (1, 39)
    assert len(store.list("000000")) == 40
    assert (store.read("labels.csv") or b"").startswith(b"file,label\n000000/000000.png,")
