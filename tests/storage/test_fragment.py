from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_sampler.errors import RequestError
from ray_sampler.storage.fragment import decode, encode, parquet_schema, read_fragment
from ray_sampler.storage.record import DamagedFragment, FragmentName, Record, Samples, checksums, json_crc32
from tests.storage.fill import FINGERPRINT, encoded

FORMATS = pytest.mark.parametrize("format", ["parquet", "npz"])


def assert_same(a: Samples, b: Samples) -> None:
    assert a.start == b.start
    np.testing.assert_array_equal(a.images, b.images)
    assert (a.labels is None) == (b.labels is None)
    if a.labels is not None and b.labels is not None:
        np.testing.assert_array_equal(a.labels, b.labels)


@FORMATS
@settings(max_examples=40)
@given(
    start=st.integers(0, 2**40),
    count=st.integers(1, 20),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    labelled=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_what_is_decoded_is_what_was_encoded(format, start, count, shape, labelled, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(-(2**31), 2**31, count).astype(np.int32) if labelled else None
    samples = Samples.of(start, rng.integers(0, 256, (count, *shape), np.uint8), labels)
    data, record = encode(samples, FINGERPRINT, {"device": "x"}, format)
    fragment = decode(data, FragmentName(start, start + count, format), FINGERPRINT)
    assert fragment.record == record
    assert fragment.record.computed_by == {"device": "x"}
    assert_same(fragment.samples, samples)


def test_many_row_groups_of_about_4_mib_round_trip():
    rng = np.random.default_rng(0)
    samples = Samples.of(0, rng.integers(0, 256, (150, 256, 256, 1), np.uint8), None)
    data, _ = encode(samples, FINGERPRINT, {}, "parquet")
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    assert metadata.num_row_groups == 3
    assert metadata.row_group(0).column(1).compression == "UNCOMPRESSED"
    assert_same(decode(data, FragmentName(0, 150, "parquet"), FINGERPRINT).samples, samples)


@FORMATS
@pytest.mark.parametrize("labelled", [True, False])
def test_a_flipped_bit_is_found_or_changes_nothing(format, labelled):
    name, data, record, samples = encoded(format, labelled=labelled)
    rng = np.random.default_rng(1)
    found = 0
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 1 << int(rng.integers(8))
        try:
            fragment = decode(bytes(damaged), name, FINGERPRINT)
        except DamagedFragment:
            found += 1
            continue
        assert fragment.record == record
        assert_same(fragment.samples, samples)
    assert found > len(data) // 6  # at least half of the positions: the images alone are more


@FORMATS
def test_a_fragment_cut_short_is_found(format):
    name, data, *_ = encoded(format)
    for length in range(0, len(data), 10):
        with pytest.raises(DamagedFragment):
            decode(data[:length], name, FINGERPRINT)


@FORMATS
@settings(max_examples=60)
@given(garbage=st.binary(max_size=400), wrapped=st.booleans())
def test_garbage_is_a_damaged_fragment_and_no_other_error(format, garbage, wrapped):
    if wrapped:
        garbage = (
            b"PAR1" + garbage + len(garbage).to_bytes(4, "little") + b"PAR1"
            if format == "parquet"
            else b"PK\3\4" + garbage
        )
    with pytest.raises(DamagedFragment):
        decode(garbage, FragmentName(0, 1, format), None)


@FORMATS
def test_a_run_of_garbage_inside_a_fragment_is_a_damaged_fragment_and_no_other_error(format):
    name, data, record, samples = encoded(format)
    rng = np.random.default_rng(2)
    for _ in range(300):
        damaged = bytearray(data)
        # Most of them at the end, where both formats keep their directory.
        start = len(data) - int(rng.integers(1, 1200)) if rng.random() < 0.8 else int(rng.integers(len(data)))
        length = int(rng.integers(1, 40))
        damaged[start : start + length] = rng.bytes(len(damaged[start : start + length]))
        try:
            fragment = decode(bytes(damaged), name, FINGERPRINT)
        except DamagedFragment:
            continue
        assert fragment.record == record
        assert_same(fragment.samples, samples)


@FORMATS
def test_another_runs_fragment_is_refused_and_any_is_accepted_without_a_fingerprint(format):
    name, data, *_ = encoded(format)
    with pytest.raises(DamagedFragment, match="another run"):
        decode(data, name, "cd" * 32)
    assert decode(data, name, None).record.fingerprint == FINGERPRINT


@FORMATS
def test_a_fragment_under_another_ones_name_is_refused(format):
    _, data, *_ = encoded(format)
    with pytest.raises(DamagedFragment, match="its name says samples 0 to 8"):
        decode(data, FragmentName(0, 8, format), FINGERPRINT)


def test_a_fragment_under_the_other_formats_name_is_refused():
    names = FragmentName(4, 12, "parquet"), FragmentName(4, 12, "npz")
    for written, read in (names, reversed(names)):
        _, data, *_ = encoded(written.format)
        with pytest.raises(DamagedFragment, match="not a readable"):
            decode(data, read, FINGERPRINT)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.append_column("more", pa.array([0] * len(table))),
        lambda table: table.drop(["label"]),
        lambda table: table.select(["label", "index", "image"]),
        lambda table: table.set_column(0, "index", table["index"].cast(pa.int32())),
        lambda table: table.set_column(2, "image", table["image"].cast(pa.binary())),
        lambda table: table.slice(0, 7),
        lambda table: pa.concat_tables([table, table]),
        lambda table: table.take(list(range(7, -1, -1))),
        lambda table: table.replace_schema_metadata({}),
    ],
    ids=["more", "less", "order", "index-type", "image-type", "row-less", "rows-twice", "reversed", "no-record"],
)
def test_another_schema_or_other_rows_are_refused(change):
    name, data, *_ = encoded("parquet")
    table = pq.read_table(io.BytesIO(data))
    changed = change(table)
    sink = io.BytesIO()
    pq.write_table(changed, sink, compression="none")
    with pytest.raises(DamagedFragment):
        decode(sink.getvalue(), name, FINGERPRINT)


def test_nulls_are_refused():
    name, data, record, _ = encoded("parquet")
    table = pq.read_table(io.BytesIO(data))
    schema = parquet_schema(record)
    nullable = pa.schema([f.with_nullable(True) for f in schema], metadata=table.schema.metadata)
    labels = pa.array([None, *table["label"].to_pylist()[1:]], pa.int32())
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays([table["index"], labels, table["image"]], schema=nullable), sink, compression="none"
    )
    with pytest.raises(DamagedFragment):
        decode(sink.getvalue(), name, FINGERPRINT)


def test_a_changed_record_does_not_match_its_own_crc():
    _, _, record, _ = encoded("npz")
    body = json.loads(record.to_json())
    assert Record.from_json(record.to_json()) == record
    for key, value in (("start", 5), ("fingerprint", "x"), ("computed_by", {}), ("version", 2), ("more", 1)):
        with pytest.raises(DamagedFragment):
            Record.from_json(json.dumps(body | {key: value}))


def resealed(record: Record, **changes: object) -> str:
    """The record as its own attacker would write it: changed, with a CRC-32 that matches."""
    body = {key: value for key, value in json.loads(record.to_json()).items() if key != "record_crc32"} | changes
    return json.dumps(body | {"record_crc32": json_crc32(body)}, sort_keys=True)


def with_record(data: bytes, format: str, text: str) -> bytes:
    """A fragment's file with another record in it."""
    sink = io.BytesIO()
    if format == "parquet":
        table = pq.read_table(io.BytesIO(data)).replace_schema_metadata({"ray_sampler": text})
        pq.write_table(table, sink, compression="none", use_dictionary=False)
    else:
        with np.load(io.BytesIO(data)) as arrays:
            np.savez(sink, **dict(arrays) | {"record": np.array(text.encode())})
    return sink.getvalue()


@FORMATS
@pytest.mark.parametrize(
    "changes",
    [
        {"start": 0, "stop": 8},
        {"start": 4.0},
        {"stop": 12.0},
        {"start": True},
        {"start": "4"},
        {"start": None},
        {"start": -4},
        {"stop": 10**400},
        {"shape": [True, 1, 1]},
        {"shape": [8, 8, 3.0]},
        {"shape": [8, 8]},
        {"shape": [8, -8, -3]},
        {"shape": [2**40, 2**40, 3]},
        {"shape": "883"},
        {"shape": None},
        {"conditional": 1},
        {"conditional": False},
        {"fingerprint": 7},
        {"fingerprint": "\ud800\x1b[2J\n" * 1000},
        {"crc32": {}},
        {"crc32": [1]},
        {"crc32": {"image": float("nan")}},
        {"crc32": {"image": "7"}},
        {"computed_by": 3},
        {"dtype": "float64"},
        {"dtype": ["uint8"]},
        {"version": "1"},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_record_of_wrong_types_or_values_is_refused_though_its_own_crc_is_right(format, changes):
    name, data, record, samples = encoded(format)
    assert_same(decode(with_record(data, format, resealed(record)), name, FINGERPRINT).samples, samples)
    with pytest.raises(DamagedFragment) as caught:
        decode(with_record(data, format, resealed(record, **changes)), name, FINGERPRINT)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{}", "3", '"x"', "null", '{"record_crc32": 1}', "9" * 10_000, "\ud800"]
)
def test_a_record_that_is_other_json_or_none_is_refused(text):
    with pytest.raises(DamagedFragment):
        Record.from_json(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "written",
    [{"compression": "zstd"}, {"compression": "snappy"}, {"use_dictionary": True, "compression": "gzip"}],
    ids=str,
)
def test_compressed_columns_are_refused_which_could_grow_without_bound(written):
    name, data, *_ = encoded("parquet")
    sink = io.BytesIO()
    pq.write_table(pq.read_table(io.BytesIO(data)), sink, **written)
    with pytest.raises(DamagedFragment, match="compressed"):
        decode(sink.getvalue(), name, FINGERPRINT)


def test_a_record_says_the_crc_of_every_column():
    _, _, record, samples = encoded("parquet")
    assert record.crc32 == checksums(samples)
    assert set(record.crc32) == {"image", "index", "label", "label_int64"}
    assert set(encoded("parquet", labelled=False)[2].crc32) == {"image", "index"}


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4, 3), np.float64), None),
        (np.zeros((4, 4, 3), np.uint8), None),
        (np.zeros((0, 4, 4, 3), np.uint8), None),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)),
    ],
)
def test_samples_of_another_shape_or_dtype_are_refused(images, labels):
    with pytest.raises(ValueError, match="must be"):
        Samples.of(0, images, labels)


def test_names_are_read_strictly():
    assert FragmentName(0, 512, "parquet").filename == "000000000000-000000000512.parquet"
    for name in (FragmentName(0, 512, "parquet"), FragmentName(10**12 - 1, 10**12, "npz")):
        assert FragmentName.parse(name.filename) == name
    for wrong in (
        "0-512.parquet",
        "000000000512-000000000512.parquet",
        "000000000513-000000000512.parquet",
        "000000000000-000000000512.csv",
        "000000000000-000000000512.parquet ",
        "000000000000-000000000512.parquet\n",
        "0000000000000-000000000512.parquet",
        "../000000000000-000000000512.parquet",
        ".000000000000-000000000512.parquet.0123.tmp",
        "\u0660" * 12 + "-000000000512.parquet",
        "",
    ):
        assert FragmentName.parse(wrong) is None, wrong


@FORMATS
def test_read_fragment_gives_arrays_from_a_path_and_a_url(format, tmp_path, monkeypatch):
    name, data, record, samples = encoded(format)
    (tmp_path / name.filename).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    for url in (str(tmp_path / name.filename), f"file://{tmp_path}/{name.filename}", name.filename):
        fragment = read_fragment(url)
        assert fragment.record == record
        assert_same(fragment.samples, samples)
    with pytest.raises(RequestError, match="there is no"):
        read_fragment(str(tmp_path / FragmentName(0, 1, format).filename))
    with pytest.raises(RequestError, match="not a fragment's name"):
        read_fragment(str(tmp_path / "samples.parquet"))


def test_fragments_open_in_one_line_elsewhere(tmp_path):
    pd, duckdb = pytest.importorskip("pandas"), pytest.importorskip("duckdb")
    samples = []
    for start, stop in ((0, 5), (5, 9)):
        name, data, _, part = encoded("parquet", start, stop)
        (tmp_path / name.filename).write_bytes(data)
        samples.append(part)
    images = np.concatenate([part.images for part in samples])
    labels = np.concatenate([part.labels for part in samples])

    def check(index, label, image):
        np.testing.assert_array_equal(np.asarray(index), np.arange(9))
        np.testing.assert_array_equal(np.asarray(label), labels)
        np.testing.assert_array_equal(np.frombuffer(b"".join(image), np.uint8).reshape(-1, 8, 8, 3), images)

    frame = pd.read_parquet(tmp_path)
    check(frame["index"], frame["label"], frame["image"])
    table = pq.read_table(tmp_path)
    check(table["index"], table["label"], table["image"].to_pylist())
    rows = duckdb.sql(f"select index, label, image from '{tmp_path}/*.parquet' order by index").fetchall()
    check(*zip(*rows, strict=True))


def test_fragments_open_in_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    name, data, _, samples = encoded("parquet", 0, 5)
    (tmp_path / name.filename).write_bytes(data)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "*.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["index"][:] == list(range(5))
    np.testing.assert_array_equal(np.frombuffer(rows[3]["image"], np.uint8).reshape(8, 8, 3), samples.images[3])
