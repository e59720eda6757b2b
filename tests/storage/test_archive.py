from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sampler.errors import RunError
from ray_sampler.storage import ranges
from ray_sampler.storage.archive import Content, DamagedPiece, archive_intact, content_of, lay_out, merge
from ray_sampler.storage.archive_layout import ArchiveLayout, crc32_combine
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir
from ray_sampler.storage.store import Chunks, NotCommitted
from tests.storage.fill import FINGERPRINT, fill, make_samples

SHAPE = (8, 8, 3)


def savez(path: Path, num_samples: int, shape=SHAPE, labelled=True) -> bytes:
    """What np.savez writes for the samples that `fill` fills in."""
    samples = make_samples(0, num_samples, shape, labelled)
    np.savez(path, samples.images, *([] if samples.labels is None else [samples.labels.astype(np.int64)]))
    return path.read_bytes()


def filled(run_dir: RunDir, names, **kwargs) -> dict[FragmentName, Content]:
    """Write a fragment under each name; what the archive counts on of each."""
    return {name: content_of(record) for name, record in fill(run_dir, names, **kwargs).items()}


def merged(run_dir: RunDir, names, num_samples, shape=SHAPE, labelled=True, **calls) -> ArchiveLayout:
    contents = filled(run_dir, names, shape=shape, labelled=labelled)
    pieces = cover(names, num_samples)
    return merge(run_dir, pieces, contents, num_samples, shape, labelled, FINGERPRINT, **calls)


def written(run_dir: RunDir, layout: ArchiveLayout) -> bytes:
    data = run_dir.read_file(run_dir.archive_name(layout.num_samples, layout.image_shape))
    assert data is not None
    return data


@settings(max_examples=60)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_crcs_of_consecutive_parts_combine(a, b):
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


def test_crcs_of_long_parts_combine():
    a, b = b"x" * 1000, bytes(3_000_001)
    assert crc32_combine(zlib.crc32(a), zlib.crc32(b), len(b)) == zlib.crc32(a + b)


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4)),
    labelled=st.booleans(),
    limit=st.sampled_from([None, 10, 500, 2000]),
)
def test_the_layout_is_what_savez_writes_for_any_shape_and_beyond_4_gib(shape, labelled, limit):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, shape, np.uint8)
    labels = rng.integers(0, 9, shape[0])
    with pytest.MonkeyPatch.context() as patch:
        if limit:  # where zip64 begins is moved down, instead of writing gigabytes
            patch.setattr(zipfile, "ZIP64_LIMIT", limit)
        sink = io.BytesIO()
        np.savez(sink, *([images, labels] if labelled else [images]))
        layout = ArchiveLayout(
            shape[0], shape[1:], zlib.crc32(images.tobytes()), zlib.crc32(labels.tobytes()) if labelled else None
        )
        parts = [layout.members[0].header, images.tobytes()]
        if labelled:
            parts += [layout.members[1].header, labels.tobytes()]
        assert b"".join([*parts, layout.directory]) == sink.getvalue()
        assert layout.size == len(sink.getvalue())


def test_an_archive_beyond_4_gib_is_a_valid_zip_with_its_directory_at_the_end():
    layout = ArchiveLayout(50_000_000, (64, 64, 3), 1, 2)
    first, second = layout.members
    assert first.size == 50_000_000 * 64 * 64 * 3
    assert layout.directory[:4] == b"PK\x01\x02"
    assert layout.size == len(first.header) + first.size + len(second.header) + second.size + len(layout.directory)
    assert (len(first.header) + first.size).to_bytes(8, "little") in layout.directory  # where arr_1 starts


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("num_samples", [1, 7, 40])
def test_the_archive_is_what_savez_writes(num_samples, labelled, tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    names = [FragmentName(i, i + 4, "npz" if i % 3 else "parquet") for i in range(0, num_samples, 4)]
    layout = merged(run_dir, names, num_samples, labelled=labelled)
    assert written(run_dir, layout) == savez(tmp_path / "x.npz", num_samples, labelled=labelled)
    with np.load(io.BytesIO(written(run_dir, layout))) as arrays:
        assert arrays.files == ["arr_0", "arr_1"][: 1 + labelled]
        assert arrays["arr_0"].dtype == np.uint8


def test_the_archive_has_the_same_bytes_in_every_store(output, tmp_path):
    run_dir = RunDir(output)
    names = [FragmentName(0, 9, "parquet"), FragmentName(5, 14, "npz"), FragmentName(14, 30, "parquet")]
    seen: list[Samples] = []
    layout = merged(run_dir, names, 23, viewer=lambda: seen.append)
    np.testing.assert_array_equal(np.concatenate([part.images for part in seen]), make_samples(0, 23).images)
    assert written(run_dir, layout) == savez(tmp_path / "x.npz", 23)
    assert archive_intact(run_dir, layout)
    assert {entry.name for entry in run_dir._store.list("")} == {"fragments", "samples_23x8x8x3.npz"}


def test_an_archive_that_is_written_again_is_looked_at_again_from_the_start(tmp_path, monkeypatch):
    """A store may drop an upload midway: what was seen of the samples until then is some of them only."""
    run_dir = RunDir(str(tmp_path / "run"))
    attempts: list[list[int]] = []

    def viewer():
        seen: list[int] = []
        attempts.append(seen)
        return lambda part: seen.extend(range(part.start, part.stop))

    upload = run_dir._store.upload

    def dropping(path: str, chunks: Chunks, size: int) -> None:
        if len(attempts) == 1:
            for _ in chunks:
                if attempts[0]:
                    raise NotCommitted("the store aborted the upload")
        upload(path, chunks, size)

    monkeypatch.setattr(run_dir._store, "upload", dropping)
    merged(run_dir, [FragmentName(i, i + 4, "parquet") for i in range(0, 16, 4)], 16, viewer=viewer)
    assert len(attempts) == 2
    assert 0 < len(attempts[0]) < 16
    assert attempts[1] == list(range(16))


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.sampled_from(["parquet", "npz"])), max_size=6),
    st.integers(1, 30),
)
def test_any_overlap_gives_the_same_archive(tmp_path_factory, held, num_samples):
    folder = tmp_path_factory.mktemp("overlap")
    run_dir = RunDir(str(folder / "run"))
    names = {FragmentName(start, start + count, format) for start, count, format in held}
    names.add(FragmentName(0, 40, "parquet"))
    layout = merged(run_dir, sorted(names), num_samples, shape=(2, 3, 1))
    assert written(run_dir, layout) == savez(folder / "x.npz", num_samples, (2, 3, 1))


def damage(run_dir: RunDir, name: FragmentName, how: str) -> None:
    path = f"fragments/{name.filename}"
    data = run_dir._store.read(path)
    assert data is not None
    if how == "gone":
        run_dir._store.remove(path)
    elif how == "flipped":
        middle = data.index(make_samples(name.start, name.start + 1).images.tobytes())
        run_dir._store.put(path, data[: middle + 7] + bytes([data[middle + 7] ^ 8]) + data[middle + 8 :])
    elif how == "short":
        run_dir._store.put(path, data[:-9])
    else:
        fill(run_dir, [name], seed=1)


@pytest.mark.parametrize("how", ["gone", "flipped", "short", "changed"])
def test_a_fragment_that_fails_its_check_discards_the_archive_and_is_named(how, output, monkeypatch):
    monkeypatch.setattr(ranges, "PATIENCE_S", 0.1)
    for which in (0, 5):
        check_discarded(f"{output}-{which}", which, how)


def check_discarded(output, which, how):
    run_dir = RunDir(output)
    names = [FragmentName(i, i + 4, "parquet") for i in range(0, 24, 4)]
    contents = filled(run_dir, names)
    damage(run_dir, names[which], how)
    pieces = cover(names, 23)
    with pytest.raises(DamagedPiece) as caught:
        merge(run_dir, pieces, contents, 23, SHAPE, True, FINGERPRINT)
    assert caught.value.fragment == names[which]
    assert caught.value.changed == (how == "changed")
    assert [entry.name for entry in run_dir._store.list("")] == ["fragments"]


def test_samples_left_out_and_other_images_are_refused(tmp_path):
    run_dir = RunDir(str(tmp_path / "run"))
    names = [FragmentName(0, 4, "parquet"), FragmentName(6, 9, "parquet")]
    contents = filled(run_dir, names)
    with pytest.raises(RunError, match="samples 4 to 6 are missing"):
        merge(run_dir, cover(names, 9), contents, 9, SHAPE, True, FINGERPRINT)
    for shape, labelled in (((8, 8, 1), True), (SHAPE, False)):
        with pytest.raises(DamagedPiece, match="it holds labelled images"):
            merge(run_dir, cover(names, 4), contents, 4, shape, labelled, FINGERPRINT)


def test_a_damaged_short_long_or_missing_archive_is_not_intact(output):
    run_dir = RunDir(output)
    names = [FragmentName(i, i + 4, "parquet") for i in range(0, 12, 4)]
    contents = filled(run_dir, names)
    layout = lay_out(run_dir, cover(names, 12), contents, 12, SHAPE, True, FINGERPRINT)
    assert not archive_intact(run_dir, layout)
    assert merge(run_dir, cover(names, 12), contents, 12, SHAPE, True, FINGERPRINT) == layout
    assert archive_intact(run_dir, layout)
    data = written(run_dir, layout)
    path = run_dir.archive_name(12, SHAPE)
    for position in (0, 14, 100, 1000, len(data) - 150, len(data) - 1):
        run_dir.write_file(path, data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert not archive_intact(run_dir, layout), position
    for other in (data[:-1], data[:200], b"", data + b"\0"):
        run_dir.write_file(path, other)
        assert not archive_intact(run_dir, layout), len(other)


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    """About 100 MB of fragments are merged; the peak is some fragments, measured from outside the interpreter."""
    program = textwrap.dedent(
        """
        import resource, sys
        import numpy as np
        from ray_sampler.storage.archive import content_of, merge
        from ray_sampler.storage.ranges import cover
        from ray_sampler.storage.fragment import encode
        from ray_sampler.storage.record import FragmentName, Samples
        from ray_sampler.storage.run_dir import RunDir

        run_dir, count = RunDir(sys.argv[1]), int(sys.argv[2])
        images = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), np.uint8)
        contents = {}
        for i in range(count):
            name = FragmentName(i * 64, i * 64 + 64, "parquet")
            data, record = encode(Samples.of(name.start, images, np.zeros(64, np.int32)), "f", {}, "parquet")
            contents[name] = content_of(record)
            run_dir.fragments.write(name, data)
        merge(run_dir, cover(contents, count * 64), contents, count * 64, (128, 128, 3), True, "f")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        """
    )
    peaks = [
        int(subprocess.check_output([sys.executable, "-c", program, str(tmp_path / str(count)), str(count)], text=True))
        for count in (8, 34)
    ]
    assert peaks[1] - peaks[0] < 26  # MiB; 26 more fragments are 78 MiB
