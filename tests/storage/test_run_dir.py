"""The run directory: what is written is read, by one creator, wherever it is."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
import uuid

import pytest

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.record import FragmentName, fingerprint
from ray_sampler.storage.run_dir import RunDir
from tests.storage.fill import FINGERPRINT, NAME, fill, names_in


def test_what_is_written_is_read(output):
    run_dir = RunDir(output)
    assert run_dir.read_run() is None
    assert run_dir.fragments.list()[:2] == ([], [])
    assert run_dir.read_file("preview.png") is None
    assert run_dir.create_run({"seed": 1}) == {"seed": 1}
    run_dir.replace_run({"seed": 1, "num_samples": 9})
    assert run_dir.read_run() == {"seed": 1, "num_samples": 9}
    records = fill(run_dir, [FragmentName(4, 8, "npz"), FragmentName(0, 4, "parquet"), FragmentName(0, 6, "parquet")])
    assert [(n.start, n.stop) for n in run_dir.fragments.list().fragments] == [(0, 6), (0, 4), (4, 8)]
    assert run_dir.fragments.read(NAME, FINGERPRINT).record == records[NAME]
    run_dir.write_file("preview.png", b"1")
    run_dir.write_file("preview.png", b"22")
    assert run_dir.read_file("preview.png") == b"22"
    assert pickle.loads(pickle.dumps(run_dir)).read_run() == run_dir.read_run()
    assert run_dir.archive_name(50000, (64, 64, 3)) == "samples_50000x64x64x3.npz"


def test_a_listing_is_never_cached(output):
    first, second = RunDir(output), RunDir(output)
    for start in range(0, 12, 4):
        assert len(first.fragments.list().fragments) == start // 4
        fill(second, [FragmentName(start, start + 4, "parquet")])


def test_each_fragment_has_the_time_of_its_last_write(output):
    run_dir = RunDir(output)
    fill(run_dir, [NAME])
    assert run_dir.fragments.list(times=True).modified[NAME] == pytest.approx(time.time(), abs=60)


def test_of_two_rivals_exactly_one_creates_the_run(output):
    if output.startswith("s3://") and "s3-rclone" in os.environ.get("PYTEST_CURRENT_TEST", ""):
        pytest.skip("rclone ignores conditions on a put; the read back decides there")
    for _ in range(5):
        rivals = [RunDir(f"{output}-{uuid.uuid4().hex}")] * 4
        standing: dict[int, object] = {}
        barrier = threading.Barrier(len(rivals))

        def create(i, rivals=rivals, standing=standing, barrier=barrier):
            barrier.wait()
            standing[i] = rivals[i].create_run({"rival": i})

        threads = [threading.Thread(target=create, args=(i,)) for i in range(len(rivals))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(standing) == len(rivals)
        assert len({json.dumps(run) for run in standing.values()}) == 1
        assert rivals[0].read_run() == standing[0]


def test_a_later_rival_gets_what_is_there(output):
    assert RunDir(output).create_run({"rival": 0}) == {"rival": 0}
    assert RunDir(output).create_run({"rival": 1}) == {"rival": 0}


def whole_run() -> dict[str, object]:
    identity = {"seed": 1, "sigma_max": 80.0}
    return {
        "fingerprint": fingerprint(identity),
        "identity": identity,
        "image_shape": [8, 8, 3],
        "labelled": True,
        "num_samples": 40,
        "settings": {"model": "x"},
    }


def test_a_run_json_cut_short_at_any_length_or_changed_in_any_byte_is_refused_or_means_the_same(tmp_path):
    run_dir = RunDir(str(tmp_path))
    assert run_dir.create_run(whole_run()) == whole_run()
    data = (tmp_path / "run.json").read_bytes()
    cut = [data[:length] for length in range(len(data) - 1)]  # the line's end is all that may be missing
    others = [b"[1]", b"7", b"null", b'"x"', b"\xff", b"[" * 100_000, b"NaN", data + data]
    for content in [*cut, *others]:
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(RunError, match=r"delete it and run the same command"):
            run_dir.read_run()
    for i in range(len(data)):
        (tmp_path / "run.json").write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            run = run_dir.read_run()
        except RunError:
            continue
        # What no samples depend on may be changed by hand, as num_samples is when a run grows.
        assert run is not None
        assert (run["fingerprint"], run["identity"]) == (whole_run()["fingerprint"], whole_run()["identity"])


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "ab" * 32},
        {"fingerprint": None},
        {"identity": {"seed": 2}},
        {"identity": [1]},
        {"identity": None},
        {"num_samples": "40"},
        {"num_samples": True},
        {"num_samples": -1},
        {"image_shape": [8, 8]},
        {"image_shape": 8},
        {"labelled": None},
        {"settings": []},
    ],
    ids=str,
)
def test_a_run_json_that_contradicts_itself_is_refused(tmp_path, change):
    run_dir = RunDir(str(tmp_path))
    run_dir.create_run(whole_run())
    run_dir.replace_run(whole_run() | change)
    with pytest.raises(RunError, match=r"delete it and run the same command"):
        run_dir.read_run()


def test_probes_prove_that_each_reads_and_writes(output):
    driver, actor = RunDir(output), RunDir(output)
    assert not actor.probe_seen("driver")
    driver.probe_write("driver")
    assert actor.probe_seen("driver")
    actor.probe_write("actor-1")
    assert driver.probe_seen("actor-1")
    driver.probes_clear("actor")
    assert not driver.probe_seen("actor-1")
    assert driver.probe_seen("driver")
    driver.probes_clear()
    driver.probes_clear()
    assert not actor.probe_seen("driver")


def test_delete_removes_a_run_and_nothing_else(output):
    run_dir = RunDir(output)
    run_dir.delete()
    run_dir.create_run({"seed": 1})
    fill(run_dir, [NAME])
    run_dir.fragments.reject("nothing", "no such file")
    run_dir.probe_write("driver")
    for name in ("preview.png", "summary.json", "report.html", "samples_4x8x8x3.npz"):
        run_dir.write_file(name, b"x")
    for name in ("notes.txt", "samples_mine.npz"):
        run_dir._store.put(name, b"mine")
    run_dir.delete()
    assert run_dir.probe_seen("driver")  # actors of the run that takes the place have started
    run_dir.probes_clear()
    assert names_in(run_dir) == {"notes.txt", "samples_mine.npz"}
    with pytest.raises(RequestError, match="not a run's"):
        run_dir.delete()
    assert names_in(run_dir) == {"notes.txt", "samples_mine.npz"}


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir("runs/a")
    monkeypatch.chdir("/")
    run_dir.create_run({})
    assert (tmp_path / "runs" / "a" / "run.json").exists()
