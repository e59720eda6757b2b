from __future__ import annotations

import errno
import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

import botocore.exceptions
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ray_sampler.config import RequestError, RunError, fingerprint
from ray_sampler.storage import object_store
from ray_sampler.storage.record import DamagedFragment, FragmentName
from ray_sampler.storage.run_dir import RunDir
from ray_sampler.storage.verify import verify
from tests.faults.servers import KEY, SECRET
from tests.faults.servers import client as s3_client
from tests.storage.fill import FINGERPRINT, fill

NAME = FragmentName(0, 4, "parquet")


def names_in(run_dir: RunDir, folder: str = "") -> set[str]:
    return {entry.name for entry in run_dir._store.list(folder)}


def test_what_is_written_is_read(output):
    run_dir = RunDir(output)
    assert run_dir.read_run() is None
    assert run_dir.fragments()[:2] == ([], [])
    assert run_dir.read_file("preview.png") is None
    assert run_dir.create_run({"seed": 1}) == {"seed": 1}
    run_dir.replace_run({"seed": 1, "num_samples": 9})
    assert run_dir.read_run() == {"seed": 1, "num_samples": 9}
    records = fill(run_dir, [FragmentName(4, 8, "npz"), FragmentName(0, 4, "parquet"), FragmentName(0, 6, "parquet")])
    assert [(n.start, n.stop) for n in run_dir.fragments().fragments] == [(0, 6), (0, 4), (4, 8)]
    assert run_dir.read_fragment(NAME, FINGERPRINT).record == records[NAME]
    run_dir.write_file("preview.png", b"1")
    run_dir.write_file("preview.png", b"22")
    assert run_dir.read_file("preview.png") == b"22"
    assert pickle.loads(pickle.dumps(run_dir)).read_run() == run_dir.read_run()
    assert run_dir.archive_name(50000, (64, 64, 3)) == "samples_50000x64x64x3.npz"


def test_a_listing_is_never_cached(output):
    first, second = RunDir(output), RunDir(output)
    for start in range(0, 12, 4):
        assert len(first.fragments().fragments) == start // 4
        fill(second, [FragmentName(start, start + 4, "parquet")])


def test_each_fragment_has_the_time_of_its_last_write(output):
    run_dir = RunDir(output)
    fill(run_dir, [NAME])
    assert run_dir.fragments().modified[NAME] == pytest.approx(time.time(), abs=60)


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


def test_a_later_rival_gets_what_stands_there(output):
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
        with pytest.raises(RunError, match=r"delete that file alone"):
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
    with pytest.raises(RunError, match=r"delete that file alone"):
        run_dir.read_run()


def test_what_is_no_fragment_is_foreign_and_never_followed(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    secret = tmp_path / "secret.parquet"
    secret.write_bytes((tmp_path / "fragments" / NAME.filename).read_bytes())
    link = FragmentName(4, 8, "parquet")
    (tmp_path / "fragments" / link.filename).symlink_to(secret)
    (tmp_path / "fragments" / "000000000008-000000000012.parquet").mkdir()
    (tmp_path / "fragments" / "notes").write_text("mine")
    (tmp_path / "fragments" / f".{NAME.filename}.00.tmp").write_text("unfinished")
    listing = run_dir.fragments()
    assert listing.fragments == [NAME]
    assert listing.foreign == [link.filename, "000000000008-000000000012.parquet", "notes"]
    with pytest.raises((DamagedFragment, RunError)):
        run_dir.read_fragment(link, None)
    for name in listing.foreign:
        run_dir.reject(name, "foreign")
    assert run_dir.fragments()[:2] == ([NAME], [])
    assert secret.exists()
    assert (tmp_path / "rejected" / link.filename).is_symlink()


def test_rejected_names_stay_apart_and_inside(output):
    run_dir = RunDir(output)
    for reason in ("first", "second"):
        run_dir.write_fragment(NAME, reason.encode())
        run_dir.reject(NAME.filename, reason)
    run_dir.reject(NAME.filename, "third, of nothing")
    rejected = names_in(run_dir, "rejected")
    whole = {name for name in rejected if not name.endswith(".reason.txt")}
    assert {run_dir._store.read(f"rejected/{name}") for name in whole} == {b"first", b"second"}
    for name in whole:
        content = run_dir._store.read(f"rejected/{name}")
        assert content is not None
        assert run_dir._store.read(f"rejected/{name}.reason.txt") == content + b"\n"
    run_dir.write_file("run.json", b"{}")
    for escaping in ("../run.json", "..", ".", "", "a/../../run.json", "/etc/hostname"):
        run_dir.reject(escaping, "no")
    assert run_dir.read_run() == {}
    odd = "ümlaut ;name"
    run_dir._store.put(f"fragments/{odd}", b"x")
    run_dir.reject(odd, "odd")
    assert run_dir.fragments().foreign == []
    for name in ("../x", "a/b", "..", ""):
        with pytest.raises(RequestError):
            run_dir.write_file(name, b"")


def stage_and_raise(run_dir: RunDir, chunks: Iterable[bytes], error: BaseException) -> None:
    with run_dir.stage_archive("samples_1x1x1x1.npz") as file:
        for chunk in chunks:
            file.write(chunk)
        raise error


def test_a_staged_archive_is_there_after_a_clean_exit_only(output):
    run_dir = RunDir(output)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            stage_and_raise(run_dir, [b"x" * 2**20], error("stop"))
        gc.collect()
        assert names_in(run_dir) == set()
    with run_dir.stage_archive("samples_1x1x1x1.npz") as file:
        file.write(b"one")
        assert run_dir.read_file("samples_1x1x1x1.npz") is None
        file.write(memoryview(b"two"))
    assert run_dir.read_file("samples_1x1x1x1.npz") == b"onetwo"
    with pytest.raises(ValueError, match="stop"):
        stage_and_raise(run_dir, [b"three"], ValueError("stop"))
    assert run_dir.read_file("samples_1x1x1x1.npz") == b"onetwo"


def test_abandoned_multipart_uploads_are_aborted(moto, monkeypatch):
    client = s3_client(moto)
    prefix = uuid.uuid4().hex
    run_dir = RunDir(f"s3://samples/{prefix}")
    begun = []

    def uploads():
        return client.list_multipart_uploads(Bucket="samples", Prefix=prefix).get("Uploads", [])

    def chunks():
        for _ in range(20):
            yield b"x" * 2**20
        begun.extend(uploads())

    with pytest.raises(ValueError, match="stop"):
        stage_and_raise(run_dir, chunks(), ValueError("stop"))
    assert len(begun) == 1
    gc.collect()
    assert uploads() == []
    # This server dates every upload 2010.
    client.create_multipart_upload(Bucket="samples", Key=f"{prefix}/samples_9x1x1x1.npz")
    client.create_multipart_upload(Bucket="samples", Key=f"{prefix}-other/samples_9x1x1x1.npz")
    run_dir._store.clear_abandoned("", seconds=2e9)
    assert len(uploads()) == 2
    run_dir._store.clear_abandoned("", seconds=86400)
    left = uploads()
    assert [upload["Key"] for upload in left] == [f"{prefix}-other/samples_9x1x1x1.npz"]
    client.abort_multipart_upload(Bucket="samples", Key=left[0]["Key"], UploadId=left[0]["UploadId"])


def test_a_staged_archive_of_many_parts_is_whole(moto):
    run_dir = RunDir(f"s3://samples/{uuid.uuid4().hex}")
    block = os.urandom(2**20)
    with run_dir.stage_archive("samples_9x1x1x1.npz", size=40 * 2**20) as file:
        for _ in range(40):
            file.write(block)
    assert run_dir.read_file("samples_9x1x1x1.npz") == block * 40


def test_unfinished_local_files_are_cleared_once_nobody_writes_them(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    old, abandoned = tmp_path / "fragments" / ".a.parquet.00.tmp", tmp_path / ".samples.npz.01.tmp"
    new = tmp_path / ".samples.npz.02.tmp"
    for path, age in ((old, 90000), (abandoned, 60), (new, 0)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    with run_dir.stage_archive("samples_1x1x1x1.npz") as slow:
        [written] = [path for path in tmp_path.glob(".samples_1x1x1x1*") if path != new]
        os.utime(written, (time.time() - 60,) * 2)
        with run_dir.stage_archive("samples_2x1x1x1.npz") as file:
            file.write(b"x")
        slow.write(b"y")
    assert run_dir.read_file("samples_1x1x1x1.npz") == b"y"
    assert not old.exists()
    assert not abandoned.exists()
    assert new.exists()


def test_a_writer_killed_at_any_moment_leaves_nothing_or_everything(tmp_path):
    program = (
        "import sys; from ray_sampler.storage.run_dir import RunDir, FragmentName\n"
        "r = RunDir(sys.argv[1]); print('go', flush=True)\n"
        "for i in range(10**6): r.write_fragment(FragmentName(i, i + 1, 'npz'), b'x' * 500_000)"
    )
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        for name in RunDir(str(tmp_path)).fragments().fragments:
            assert (tmp_path / "fragments" / name.filename).stat().st_size == 500_000


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
    run_dir.reject("nothing", "no such file")
    run_dir.probe_write("driver")
    for name in ("preview.png", "summary.json", "report.html", "samples_4x8x8x3.npz"):
        run_dir.write_file(name, b"x")
    for name in ("notes.txt", "samples_mine.npz"):
        run_dir._store.put(name, b"mine")
    run_dir.delete()
    assert names_in(run_dir) == {"notes.txt", "samples_mine.npz"}
    with pytest.raises(RequestError, match="no run's"):
        run_dir.delete()
    assert names_in(run_dir) == {"notes.txt", "samples_mine.npz"}


def test_delete_follows_no_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create_run({})
    (tmp_path / "run" / "fragments").symlink_to(tmp_path / "elsewhere")
    run_dir.delete()
    assert (tmp_path / "elsewhere" / "kept").exists()


@pytest.mark.parametrize("folder", ["fragments", "rejected", ".probe"])
def test_a_link_in_place_of_a_folder_leads_nowhere(tmp_path, folder):
    """Who may write to a shared directory must not have another user's run write, move or read elsewhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / NAME.filename).write_text("theirs")
    (outside / "driver").write_text("theirs")
    run_dir = RunDir(str(tmp_path / "run"))
    fill(run_dir, [] if folder == "fragments" else [NAME])
    run_dir.create_run({})
    (tmp_path / "run" / folder).symlink_to(outside)
    requests = {
        "fragments": (
            lambda: run_dir.write_fragment(NAME, b"x"),
            lambda: run_dir.read_fragment(NAME, None),
            run_dir.fragments,
            lambda: run_dir.reject(NAME.filename, "x"),
            lambda: run_dir._store.clear_abandoned("fragments"),
        ),
        "rejected": (lambda: run_dir.reject(NAME.filename, "x"),),
        ".probe": (lambda: run_dir.probe_write("driver"), lambda: run_dir.probe_seen("driver"), run_dir.probes_clear),
    }
    for request in requests[folder]:
        with pytest.raises(RequestError, match="is a link"):
            request()
    assert {path.name: path.read_text() for path in outside.iterdir()} == {NAME.filename: "theirs", "driver": "theirs"}
    if folder == "rejected":
        assert run_dir.fragments().fragments == [NAME]


def test_a_link_in_place_of_a_file_is_replaced_and_what_it_names_stays(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"theirs")
    run_dir = RunDir(str(tmp_path / "run"))
    run_dir.create_run({})
    archive = "samples_1x1x1x1.npz"
    for name in (archive, "preview.png", "summary.json"):
        (tmp_path / "run" / name).symlink_to(outside)
        assert not run_dir.has(name)
    with pytest.raises(FileNotFoundError), run_dir.open_file(archive):
        pass
    with run_dir.stage_archive(archive) as file:
        file.write(b"ours")
    run_dir.write_file("preview.png", b"ours")
    assert run_dir.read_file("preview.png") == run_dir.read_file(archive) == b"ours"
    with pytest.raises(RunError):
        run_dir.read_file("summary.json")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "run.json").symlink_to(outside)
    with pytest.raises(RunError):
        run_dir.create_run({})
    assert outside.read_bytes() == b"theirs"


def test_keys_that_no_folder_could_hold_are_left_where_they_are(moto):
    """In a bucket, fragments/../run.json is a key like any other, and no path."""
    prefix = uuid.uuid4().hex
    run_dir = RunDir(f"s3://samples/{prefix}")
    run_dir.create_run({"seed": 1})
    fill(run_dir, [NAME])
    client = s3_client(moto)
    odd = [f"{prefix}/fragments/../run.json", f"{prefix}/fragments//{NAME.filename}", f"{prefix}/fragments/./x"]
    for key in odd:
        client.put_object(Bucket="samples", Key=key, Body=b"theirs")
    client.put_object(Bucket="samples", Key=f"{prefix}/fragments/sub/x", Body=b"theirs")
    listing = run_dir.fragments()
    assert listing.fragments == [NAME]
    assert listing.foreign == [".", "..", "sub"]
    verify(run_dir, FINGERPRINT)
    assert run_dir.read_run() == {"seed": 1}
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="samples", Prefix=prefix)["Contents"]}
    assert {*odd, f"{prefix}/run.json", f"{prefix}/rejected/sub/x"} <= keys
    assert all(key.startswith(f"{prefix}/") for key in keys)


def test_a_file_name_of_any_bytes_is_set_aside(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    for name in (b"\xff\xfe.parquet", b"line\nbreak", b"\x1b[2J", b"%2e%2e%2frun.json", b"x" * 255, "ü".encode() * 120):
        (tmp_path / "fragments" / os.fsdecode(name)).write_bytes(b"x")
    assert len(verify(run_dir, FINGERPRINT).rejected) == 6
    assert run_dir.fragments()[:2] == ([NAME], [])
    assert len(list((tmp_path / "rejected").iterdir())) == 12


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDir("runs/a")
    monkeypatch.chdir("/")
    run_dir.create_run({})
    assert (tmp_path / "runs" / "a" / "run.json").exists()
    assert run_dir.is_local
    assert not RunDir("memory://x").is_local


def test_a_wrong_url_is_refused_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="unknown protocol"):
        RunDir("nonsense://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RequestError, match=r"pip install 'ray-sampler\[gcs\]'"):
        RunDir("gs://bucket/run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="is a file"):
        RunDir(str(tmp_path / "file"))
    with pytest.raises(RequestError, match="a file stands"):
        RunDir(str(tmp_path / "file" / "run")).create_run({})


def test_a_missing_bucket_and_wrong_keys_are_refused_without_showing_a_key(rclone_endpoint, moto, monkeypatch, caplog):
    with pytest.raises(RequestError, match="its bucket does not exist"):
        RunDir(f"s3://nobody-{uuid.uuid4().hex}/run").create_run({})
    with pytest.raises(RequestError, match="its bucket does not exist"):
        RunDir(f"s3://nobody-{uuid.uuid4().hex}/run").fragments()
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", rclone_endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-key")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match=r"credentials|permission") as caught:
        RunDir("s3://samples/run").create_run({})
    for shown in (str(caught.value), caplog.text):
        assert KEY not in shown
        assert SECRET not in shown
        assert "another-secret" not in shown


def test_missing_credentials_are_refused(moto, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match="no credentials were found"):
        RunDir("s3://samples/run").create_run({})


def test_a_full_or_read_only_disk_is_one_sentence(tmp_path, monkeypatch):
    run_dir = RunDir(str(tmp_path / "run"))
    for number, kind, words in (
        (errno.ENOSPC, RunError, "the disk is full"),
        (errno.EROFS, RequestError, "read-only"),
        (errno.EACCES, RequestError, "permission denied"),
    ):

        def fail(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kind, match=words):
                run_dir.write_fragment(NAME, b"x")
        assert list(Path(tmp_path / "run" / "fragments").iterdir()) == []


def test_passing_errors_are_retried_and_logged_and_lasting_ones_end(monkeypatch, caplog):
    """A store that answers 503 twice, then as it should; and one that never does."""
    run_dir = RunDir(f"memory://{uuid.uuid4().hex}")
    slow_down = botocore.exceptions.ClientError({"Error": {"Code": "SlowDown", "Message": f"not {KEY}"}}, "PutObject")
    answers = [slow_down, slow_down]
    original = MemoryFileSystem.pipe_file

    def answer(self, *args, **kwargs):
        if answers:
            raise answers.pop()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", answer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with caplog.at_level(logging.WARNING):
        run_dir.write_file("preview.png", b"x")
    assert run_dir.read_file("preview.png") == b"x"
    assert caplog.text.count("SlowDown") == 2
    answers.extend([slow_down] * 50)
    with pytest.raises(RunError, match="SlowDown"):
        run_dir.write_file("preview.png", b"y")
    assert len(answers) == 50 - object_store.ATTEMPTS
    assert KEY not in caplog.text
