"""References in every form that people have, and what is wrong with one."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ray_sampler.errors import RequestError
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.options import ScoreOptions
from ray_sampler.scoring.references import open_reference
from ray_sampler.scoring.scores import open_scoring
from ray_sampler.storage.record import Samples
from tests.cluster.runs import leave, small

D = 64
MU = np.linspace(0, 1, D)
SIGMA = np.diag(np.linspace(1, 2, D))


def savez(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def refused(path: Path | str, extractor: Extractor) -> str:
    with pytest.raises(RequestError) as error:
        open_reference(str(path), extractor)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith((f"--score is {path}", str(path)))
    return str(error.value)


def test_the_bundled_digits_are_of_the_bundled_extractor(digits: Extractor) -> None:
    found = open_reference("digits", digits)
    assert found.extractor == ("digits", digits.sha256)
    assert found.features is not None
    assert found.mu is not None
    assert found.sigma is not None
    assert found.features.shape == (500, D)
    np.testing.assert_allclose(found.mu, found.features.mean(0, dtype=np.float64))
    np.testing.assert_allclose(found.sigma, np.cov(found.features, rowvar=False, dtype=np.float64))


def test_statistics_of_an_npz_file_and_who_made_them(digits: Extractor, tmp_path: Path) -> None:
    path = savez(tmp_path / "plain.npz", mu=MU.astype(np.float32), sigma=SIGMA)
    found = open_reference(str(path), digits)
    assert (found.name, found.extractor, found.images) == ("plain.npz", None, None)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.mu is not None
    assert found.mu.dtype == np.float64
    ours = savez(tmp_path / "ours.npz", mu=MU, sigma=SIGMA, extractor="digits", sha256=digits.sha256)
    assert open_reference(str(ours), digits).extractor == ("digits", digits.sha256)


def test_guided_diffusions_file_has_statistics_and_pictures(
    digits: Extractor, pictures: np.ndarray, tmp_path: Path
) -> None:
    path = savez(tmp_path / "virtual.npz", arr_0=pictures, mu=MU, sigma=SIGMA, mu_s=np.ones(3), sigma_s=np.eye(3))
    found = open_reference(str(path), digits)
    assert found.images is not None
    np.testing.assert_array_equal(found.images.read(2, 4).images, pictures[2:4])
    assert found.spatial is not None
    np.testing.assert_array_equal(found.spatial[1], np.eye(3))
    np.testing.assert_array_equal(found.sigma, SIGMA)


@pytest.mark.parametrize("metric", ["pr", "kid"])
@pytest.mark.parametrize("what", ["compressed", "one picture", "channels first"])
def test_what_is_beside_statistics_need_not_be_readable_until_pictures_are_needed(
    what: str, metric: str, pictures: np.ndarray, tmp_path: Path
) -> None:
    save, array, said = {
        "compressed": (np.savez_compressed, pictures, "its arr_0 is compressed or encrypted; write it by numpy.savez"),
        "one picture": (np.savez, pictures[:1], "holds 1 pictures"),
        "channels first": (np.savez, pictures.transpose(0, 3, 1, 2), "they must be (H, W, C)"),
    }[what]
    path = str(tmp_path / "small.npz")
    save(path, arr_0=array, mu=MU, sigma=SIGMA)
    found = open_scoring(ScoreOptions(score=path, features="digits", metrics="fid"), (32, 32, 3)).reference
    assert (found.images, found.sigma is None) == (None, False)
    with pytest.raises(RequestError) as error:
        open_scoring(ScoreOptions(score=path, features="digits", metrics=metric), (32, 32, 3))
    assert said in str(error.value)
    assert f"--metrics {metric} needs pictures or features of the reference; {path}" in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_edm2s_pickle_is_read_by_the_extractors_name(digits: Extractor, tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "img512.pkl"
    content = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:5], "sigma": SIGMA[:5, :5]}, "num_images": 9}
    path.write_bytes(pickle.dumps(content, protocol))
    found = open_reference(str(path), replace(digits, name="inception"))
    np.testing.assert_array_equal(found.mu, MU)
    np.testing.assert_array_equal(found.sigma, SIGMA)
    assert found.extractor == ("inception", "")
    other = open_reference(str(path), replace(digits, name="dinov2", dims=5))
    np.testing.assert_array_equal(other.mu, MU[:5])
    assert "statistics of inception and dinov2; --features is digits" in refused(path, digits)


class Runs:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


def test_a_pickle_runs_nothing(digits: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"fid": Runs()}, 4))
    assert "loading it could execute code" in refused(path, replace(digits, name="inception"))
    path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}, 4)[:-9])
    assert "damaged" in refused(path, replace(digits, name="inception"))
    assert capsys.readouterr().out == ""


def test_pictures_of_an_archive_a_run_and_a_folder(
    digits: Extractor, checkpoint: Path, samples: Samples, tmp_path: Path
) -> None:
    leave(small(checkpoint, tmp_path / "run"), samples, [(0, 40)])
    np.savez(tmp_path / "archive.npz", samples.images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(samples.images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    found = [open_reference(str(tmp_path / name), digits) for name in ("run", "archive.npz", "folder")]
    for reference in found:
        assert reference.images is not None
        (pictures,) = reference.images.walk()
        np.testing.assert_array_equal(pictures.images, samples.images)
        assert (reference.mu, reference.features, len(reference.sha256)) == (None, None, 64)


def test_what_is_not_a_reference_is_one_sentence(
    digits: Extractor, checkpoint: Path, samples: Samples, pictures: np.ndarray, tmp_path: Path
) -> None:
    def made(**arrays: Any) -> str:
        return refused(savez(tmp_path / "bad.npz", **arrays), digits)

    assert "whose mu is of shape (2048,), and digits gives 64 features" in made(mu=np.zeros(2048), sigma=np.eye(2048))
    assert "whose sigma is of shape (64, 63)" in made(mu=MU, sigma=SIGMA[:, :63])
    assert "whose mu has values that are not finite" in made(mu=MU * np.nan, sigma=SIGMA)
    assert "whose features is of shape (9, 3)" in made(mu=MU, sigma=SIGMA, features=np.ones((9, 3)))
    assert "it holds pickled objects" in made(mu=np.array([{}], object), sigma=SIGMA)
    assert "with features of inception 12" in made(mu=MU, sigma=SIGMA, extractor="inception", sha256="12")
    assert "with features of digits 12" in made(mu=MU, sigma=SIGMA, extractor="digits", sha256="12")
    assert "which has mu and no sigma" in made(mu=MU)
    assert "holds 1 pictures; at least two are needed" in made(arr_0=pictures[:1])
    assert "holds 0 pictures; at least two are needed" in made(arr_0=pictures[:0])
    assert "float32 results of a solver" in made(arr_0=pictures.astype(np.float32))
    assert "neither mu and sigma nor pictures, arr_0" in made(other=pictures)
    assert "neither mu and sigma nor pictures, arr_0" in made(sigma=SIGMA)
    assert "not of real numbers" in made(mu=MU + 1j, sigma=SIGMA)
    assert "sigma is no covariance: it must be symmetric" in made(mu=MU, sigma=-SIGMA)
    assert "sigma is no covariance: it must be symmetric" in made(mu=MU, sigma=SIGMA + np.eye(D, k=1))
    assert "pictures are of shape [3, 32, 32]; they must be (H, W, C)" in made(arr_0=pictures.transpose(0, 3, 1, 2))
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refused(tmp_path / "empty", digits)
    (tmp_path / "empty.npz").write_bytes(b"")
    assert "which is empty" in refused(tmp_path / "empty.npz", digits)
    (tmp_path / "text.npz").write_text("no statistics")
    assert "neither an npz file" in refused(tmp_path / "text.npz", digits)
    (tmp_path / "cut.npz").write_bytes(savez(tmp_path / "bad.npz", mu=MU, sigma=SIGMA).read_bytes()[:3000])
    assert "it is damaged, or no npz file" in refused(tmp_path / "cut.npz", digits)
    assert refused("sets/absent.npz", digits).endswith("there is no such file")
    leave(small(checkpoint, tmp_path / "part"), samples, [(0, 8)])
    assert "a run that lacks 32 samples" in refused(tmp_path / "part", digits)
    (tmp_path / "sizes").mkdir()
    Image.fromarray(pictures[0]).save(tmp_path / "sizes" / "0.png")
    Image.fromarray(pictures[0, :9]).save(tmp_path / "sizes" / "1.png")
    reference = open_reference(str(tmp_path / "sizes"), digits)
    (tmp_path / "deep").mkdir()
    Image.fromarray(pictures[0, ..., 0].astype(np.uint16) * 257).save(tmp_path / "deep" / "0.png")
    assert "more than 8 bits a channel" in refused(tmp_path / "deep", digits)
    assert reference.images is not None
    with pytest.raises(RequestError, match="pictures of several sizes"):
        list(reference.images.walk())
