"""What version 2 wrote stays valid: fingerprints, samples, run.json, fragments, and directories left half done.

The files in golden/v2 were written by version 2 and never change. `golden/make_v2.py` shows how they were made.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cluster.runs import contents
from tests.golden import adapter
from tests.golden.checks import TOLERANCE, assert_no_file_was_changed, assert_pinned_archive, read, same_kind_of_machine
from tests.golden.make_v2 import digest, place
from tests.golden.requests_v2 import COMMAND_LINES, COUNT, FRAGMENTS, HERE, PICTURES, RUN_JSONS, RUNS

SUMS_SHA256 = "eeddb584015cbbdb04f2af725d988c2bca03074509139395cd4416fc3558727e"
"""Of golden/v2/SHA256SUMS, which holds that of every other file there."""

TABLE = read(HERE / "pictures.json")
LINES = read(HERE / "dry_run.json")
FRAGMENT_FILES = sorted(str(path.relative_to(HERE)) for path in HERE.glob("**/fragments/**/*.*"))

RECORD_KEYS = {
    "version",
    "fingerprint",
    "start",
    "stop",
    "shape",
    "dtype",
    "conditional",
    "crc32",
    "computed_by",
    "record_crc32",
}


FIRST_RANGE = {"sigma_min": 0.002, "sigma_max": 80.0}
OPEN = tuple(f"python:own:{name}" for name in ("eps", "v", "x0", "x0_of_a_path", "velocity", "velocity_from_noise"))
"""Models that leave the range of levels open: it was `FIRST_RANGE`, and is that of the kind."""
LAST_BIT = {"ancestral", "shifted", "own x0 of a path", "own velocity", "own velocity from noise"}
"""Pictures whose last bit may differ: their coefficients were rounded twice."""


NEW_KEYS = {"source", "command"}
"""Keys that run.json has gained since."""


def as_pinned(run: dict[str, Any], pinned: dict[str, Any]) -> dict[str, Any]:
    """A run.json without the keys that it has gained."""
    assert run.keys() - pinned.keys() <= NEW_KEYS
    return {key: run.get(key) for key in pinned}


def as_then(flags: dict[str, Any]) -> dict[str, Any]:
    """A request that says what it meant to version 2."""
    return (FIRST_RANGE if flags.get("model") in OPEN else {}) | flags


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where every pinned request can be made."""
    place(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_no_pinned_file_was_changed() -> None:
    assert_no_file_was_changed(HERE, SUMS_SHA256)


def test_every_request_is_in_the_tables() -> None:
    assert {name: entry["flags"] for name, entry in TABLE.items()} == PICTURES
    assert {name: entry["arguments"] for name, entry in LINES.items()} == COMMAND_LINES


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", PICTURES)
def test_a_request_means_and_samples_what_it_did(name: str) -> None:
    entry = TABLE[name]
    run = adapter.run_json_of(as_then(PICTURES[name]))
    assert run["identity"] == entry["identity"]
    assert run["fingerprint"] == entry["fingerprint"]
    x, images, labels = adapter.samples_of(as_then(PICTURES[name]), COUNT)
    assert (None if labels is None else labels.tolist()) == entry["labels"]
    with np.load(HERE / "floats.npz") as pinned:
        assert x.dtype == pinned[name].dtype
        if same_kind_of_machine(HERE) and name not in LAST_BIT:
            assert np.array_equal(x[:1], pinned[name])
            assert digest(images) == entry["images"]
        else:
            np.testing.assert_allclose(x[:1], pinned[name], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", RUN_JSONS)
def test_a_request_has_the_run_json_that_it_had(name: str) -> None:
    pinned = TABLE[name]["run.json"]
    assert as_pinned(adapter.run_json_of(PICTURES[name]), pinned) | {"created": pinned["created"]} == pinned


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_command_line_resolves_to_the_settings_that_it_had(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)  # where no checkpoint and no module is: a dry run opens none
    pinned = LINES[name]["resolved"]
    if pinned["sigma_min"] is None:  # version 2 showed the levels of a network that it made up
        pinned = pinned | {"sigmas": None, "s_tmax": str(float(pinned["s_tmax"]))}
    resolved = adapter.dry_run_of(COMMAND_LINES[name])
    if pinned["model"].startswith("python:"):  # more is shown now, of what needs no call of the user's code
        resolved |= {name: None for name, value in pinned.items() if value is None}
    assert resolved == pinned


# What is stored.


def test_fragments_of_every_kind_are_pinned() -> None:
    folders = {Path(name).parts[1] for name in FRAGMENT_FILES if name.startswith("fragments/")}
    assert folders == {name.replace(" ", "-") for name in FRAGMENTS}


@pytest.mark.parametrize("name", FRAGMENT_FILES)
def test_the_samples_of_a_fragment_encode_to_its_bytes(name: str) -> None:
    path = HERE / name
    version = read(HERE / "machine.json")["versions"]["pyarrow"]
    if path.suffix == ".parquet" and pa.__version__ != version:
        pytest.skip(f"pyarrow {pa.__version__} may write other Parquet bytes than {version}, which wrote these")
    assert adapter.fragment_bytes(**adapter.read_fragment(path), format=path.suffix[1:]) == path.read_bytes()


@pytest.mark.parametrize("name", FRAGMENT_FILES)
def test_a_fragment_has_the_columns_and_the_record_that_it_had(name: str) -> None:
    """As another program reads the file that this version writes of the same samples."""
    path = HERE / name
    read_back = adapter.read_fragment(path)
    data = adapter.fragment_bytes(**read_back, format=path.suffix[1:])
    images, labels = read_back["images"], read_back["labels"]
    label = [] if labels is None else [pa.field("label", pa.int32(), nullable=False)]
    if path.suffix == ".parquet":
        table = pq.read_table(pa.BufferReader(data))
        width = images[0].nbytes
        index, image = (
            pa.field("index", pa.int64(), nullable=False),
            pa.field("image", pa.binary(width), nullable=False),
        )
        assert table.schema.remove_metadata() == pa.schema([index, *label, image])
        record = json.loads(table.schema.metadata[b"ray_sampler"])
        assert b"".join(table["image"].to_pylist()) == images.tobytes()
    else:
        with np.load(io.BytesIO(data)) as arrays:
            assert arrays.files == ["arr_0", *(["arr_1"] if label else []), "index", "record"]
            assert np.array_equal(arrays["arr_0"], images)
            record = json.loads(arrays["record"].item())
    assert record.keys() >= RECORD_KEYS


@pytest.mark.parametrize("name", RUNS)
def test_fragments_of_a_run_hold_their_part_of_the_archive(name: str) -> None:
    for path in (HERE / name / "fragments").iterdir():
        fragment = adapter.read_fragment(path)
        part = slice(fragment["start"], fragment["start"] + len(fragment["images"]))
        with np.load(HERE / "archives" / f"{name}.npz") as archive:
            assert np.array_equal(fragment["images"], archive["arr_0"][part])
            assert np.array_equal(fragment["labels"], archive["arr_1"][part])
        assert fragment["fingerprint"] == read(HERE / name / "run.json")["fingerprint"]


# What a run does.


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_version_2_left_half_done_is_completed(name: str, folder: Path) -> None:
    shutil.copytree(HERE / name, folder / "run")
    before = contents(folder / "run")
    archive, summary = adapter.run(RUNS[name])
    after = contents(folder / "run")
    pinned = json.loads(before.pop("run.json"))
    assert as_pinned(json.loads(after["run.json"]), pinned) == pinned
    assert {path: after.get(path) for path in before} == before
    assert not any(path.startswith("rejected") for path in after)
    old = sum(len(adapter.read_fragment(HERE / name / path)["images"]) for path in before if "fragments" in path)
    assert (summary["reused"], summary["computed"]) == (old, RUNS[name]["num_samples"] - old)
    assert_pinned_archive(HERE, archive, name)
