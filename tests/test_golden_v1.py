"""What version 1 wrote stays valid: fingerprints, run.json, fragments, archives, and directories left half done.

The files in golden/v1 were written by version 1 and never change. `golden/make_v1.py` shows how they were made.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from ray_sampler.cluster.job import prepare
from ray_sampler.config import RunConfig
from ray_sampler.errors import RequestError
from tests.cluster.runs import contents
from tests.golden import adapter, checks
from tests.golden.checks import assert_no_file_was_changed, assert_pinned_archive, same_kind_of_machine, sha256
from tests.golden.requests import COMMAND_LINES, CONFIGURATIONS, FLOAT_SAMPLES, FLOATS, HERE, RUNS

SUMS_SHA256 = "de12c773a9d46c4bd7053a659ae7132159523608b7cfb75015dc45731df7c6eb"
"""Of golden/v1/SHA256SUMS, which holds that of every other file there."""

ARCHIVES_SHA256 = {
    "finished": "294ef2373227855a41de94cc6abfa74111c00918f00d056f05743f6dd61738d9",
    "half-done-digits": "bcc6ddce385dd422c60e509156c724ff2d8071793ed6edb175dfd577abb3b746",
    "half-done-dummy": "8884bc1c690c714d121fb2dd9f2dd0f8713e7cb2e81e0db2332324643c519f46",
    "half-done-npz": "2ed8e4adad9b52fd9227ab2315d7ce17c92616b1e66d86cbaebb0d315e1b8924",
    "half-done-parquet": "776cd57c4c8df826ee14e578c660349e31032c17ac3684c7fe875c9bad629b61",
}

DIGITS_V1_SHA256 = "5974445af42b7f40eedeff04798f9cbcb4082e2903d355ccac5015816d6cc2e6"

SETTINGS_ADDED_SINCE: set[str] = set()
"""Flags that version 1 did not have: they may be among the settings, and nothing else may be new there."""

KEYS_ADDED_SINCE = {"command"}
"""Keys of run.json that version 1 did not have."""

SHOWN_SINCE = {"schedule", "nfe", "sigmas", "made"}
"""What --dry_run and summary.json show beside the settings, and version 1 did not."""

SECONDS_SINCE = {"computing"}
"""What summary.json says of times, and version 1 did not."""

TIMINGS = {"seconds", "samples_per_second", "timeline"}
OF_PIXELS = {"archive", "pixels", "computed_by"}

HALF_DONE = [name for name in RUNS if name != "finished"]
FRAGMENTS = sorted(str(path.relative_to(HERE)) for path in HERE.glob("*/fragments/*"))


def read(name: str) -> Any:
    return checks.read(HERE / name)


def as_version_1(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in SETTINGS_ADDED_SINCE}


def named_today(name: str) -> dict[str, str]:
    """The model of a run, where its name meant other weights in version 1."""
    return {"model": "digits-v1"} if RUNS[name]["model"] == "digits" else {}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that holds tiny.safetensors, where every pinned request can be made."""
    shutil.copy(HERE / "tiny.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_no_pinned_file_was_changed() -> None:
    assert_no_file_was_changed(HERE, SUMS_SHA256)
    assert {name: sha256((HERE / "archives" / f"{name}.npz").read_bytes()) for name in RUNS} == ARCHIVES_SHA256


# What a request means.


def test_every_configuration_is_in_the_table() -> None:
    flags = {name: entry["flags"] for name, entry in read("fingerprints.json").items()}
    assert flags == {name: each.flags for name, each in CONFIGURATIONS.items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_request_has_the_fingerprint_that_it_had(name: str) -> None:
    entry = read("fingerprints.json")[name]
    identity = adapter.identity_of(entry["flags"], entry["weights_hash"], entry["gpus"], entry["dummy_seed"])
    assert identity == entry["identity"]
    assert adapter.fingerprint_of(identity) == entry["fingerprint"]
    assert sha256(json.dumps(identity, sort_keys=True).encode()) == entry["fingerprint"]


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_a_command_line_resolves_to_the_settings_that_it_had(name: str) -> None:
    entry = read("dry_run.json")[name]
    assert entry["arguments"] == COMMAND_LINES[name]
    of_old_digits = entry["resolved"]["model"] == "digits"
    resolved = adapter.dry_run_of([*entry["arguments"], *(["--model", "digits-v1"] if of_old_digits else [])])
    resolved["model"] = "digits" if of_old_digits else resolved["model"]
    assert as_version_1({k: v for k, v in resolved.items() if k not in SHOWN_SINCE}) == entry["resolved"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "half-done-dummy"])  # which draws a seed
def test_a_request_has_the_run_json_that_it_had(name: str, folder: Path) -> None:
    flags, pinned = RUNS[name], read(f"{name}/run.json")
    actual = adapter.run_json_of(flags | named_today(name))
    settings = as_version_1(actual["settings"]) | {"model": flags["model"]}
    actual |= {"settings": settings, "created": pinned["created"]}
    actual = {key: value for key, value in actual.items() if key not in KEYS_ADDED_SINCE}
    assert json.dumps(actual, sort_keys=True) == json.dumps(pinned, sort_keys=True)


@pytest.mark.parametrize("name", FLOATS)
def test_samples_have_the_values_that_they_had_before_rounding(name: str, folder: Path) -> None:
    actual = adapter.samples_of(FLOATS[name], FLOAT_SAMPLES)[0].clip(-1, 1)
    with np.load(HERE / "floats.npz") as pinned:
        assert actual.dtype == np.float32
        tolerance = 0 if same_kind_of_machine(HERE) else 1e-4
        np.testing.assert_allclose(actual, pinned[name], rtol=0, atol=tolerance)


# What is stored.


@pytest.mark.parametrize("name", FRAGMENTS)
def test_the_samples_of_a_fragment_encode_to_its_bytes(name: str) -> None:
    path = HERE / name
    version = read("machine.json")["versions"]["pyarrow"]
    if path.suffix == ".parquet" and pa.__version__ != version:
        pytest.skip(f"pyarrow {pa.__version__} may write other Parquet bytes than {version}, which wrote these")
    assert adapter.fragment_bytes(**adapter.read_fragment(path), format=path.suffix[1:]) == path.read_bytes()


@pytest.mark.parametrize("name", FRAGMENTS)
def test_a_fragment_holds_its_part_of_the_archive(name: str) -> None:
    run = name.partition("/")[0]
    fragment = adapter.read_fragment(HERE / name)
    part = slice(fragment["start"], fragment["start"] + len(fragment["images"]))
    with np.load(HERE / "archives" / f"{run}.npz") as archive:
        assert np.array_equal(fragment["images"], archive["arr_0"][part])
        assert np.array_equal(fragment["labels"], archive["arr_1"][part])
    assert fragment["fingerprint"] == read(f"{run}/run.json")["fingerprint"]


def test_the_fragments_of_a_run_merge_into_its_archive(tmp_path: Path) -> None:
    shutil.copytree(HERE / "finished", tmp_path / "run")
    archive = tmp_path / "run" / "samples_24x16x16x3.npz"
    archive.unlink()
    adapter.merge(tmp_path / "run")
    assert sha256(archive.read_bytes()) == ARCHIVES_SHA256["finished"]


# What a run does.


class Run(NamedTuple):
    """A run of today in a directory of version 1."""

    before: dict[str, bytes]
    folder: Path
    archive: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def runs(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The finished run, done again from its start, and those that were left half done; they share actors."""
    folders = {tmp_path_factory.mktemp(name): name for name in RUNS}
    for folder, name in folders.items():
        shutil.copy(HERE / "tiny.safetensors", folder)
        if name in HALF_DONE:
            shutil.copytree(HERE / name, folder / "run")
    before = [contents(folder / "run") for folder in folders]
    done = adapter.run_together({folder: RUNS[name] | named_today(name) for folder, name in folders.items()})
    return {
        name: Run(there, folder / "run", *result)
        for (folder, name), there, result in zip(folders.items(), before, done, strict=True)
    }


@pytest.fixture(scope="module")
def rerun(runs: dict[str, Run]) -> tuple[Path, dict[str, Any]]:
    """The directory and the summary of the run that was done again."""
    return runs["finished"].folder, runs["finished"].summary


def test_a_run_gives_the_archive_that_it_gave(rerun: tuple[Path, dict[str, Any]]) -> None:
    assert_pinned_archive(HERE, rerun[0] / "samples_24x16x16x3.npz", "finished")


def test_a_run_writes_the_run_json_that_it_wrote(rerun: tuple[Path, dict[str, Any]]) -> None:
    pinned = (HERE / "finished" / "run.json").read_text()
    written = json.loads((rerun[0] / "run.json").read_text())
    actual = {key: value for key, value in written.items() if key not in KEYS_ADDED_SINCE}
    actual["settings"] = as_version_1(actual["settings"])
    text = json.dumps(actual, indent=2, sort_keys=True) + "\n"
    assert text.replace(actual["created"], json.loads(pinned)["created"]) == pinned


def test_a_run_writes_the_fragments_that_it_wrote(rerun: tuple[Path, dict[str, Any]]) -> None:
    names = {path.name for path in (HERE / "finished" / "fragments").iterdir()}
    assert {path.name for path in (rerun[0] / "fragments").iterdir()} == names
    for name in names:
        actual, pinned = (
            adapter.read_fragment(folder / "fragments" / name) for folder in (rerun[0], HERE / "finished")
        )
        assert actual["computed_by"].keys() == pinned["computed_by"].keys()
        assert actual["fingerprint"] == pinned["fingerprint"]
        assert np.array_equal(actual["labels"], pinned["labels"])
        if same_kind_of_machine(HERE):
            assert np.array_equal(actual["images"], pinned["images"])


def test_a_run_has_the_summary_that_it_had(rerun: tuple[Path, dict[str, Any]]) -> None:
    pinned = read("finished/summary.json")
    actual = rerun[1] | {"settings": as_version_1(rerun[1]["settings"])}
    actual = {name: value for name, value in actual.items() if name not in SHOWN_SINCE}
    assert actual.keys() == pinned.keys()
    varying = TIMINGS if same_kind_of_machine(HERE) else TIMINGS | OF_PIXELS
    assert {k: v for k, v in actual.items() if k not in varying} == {
        k: v for k, v in pinned.items() if k not in varying
    }
    assert actual["seconds"].keys() - SECONDS_SINCE == pinned["seconds"].keys()
    assert actual["timeline"].keys() == pinned["timeline"].keys()


@pytest.mark.usefixtures("local_ray")
def test_a_run_that_version_1_finished_is_left_as_it_is(folder: Path) -> None:
    shutil.copytree(HERE / "finished", folder / "run")
    archive, summary = adapter.run(RUNS["finished"])
    assert archive.name == "samples_24x16x16x3.npz"
    assert summary == read("finished/summary.json")
    assert contents(folder / "run") == contents(HERE / "finished")


@pytest.mark.parametrize("name", HALF_DONE)
def test_a_run_that_version_1_left_half_done_continues(name: str, runs: dict[str, Run]) -> None:
    before, folder, archive, summary = runs[name]
    after = contents(folder)
    assert {path: after.get(path) for path in before} == before
    assert not any(path.startswith("rejected") for path in after)
    old = sum(len(adapter.read_fragment(HERE / name / path)["images"]) for path in before if "fragments" in path)
    assert (summary["reused"], summary["computed"]) == (old, RUNS[name]["num_samples"] - old)
    assert_pinned_archive(HERE, archive, name)


@pytest.mark.parametrize("named", [False, True])
def test_a_run_that_was_begun_with_the_old_digits_is_refused_with_their_name(folder: Path, named: bool) -> None:
    flags = dict(RUNS["half-done-digits"])
    if not named:
        del flags["model"]
    shutil.copytree(HERE / "half-done-digits", "run")
    with pytest.raises(RequestError, match="--model digits-v1, whose weights it was begun with"):
        prepare(RunConfig(**flags))
    assert prepare(RunConfig(**flags | {"overwrite": True})).config.model == "digits"
    job = prepare(RunConfig(**flags | {"model": "digits-v1"}))
    assert job.fingerprint == read("half-done-digits/run.json")["fingerprint"]


def test_a_run_of_other_weights_is_refused_without_a_name(folder: Path) -> None:
    shutil.copytree(HERE / "half-done-parquet", "run")
    with pytest.raises(RequestError, match=r"the same settings, or --overwrite$"):
        prepare(RunConfig(output="run", num_samples=4))


def test_the_old_digits_are_the_file_of_version_1() -> None:
    file = files("ray_sampler.networks") / "digits" / "digits-v1.safetensors"
    assert sha256(file.read_bytes()) == DIGITS_V1_SHA256
