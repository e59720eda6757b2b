"""`ray-sampler reference`: one's own pictures as statistics that evaluators read."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ray_sampler.cli import main
from ray_sampler.scoring import inception, making
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.references import open_reference
from ray_sampler.scoring.scores import product_of


@pytest.fixture
def folder(pictures: np.ndarray, tmp_path: Path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(path / f"{i}.png")
    return path


def test_a_reference_of_a_folder_is_read_by_numpy_and_by_a_score(
    folder: Path, pictures: np.ndarray, digits: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(making, "KEPT", 20)
    output = tmp_path / "ref.npz"
    assert main(["reference", str(folder), "--features", "digits", "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"statistics of 48 pictures: {output}\n"
    features = digits.network(torch.from_numpy(pictures)).double().numpy()
    with np.load(output, allow_pickle=False) as held:
        assert set(held) == {"arr_0", "mu", "sigma", "extractor", "sha256"}
        np.testing.assert_array_equal(held["arr_0"], pictures[:20])
        np.testing.assert_allclose(held["mu"], features.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(held["sigma"], np.cov(features, rowvar=False), rtol=1e-4, atol=1e-4)
    with zipfile.ZipFile(output) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    found = open_reference(str(output), digits)
    assert found.extractor == ("digits", digits.sha256)
    assert found.images is not None
    np.testing.assert_array_equal(found.images.read(3, 5).images, pictures[3:5])


def test_what_no_reference_can_be_made_of_is_one_sentence(
    folder: Path, pictures: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "one.npz", pictures[:1])
    for arguments, sentence in {
        (str(folder), "--output", str(tmp_path / "ref.txt")): "it must end in .npz",
        (str(folder),): "needs pictures, and --output FILE.npz",
        (str(tmp_path / "one.npz"), "--output", str(tmp_path / "ref.npz")): "holds 1 pictures; at least two are needed",
        (str(folder), "--features", "vgg", "--output", str(tmp_path / "ref.npz")): "--features is 'vgg'",
    }.items():
        assert main(["reference", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("ref*"))


def test_features_that_are_not_finite_make_no_reference(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "not_finite.py").write_text(
        "import torch\n\nclass Logarithm(torch.nn.Module):\n    def forward(self, pictures):\n"
        "        return (pictures.float().mean((1, 2)) - 1e3).log()\n\ndef made(weights):\n    return Logarithm()\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["reference", str(folder), "--features", "python:not_finite:made", "--output", "ref.npz"]
    assert main(arguments) == 1
    assert "gave features that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "ref.npz").exists()


@pytest.mark.slow
def test_a_reference_by_inception_has_the_statistics_of_sfid_too(
    inception_file: Path, random_inception: Extractor, pictures: np.ndarray, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(inception, "PUBLISHED", "")
    monkeypatch.setattr(making, "product_of", lambda extractor: replace(product_of(extractor), block=2))
    np.savez(tmp_path / "two.npz", pictures[:2])
    arguments = ["reference", str(tmp_path / "two.npz"), "--features_weights", str(inception_file)]
    assert main([*arguments, "--output", str(tmp_path / "ref.npz")]) == 0
    found = open_reference(str(tmp_path / "ref.npz"), random_inception)
    assert found.spatial is not None
    assert found.mu is not None
    assert [array.shape for array in found.spatial] == [(2023,), (2023, 2023)]
    features = random_inception.network(torch.from_numpy(pictures[:2])).double().numpy()
    np.testing.assert_allclose(found.mu, features.mean(0), rtol=1e-4, atol=1e-5)
