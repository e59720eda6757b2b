"""Whatever columns a file of a range has: it is written, read, checked and repaired the same way."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from ray_sampler.storage.fragment import decode, encode
from ray_sampler.storage.record import DTYPES, Column, DamagedFragment, FragmentName, Record, Samples
from ray_sampler.storage.run_dir import RunDir
from tests.storage.fill import FINGERPRINT, encoded, make_samples

FORMATS = pytest.mark.parametrize("format", ["parquet", "npz"])
NAMES = st.sampled_from(["label_text", "latent", "features", "a", "zz_9", "score"])


def features(start: int, stop: int) -> Samples:
    """As an extractor gives them, a function of the index alone."""
    rows = [np.random.default_rng(i).standard_normal(5, np.float32) for i in range(start, stop)]
    return Samples(start, {"features": np.stack(rows)})


def assert_same(a: Samples, b: Samples) -> None:
    assert (a.start, a.kinds()) == (b.start, b.kinds())
    for name in a.columns:
        assert a.columns[name].tobytes() == b.columns[name].tobytes(), name


@FORMATS
@settings(max_examples=60)
@given(data=st.data(), count=st.integers(1, 9), start=st.integers(0, 2**40), pictures=st.booleans())
def test_any_columns_come_back_as_they_were(format, data, count, start, pictures):
    columns = dict(make_samples(0, count, (2, 3, 1)).columns) if pictures else {}
    for name in data.draw(st.sets(NAMES, min_size=not pictures, max_size=3)):
        shape = (count, *data.draw(st.lists(st.integers(1, 4), max_size=3)))
        columns[name] = data.draw(npst.arrays(np.dtype(data.draw(st.sampled_from(DTYPES))), shape))
    samples = Samples(start, columns)
    file, record = encode(samples, FINGERPRINT, {}, format)
    found = decode(file, FragmentName(start, start + count, format), FINGERPRINT)
    assert found.record == record == Record.from_json(record.to_json())
    assert_same(found.samples, samples)


@FORMATS
def test_a_flipped_bit_in_any_column_is_found(format):
    columns = dict(make_samples(4, 9, (2, 2, 3)).columns) | dict(features(4, 9).columns)
    samples = Samples(4, columns | {"latent": np.arange(60, dtype=np.float32).reshape(5, 3, 2, 2)})
    file, _ = encode(samples, FINGERPRINT, {}, format)
    name = FragmentName(4, 9, format)
    for column, array in samples.columns.items():
        place = file.index(array[2:3].tobytes()) + 1
        damaged = file[:place] + bytes([file[place] ^ 4]) + file[place + 1 :]
        with pytest.raises(DamagedFragment, match=f"CRC-32 of .*{column}|BadZipFile"):
            decode(damaged, name, FINGERPRINT)
    # Of a list's footer, Arrow does not survive every change: two bits of 8,000 end the process.
    end = len(file) - int.from_bytes(file[-8:-4], "little") - 8 if format == "parquet" else len(file)
    for position in range(0, end, 3):
        damaged = file[:position] + bytes([file[position] ^ 16]) + file[position + 1 :]
        try:
            assert_same(decode(damaged, name, FINGERPRINT).samples, samples)
        except DamagedFragment:
            continue


def test_only_other_columns_than_images_and_labels_are_listed_in_a_record():
    """So that fragments of pictures stay as they were, byte for byte."""
    pictures = {"computed_by", "conditional", "crc32", "dtype", "fingerprint", "record_crc32"}
    pictures |= {"shape", "start", "stop", "version"}
    *_, record, samples = encoded("npz")
    assert set(json.loads(record.to_json())) == pictures
    _, more = encode(Samples(4, samples.columns | features(4, 12).columns), FINGERPRINT, {}, "npz")
    body = json.loads(more.to_json())
    assert set(body) == pictures | {"columns"}
    assert body["columns"] == {"features": ["float32", [5]]}


def test_features_are_a_fixed_size_list_after_the_index_and_arrays_are_bytes():
    file, _ = encode(features(0, 3), FINGERPRINT, {}, "parquet")
    schema = pq.read_schema(io.BytesIO(file))
    assert [str(field.type) for field in schema] == ["int64", "fixed_size_list<element: float not null>[5]"]
    assert schema.names == ["index", "features"]
    np.testing.assert_array_equal(
        np.array(pq.read_table(io.BytesIO(file))["features"].to_pylist(), np.float32),
        features(0, 3).columns["features"],
    )
    latents = Samples(0, {"latent": np.ones((2, 4, 8, 8), np.float32), "score": np.ones(2, np.float64)})
    schema = pq.read_schema(io.BytesIO(encode(latents, FINGERPRINT, {}, "parquet")[0]))
    assert [f"{field.name} {field.type}" for field in schema] == [
        "index int64",
        "score double",
        "latent fixed_size_binary[1024]",
    ]


@pytest.mark.parametrize(
    "columns",
    [
        {"index": np.zeros(2, np.int64)},
        {"record": np.zeros(2, np.int64)},
        {"arr_0": np.zeros(2, np.int64)},
        {"Features": np.zeros(2)},
        {"../x": np.zeros(2)},
        {"": np.zeros(2)},
        {"names": np.array(["a", "b"])},
        {"objects": np.array([{}, {}])},
        {"a": np.zeros((2, 0))},
        {"a": np.zeros(0)},
        {"a": np.float64(3)},
        {"a": np.zeros(2), "b": np.zeros(3)},
        {},
    ],
    ids=str,
)
def test_columns_that_no_file_can_hold_are_refused(columns):
    with pytest.raises(ValueError, match=r"must be"):
        Samples(0, {name: np.asarray(array) for name, array in columns.items()})


def test_products_are_checked_and_rejected_as_fragments_are(output):
    run_dir = RunDir(output)
    ranges = run_dir.ranges("features/toy-01234567", {"features": Column("float32", (5,))})
    names = [FragmentName(start, start + 4, "parquet") for start in (0, 4, 8)]
    for name in names:
        ranges.write(name, encode(features(name.start, name.stop), FINGERPRINT, {}, "parquet")[0])
    assert_same(ranges.read_samples(2, 10, FINGERPRINT), features(2, 10))
    ranges.write(names[1], b"damaged")
    ranges.write(names[2], encode(make_samples(8, 12), FINGERPRINT, {}, "parquet")[0])
    with pytest.raises(DamagedFragment, match="it has no features"):
        ranges.read(names[2], FINGERPRINT)
    assert run_dir.products() == ["features/toy-01234567"]
    found = run_dir.ranges(ranges.folder).verify(FINGERPRINT)
    assert (list(found.records), [name for name, _ in found.rejected]) == ([names[0], names[2]], [names[1].filename])
    assert ranges.list().fragments == [names[0], names[2]]
    assert run_dir._store.read(f"rejected/{ranges.folder}/{names[1].filename}") == b"damaged"
    assert run_dir.fragments.list().fragments == []


def test_a_fragment_without_images_is_damaged(tmp_path):
    run_dir = RunDir(str(tmp_path))
    run_dir.fragments.write(FragmentName(0, 4, "parquet"), encode(features(0, 4), FINGERPRINT, {}, "parquet")[0])
    assert [reason for _, reason in run_dir.fragments.verify(FINGERPRINT).rejected] == ["it has no image"]
