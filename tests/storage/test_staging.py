"""Archives and fragments that are being written: whole or not there, and cleared when abandoned."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator

import pytest

from ray_sampler.storage.run_dir import RunDir
from tests.faults.servers import client as s3_client
from tests.storage.fill import NAME, fill, names_in


def stage_and_raise(run_dir: RunDir, chunks: Iterable[bytes], error: BaseException) -> None:
    def failing() -> Iterator[bytes]:
        yield from chunks
        raise error

    run_dir.write_archive("samples_1x1x1x1.npz", failing())


def test_a_staged_archive_is_there_after_a_clean_exit_only(output):
    run_dir = RunDir(output)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            stage_and_raise(run_dir, [b"x" * 2**20], error("stop"))
        gc.collect()
        assert names_in(run_dir) == set()

    def chunks() -> Iterator[bytes | memoryview]:
        yield b"one"
        assert run_dir.read_file("samples_1x1x1x1.npz") is None
        yield memoryview(b"two")

    run_dir.write_archive("samples_1x1x1x1.npz", chunks())
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
    run_dir.write_archive("samples_9x1x1x1.npz", [block] * 40, size=40 * 2**20)
    assert run_dir.read_file("samples_9x1x1x1.npz") == block * 40


def test_unfinished_local_files_are_cleared_once_they_are_abandoned(tmp_path):
    run_dir = RunDir(str(tmp_path))
    fill(run_dir, [NAME])
    old, abandoned = tmp_path / "fragments" / ".a.parquet.00.tmp", tmp_path / ".samples.npz.01.tmp"
    new = tmp_path / ".samples.npz.02.tmp"
    for path, age in ((old, 90000), (abandoned, 60), (new, 0)):
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)

    def slow() -> Iterator[bytes]:
        [written] = [path for path in tmp_path.glob(".samples_1x1x1x1*") if path != new]
        os.utime(written, (time.time() - 60,) * 2)
        run_dir.write_archive("samples_2x1x1x1.npz", [b"x"])
        yield b"y"

    run_dir.write_archive("samples_1x1x1x1.npz", slow())
    assert run_dir.read_file("samples_1x1x1x1.npz") == b"y"
    assert not old.exists()
    assert not abandoned.exists()
    assert new.exists()


def test_a_writer_killed_at_any_moment_leaves_nothing_or_everything(tmp_path):
    program = (
        "import sys; from ray_sampler.storage.run_dir import RunDir\n"
        "from ray_sampler.storage.record import FragmentName\n"
        "r = RunDir(sys.argv[1]); print('go', flush=True)\n"
        "for i in range(10**6): r.fragments.write(FragmentName(i, i + 1, 'npz'), b'x' * 500_000)"
    )
    for delay in (0.0, 0.01, 0.03):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.kill()
        process.wait()
        process.stdout.close()
        for name in RunDir(str(tmp_path)).fragments.list().fragments:
            assert (tmp_path / "fragments" / name.filename).stat().st_size == 500_000
