"""The programs of examples/ run offline, on one Ray, and write into runs/ alone."""

from __future__ import annotations

import csv
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_sampler import read_archive

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    Path("runs").mkdir()
    for path in Path(__file__).parents[1].joinpath("examples").glob("*.py"):
        assert f'"examples.{path.stem}"' in text


def test_own_network_draws_pictures_of_its_data_set() -> None:
    example = import_module("examples.own_network")
    images = read_archive(example.main(16)).read(0, 16).images
    data = ((example.discs().permute(0, 2, 3, 1).numpy() + 1) * 127.5).astype(int)
    nearest = np.abs(images[:, None].astype(int) - data).max(axis=(2, 3, 4)).min(axis=1)
    assert nearest.max() <= 2


@pytest.mark.accidents
def test_guidance_compares_three_strengths() -> None:
    with Image.open(import_module("examples.guidance").main(10)) as picture:
        assert picture.size == (960, 288)
        rows = np.split(np.asarray(picture), 3)
    assert all((rows[0] != other).any() for other in rows[1:])


@pytest.mark.accidents
def test_sweep_writes_a_row_for_each_point() -> None:
    table = Path(import_module("examples.sweep").main(8, (6,))).read_text()
    rows = list(csv.DictReader(table.splitlines()))
    assert [(row["solver"], row["nfe"]) for row in rows] == [("dpmpp_2m", "6"), ("heun", "5")]
    assert all(float(row["fid"]) > 0 for row in rows)


def test_read_fragments_finds_every_class(capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(import_module("examples.read_fragments").main(20)) as picture:
        assert picture.size == (320, 32)
        assert np.asarray(picture).max() > 0
    assert f"'index_count': {[2] * 10}" in capsys.readouterr().out


@pytest.mark.accidents
def test_scores_prefers_two_steps() -> None:
    one, two = import_module("examples.scores").main(100)
    assert two < one
