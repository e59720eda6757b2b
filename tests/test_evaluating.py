"""The archive as evaluators read it, and the code of docs/evaluating.md, with the real tools where there are any."""

from __future__ import annotations

import importlib
import io
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ray_sampler.cli import main
from ray_sampler.storage.record import Samples
from tests.cluster.runs import ARCHIVE, leave, small

ROOT = Path(__file__).parent.parent
DOCUMENTED_ARCHIVE = "runs/edm64/samples_50000x64x64x3.npz"


@pytest.fixture
def archive(checkpoint: Path, samples: Samples, tmp_path: Path) -> Path:
    """The archive of the small run, merged from fragments."""
    output = tmp_path / "runs"
    leave(small(checkpoint, output), samples, [(start, start + 8) for start in range(0, 40, 8)])
    assert main(["merge", str(output)]) == 0
    return output / ARCHIVE


# As guided-diffusion's evaluator does: a member of the zip file, its header, then bytes in order.


class Forward(io.RawIOBase):
    """A stream that can only be read on."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def batches(path: Path, name: str, size: int) -> Iterator[np.ndarray]:
    """The array `name` of an npz archive in batches of `size`, without a seek within the member."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
        stream = io.BufferedReader(Forward(member))
        assert np.lib.format.read_magic(stream) == (1, 0)
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        assert not fortran_order
        for start in range(0, shape[0], size):
            rows = min(size, shape[0] - start)
            count = rows * math.prod(shape[1:])
            data = stream.read(count * dtype.itemsize)
            yield np.frombuffer(data, dtype, count).reshape(rows, *shape[1:])
        assert stream.read() == b""


@pytest.mark.parametrize("size", [1, 7, 40, 64])
def test_a_streaming_reader_finds_every_image_and_label_in_order(archive: Path, samples: Samples, size: int) -> None:
    images = list(batches(archive, "arr_0", size))
    assert all(batch.dtype == np.uint8 for batch in images)
    np.testing.assert_array_equal(np.concatenate(images), samples.images)
    np.testing.assert_array_equal(np.concatenate(list(batches(archive, "arr_1", size))), samples.labels)


def test_nothing_in_the_archive_is_taken_for_stored_statistics(archive: Path) -> None:
    with np.load(archive) as members:
        assert "mu" not in members
        assert members.files == ["arr_0", "arr_1"]


# The code of docs/evaluating.md.


def documented(tool: str) -> str:
    """The Python block of docs/evaluating.md that imports `tool`."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "evaluating.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (block,) = [block for block in blocks if re.search(rf"^(from|import) {tool}\b", block, re.MULTILINE)]
    return str(block)


def replaced(code: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in code, old
        code = code.replace(old, new)
    return code


@pytest.fixture(params=[3, 1], ids=["colour", "grey"])
def pictures(request: pytest.FixtureRequest, samples: Samples, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """An archive in colour, merged from fragments, or a grey one, and its pictures."""
    if request.param == 3:
        path: Path = request.getfixturevalue("archive")
        return path, samples.images
    images = samples.images[..., :1]
    np.savez(tmp_path / "grey.npz", arr_0=images)
    return tmp_path / "grey.npz", images


def darker(images: np.ndarray) -> np.ndarray:
    """The pictures, each value less by 16, or 0."""
    return (np.clip(images, 16, 255) - 16).astype(np.uint8)


@pytest.fixture
def reals(pictures: tuple[Path, np.ndarray]) -> Path:
    """A folder of the same pictures, darker."""
    folder = pictures[0].parent / "reals"
    folder.mkdir()
    for index, image in enumerate(darker(pictures[1])):
        Image.fromarray(image.squeeze()).save(folder / f"{index}.png")
    return folder


def test_the_documented_dataset_gives_what_torch_fidelity_asks_for(pictures: tuple[Path, np.ndarray]) -> None:
    path, images = pictures
    code = re.sub(r"^(from torch_fidelity.*|print\((.|\n)*)", "", documented("torch_fidelity"), flags=re.MULTILINE)
    names: dict[str, Any] = {}
    exec(code, names)
    dataset = names["Archive"](str(path))
    assert len(dataset) == 40
    loaded = torch.cat(list(torch.utils.data.DataLoader(dataset, batch_size=16)))
    assert (loaded.dtype, loaded.shape) == (torch.uint8, (40, 3, 8, 8))
    np.testing.assert_array_equal(loaded.permute(0, 2, 3, 1).numpy(), in_colour(images))


def test_the_documented_conversion_makes_three_equal_channels(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("grey.npz", arr_0=samples.images[..., :1])
    exec(replaced(documented("numpy"), ("runs/grey/samples_50000x64x64x1.npz", "grey.npz")), {})
    with np.load("colour.npz") as made:
        np.testing.assert_array_equal(made["arr_0"], in_colour(samples.images[..., :1]))


def in_colour(images: np.ndarray) -> np.ndarray:
    return np.broadcast_to(images, (*images.shape[:3], 3))


def moments(images: torch.Tensor) -> torch.Tensor:
    """Stand-in for Inception, whose weights would be downloaded: mean and deviation of each third, (N, 6)."""
    thirds = [part.flatten(1) for part in images.double().mean(1).tensor_split(3, dim=1)]
    return torch.stack([f for part in thirds for f in (part.mean(1), part.std(1))], 1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The Frechet distance of two sets of features, (N, D) each."""
    c, d = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real.sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c) + np.trace(d) - 2 * root)


def features(images: np.ndarray) -> np.ndarray:
    return moments(torch.from_numpy(in_colour(images).transpose(0, 3, 1, 2).copy())).numpy()


@pytest.mark.usefixtures("torchvision")
def test_torch_fidelity_reads_the_archive_as_documented(
    pictures: tuple[Path, np.ndarray], reals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, images = pictures
    base: Any = importlib.import_module("torch_fidelity.feature_extractor_base").FeatureExtractorBase

    class Moments(base):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("moments",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "moments"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            assert images.dtype == torch.uint8
            return (moments(images),)

    registry = importlib.import_module("torch_fidelity.registry")
    registry.FEATURE_EXTRACTORS_REGISTRY.pop("moments", None)
    registry.register_feature_extractor("moments", Moments)
    measured = 'fid=True, feature_extractor="moments", cuda=False, cache=False, save_cpu_ram=True, verbose=False'
    code = documented("torch_fidelity")
    code = replaced(
        code, (DOCUMENTED_ARCHIVE, str(archive)), ("path/to/real/images", str(reals)), ("isc=True, fid=True", measured)
    )
    exec(code, {})
    (value,) = re.findall(r"'frechet_inception_distance': (?:np\.float64\()?([\d.e+-]+)", capsys.readouterr().out)
    assert float(value) == pytest.approx(frechet(features(images), features(darker(images))), rel=1e-3)


@pytest.mark.usefixtures("torchvision")
def test_clean_fid_reads_the_archive_as_documented(
    pictures: tuple[Path, np.ndarray], reals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, images = pictures
    how = "custom_feat_extractor=moments, custom_fn_resize=lambda x: x, num_workers=0, device='cpu', verbose=False"
    code = replaced(
        documented("cleanfid"),
        ("runs/edm64-png", str(archive.parent / "png")),
        ('"path/to/real/images")', f'"{reals}", {how})'),
    )
    assert main(["export", str(archive), "--output", str(archive.parent / "png")]) == 0
    exec(code, {"moments": moments})
    value = float(capsys.readouterr().out.split()[-1])
    assert value == pytest.approx(frechet(features(images), features(darker(images))), rel=1e-3)


@pytest.mark.usefixtures("torchvision")
def test_pytorch_fid_reads_the_exported_pictures_as_documented(
    pictures: tuple[Path, np.ndarray], reals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, images = pictures
    seen: list[torch.Tensor] = []

    class Inception(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = importlib.import_module("pytorch_fid.inception").InceptionV3.BLOCK_INDEX_BY_DIM

        def __init__(self, blocks: list[int]) -> None:
            super().__init__()

        def forward(self, batch: torch.Tensor) -> list[torch.Tensor]:
            seen.append(batch)
            return [torch.randn(len(batch), 64, 1, 1, generator=torch.Generator().manual_seed(len(seen)))]

    module: Any = importlib.import_module("pytorch_fid.fid_score")
    monkeypatch.setattr(module, "InceptionV3", Inception)
    (line,) = re.findall(r"^python -m (pytorch_fid .*)$", (ROOT / "docs" / "evaluating.md").read_text(), re.MULTILINE)
    folder = archive.parent / "png"
    line = replaced(line, ("runs/edm64-png", str(folder)), ("path/to/real/images", str(reals)))
    monkeypatch.setattr("sys.argv", [*line.split(), "--dims", "64", "--num-workers", "0"])
    assert main(["export", str(archive), "--output", str(folder)]) == 0
    module.main()
    assert "FID:" in capsys.readouterr().out
    pixels = (seen[0] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels, in_colour(images))
