"""An archive is read range by range: every sample in order, in memory that does not grow, and nothing unpickled."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler import RequestError, RunError, read_archive
from tests.faults.proxy import FaultProxy, answer
from tests.faults.servers import BUCKET, client
from tests.storage.conftest import use_endpoint

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 3), np.uint8)
LABELS = np.arange(10)[::-1].astype(np.int64)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, IMAGES, LABELS)
    return path


@pytest.mark.parametrize("size", [1, 3, 10, 99, None])
def test_ranges_hold_every_sample_in_order(archive: Path, size: int | None):
    ranges = list(read_archive(archive, size))
    assert [each.start for each in ranges] == list(range(0, 10, size or 10))
    assert all(len(each.images) <= (size or 10) for each in ranges)
    np.testing.assert_array_equal(np.concatenate([images for _, images, _ in ranges]), IMAGES)
    np.testing.assert_array_equal(np.concatenate([each.labels for each in ranges if each.labels is not None]), LABELS)


@pytest.mark.parametrize("url", [str, Path, lambda path: f"file://{path}"])
def test_an_archive_is_named_by_a_path_or_url(archive: Path, url):
    assert read_archive(url(archive)).num_samples == 10


def test_it_is_read_from_a_bucket_too(archive: Path):
    import fsspec

    with fsspec.open("memory://archives/samples.npz", "wb") as file:
        file.write(archive.read_bytes())
    (only,) = read_archive("memory://archives/samples.npz")
    np.testing.assert_array_equal(only.images, IMAGES)


def test_one_range_is_read_alone(archive: Path):
    part = read_archive(archive).read(4, 7)
    assert part.start == 4
    np.testing.assert_array_equal(part.images, IMAGES[4:7])
    assert part.labels is not None
    np.testing.assert_array_equal(part.labels, LABELS[4:7])
    assert len(read_archive(archive).read(8, 99).images) == 2
    assert len(read_archive(archive).read(99, 3).images) == 0


def test_a_notebook_shows_the_shapes_and_no_bytes(archive: Path):
    shown = repr(read_archive(archive))
    assert "(10, 3, 4, 3)" in shown
    assert "NUMPY" not in shown


def test_images_without_labels_and_results_of_solvers(tmp_path: Path):
    results = np.random.default_rng(1).normal(size=(5, 2, 2, 4)).astype(np.float32)
    np.savez(tmp_path / "latents.npz", results)
    (only,) = read_archive(tmp_path / "latents.npz")
    assert only.labels is None
    np.testing.assert_array_equal(only.images, results)


def test_memory_does_not_grow_with_the_archive(tmp_path: Path):
    np.savez(tmp_path / "big.npz", np.zeros((4096, 64, 64, 3), np.uint8))  # 48 MiB
    tracemalloc.start()
    for _ in read_archive(tmp_path / "big.npz", 64):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20


def test_a_changed_byte_is_noticed_at_the_end(archive: Path):
    data = bytearray(archive.read_bytes())
    data[data.index(IMAGES[7].tobytes())] ^= 1
    archive.write_bytes(data)
    with pytest.raises(RunError, match="CRC-32 of arr_0"):
        list(read_archive(archive))


class Harm:
    def __reduce__(self):
        return Path.touch, (Path("harm"),)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "objects.npz", np.array([Harm()], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Harm()))
    for name in ("objects.npz", "pickle.npz"):
        with pytest.raises(RequestError, match="not an archive of samples"):
            read_archive(tmp_path / name)
    assert not (tmp_path / "harm").exists()


def member(**arrays: np.ndarray) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for one of them
    return sink.getvalue()


def compressed() -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, IMAGES)
    return sink.getvalue()


def oversold() -> bytes:
    """A header that claims a million images."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 3, 4, 3)})
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as file:
        file.writestr("arr_0.npy", header.getvalue() + IMAGES.tobytes())
    return sink.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (member(mu=np.zeros(3)), "holds no arr_0"),
        (member(arr_0=np.zeros((3, 2))), "of type"),
        (member(arr_0=np.zeros((3, 2), np.uint8)), "of shape"),
        (member(arr_0=IMAGES, arr_1=LABELS[:3]), "arr_1 is of shape"),
        (member(arr_0=np.asfortranarray(IMAGES)), "not a plain array"),
        (compressed(), "compressed"),
        (oversold(), "does not have the size"),
        (b"", "cut short"),
        (member(arr_0=IMAGES)[:-30], "cut short"),
    ],
)
def test_another_file_is_a_wrong_request(data: bytes, said: str, tmp_path: Path):
    path = tmp_path / "other.npz"
    path.write_bytes(data)
    with pytest.raises(RequestError, match=said):
        read_archive(path)


@given(st.data())
def test_a_spoiled_file_ends_in_one_of_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    whole = bytearray(member(arr_0=IMAGES, arr_1=LABELS))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "spoiled.npz"
    path.write_bytes(bytes(whole[: data.draw(st.integers(len(whole) - 200, len(whole)))]))
    try:
        for _ in read_archive(path, 4):
            pass
    except (RequestError, RunError):
        pass


@pytest.mark.parametrize(("url", "said"), [("nowhere.npz", "there is no"), (".", "cannot be read"), (3, "cannot name")])
def test_a_file_that_is_not_there_is_a_wrong_request(url, said: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=said):
        read_archive(url)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_range_has_samples(archive: Path, size):
    with pytest.raises(RequestError, match="size is"):
        read_archive(archive, size)


@pytest.mark.parametrize(("status", "word"), [(403, "AccessDenied"), (400, "ExpiredToken")])
@pytest.mark.parametrize("first", [1, 2])
def test_what_a_store_refuses_is_told_as_that(moto_endpoint: str, archive: Path, monkeypatch, first, status, word):
    client(moto_endpoint).put_object(Bucket=BUCKET, Key="refused.npz", Body=archive.read_bytes())
    with FaultProxy(moto_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        proxy.plan(answer(status, word, first=first))
        with pytest.raises((RequestError, RunError), match=f"cannot read s3://{BUCKET}/refused.npz"):
            list(read_archive(f"s3://{BUCKET}/refused.npz"))


def test_without_credentials_an_archive_in_a_bucket_is_one_sentence(tmp_path: Path, monkeypatch):
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match="no credentials were found"):
        read_archive(f"s3://{BUCKET}/a.npz")
