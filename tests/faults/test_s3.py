"""The S3 store before two real servers, while requests fail: what is written and read stays right, in bounded time."""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage import connect, object_store, retry
from ray_sampler.storage.ranges import FOOTER_BYTES
from ray_sampler.storage.record import FragmentName, MissingFragment
from ray_sampler.storage.run_dir import RunDir
from tests.faults.proxy import Fault, FaultProxy, Kind, once
from tests.faults.servers import BUCKET, KEY, SECRET, client
from tests.faults.sweep import PASSING
from tests.storage.conftest import moto_endpoint, rclone_endpoint, use_endpoint
from tests.storage.fill import FINGERPRINT, encoded

__all__ = ["moto_endpoint", "rclone_endpoint"]

NAME = FragmentName(0, 4, "parquet")
ARCHIVE = "samples_9x1x1x1.npz"
PART = 5 * 2**20
"""Bytes of a part here: the least that S3 takes."""


def behind(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.02)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.04)
    monkeypatch.setattr(object_store, "PART_BYTES", PART)
    with FaultProxy(endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture(params=["rclone_endpoint", "moto_endpoint"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before each of the two servers in turn; the waits between attempts are hundredths of seconds."""
    yield from behind(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture
def moto(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Before the server that knows conditions and lists uploads."""
    yield from behind(moto_endpoint, monkeypatch)


@pytest.fixture
def run_dir(proxy: FaultProxy) -> RunDir:
    return RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def store_of(run_dir: RunDir, proxy: FaultProxy) -> dict[str, bytes]:
    """What is in the bucket, by path below the run directory, asked of the server itself."""
    s3 = client(proxy.upstream.geturl())
    prefix = run_dir.url.rpartition("/")[2] + "/"
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    keys = [entry["Key"] for entry in found]
    return {key.removeprefix(prefix): s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def uploads(run_dir: RunDir, proxy: FaultProxy) -> list[dict[str, str]]:
    """The uploads to the run directory that were begun and are neither complete nor aborted."""
    prefix = run_dir.url.rpartition("/")[2] + "/"
    found = client(proxy.upstream.geturl()).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return found.get("Uploads", [])


def write_archive(run_dir: RunDir, chunks: Iterable[bytes], size: int = 0) -> None:
    run_dir.write_archive(ARCHIVE, chunks, size)


@pytest.mark.parametrize("kind", PASSING)
def test_an_error_that_passes_is_not_seen(run_dir: RunDir, proxy: FaultProxy, kind: Kind, caplog):
    data = os.urandom(100_000)
    proxy.plan(*(once(kind, 1, [operation]) for operation in ("PutObject", "GetObject", "ListObjectsV2")))
    run_dir.fragments.write(NAME, data)
    assert run_dir.read_file("none") is None
    assert run_dir.fragments.list().fragments == [NAME]
    for operations in (["ListObjectsV2", "PutObject", "DeleteObject"], ["GetObject"]):
        proxy.plan(*(once(kind, 1, [operation]) for operation in operations))
        if "PutObject" in operations:
            run_dir.fragments.reject(NAME.filename, "x")
        assert run_dir._store.read(f"rejected/{NAME.filename}") == data
    run_dir._store.remove("fragments")
    run_dir._store.remove("rejected")
    assert store_of(run_dir, proxy) == {}
    assert proxy.faults[kind] >= 6
    if kind in ("500", "503"):  # of a connection that breaks without an answer, aiohttp makes another by itself
        assert caplog.text.count("follows in") == proxy.faults[kind]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", PASSING)
def test_an_archive_of_several_parts_is_whole_though_any_request_of_it_fails(
    run_dir: RunDir, proxy: FaultProxy, kind: Kind, number: int
):
    size = 2 * PART + 12345
    data = os.urandom(2**20) * (size // 2**20) + os.urandom(size % 2**20)
    operations = ("HeadObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
    proxy.plan(*(once(kind, number, [operation]) for operation in operations))
    write_archive(run_dir, (data[start : start + 3_000_000] for start in range(0, size, 3_000_000)), size)
    proxy.plan(once(kind, number, ["GetObject"]), once(kind, 1, ["HeadObject"]))
    with run_dir.open_file(ARCHIVE) as opened:
        pieces = list(iter(lambda: opened(5_000_000), b""))
    assert hashlib.sha256(b"".join(pieces)).digest() == hashlib.sha256(data).digest()
    assert list(store_of(run_dir, proxy)) == [ARCHIVE]
    assert proxy.faults[kind] >= (6 if number == 1 else 2)


@pytest.mark.parametrize("operation", ["HeadObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload"])
@pytest.mark.parametrize("kind", ["403", "503", "reset upload"])
def test_an_archive_that_cannot_be_written_leaves_the_old_one_and_no_upload(
    moto: FaultProxy, kind: Kind, operation: str
):
    run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    run_dir.write_file(ARCHIVE, b"old")
    moto.plan(Fault(kind, 1, operations=[operation]))
    with pytest.raises((RequestError, RunError)):
        write_archive(run_dir, [bytes(2**20)] * (2 * PART // 2**20 + 1), 2 * PART)
    gc.collect()
    assert store_of(run_dir, moto) == {ARCHIVE: b"old"}
    assert uploads(run_dir, moto) == []


def test_an_upload_that_another_aborted_is_not_an_archive_though_one_of_its_size_is_there(
    run_dir: RunDir, proxy: FaultProxy
):
    run_dir.write_file(ARCHIVE, b"old")

    def chunks() -> Iterator[bytes]:
        yield b"new"
        (upload,) = uploads(run_dir, proxy)
        s3 = client(proxy.upstream.geturl())
        s3.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])

    with pytest.raises(
        RunError, match=r"the store aborted the upload|unexpected response from the store"
    ):  # moto: a 500
        write_archive(run_dir, chunks())
    assert store_of(run_dir, proxy) == {ARCHIVE: b"old"}


def test_of_a_run_created_by_a_request_whose_answer_was_lost_it_is_known_that_it_is_ours(moto: FaultProxy):
    run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    moto.plan(once("lost", 1, ["PutObject"]))
    assert run_dir.create_run({"seed": 1}) == {"seed": 1}
    assert moto.faults == {"lost": 1}
    assert moto.requests["PutObject"] == 2  # the second one was refused: something stood there already
    assert RunDir(run_dir.url).create_run({"seed": 2}) == {"seed": 1}


@pytest.mark.slow
@pytest.mark.parametrize("proxy", ["rclone_endpoint"], indirect=True)
def test_a_listing_of_thousands_is_whole_though_a_page_fails_or_is_late(run_dir: RunDir, proxy: FaultProxy):
    s3 = client(proxy.upstream.geturl())
    prefix = run_dir.url.rpartition("/")[2]
    names = [FragmentName(i, i + 1, "parquet") for i in range(2105)]

    def put(name: FragmentName) -> None:
        s3.put_object(Bucket=BUCKET, Key=f"{prefix}/fragments/{name.filename}", Body=b"")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, names))
    kinds: tuple[Kind, ...] = ("503", "reset", "truncated")
    for page, kind in enumerate(kinds, 1):
        proxy.clear()
        proxy.plan(Fault(kind, page, page + 1, operations=["ListObjectsV2"]))
        assert run_dir.fragments.list().fragments == names
        assert proxy.requests["ListObjectsV2"] == 5  # three pages, and no page twice but the one that failed
    proxy.plan(once("slow", 2, ["ListObjectsV2"], seconds=0.5))
    assert run_dir.fragments.list().fragments == names
    proxy.plan(once("500", 2, ["ListObjectsV2"]), once("503", 1, ["DeleteObject"]))
    run_dir._store.remove("fragments")
    assert store_of(run_dir, proxy) == {}


def test_a_deletion_that_is_refused_is_told(moto: FaultProxy):
    run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    run_dir.write_file("preview.png", b"x")
    moto.plan(Fault("403", operations=["DeleteObject"]))
    with pytest.raises(RequestError, match="permission denied"):
        run_dir._store.remove("preview.png")


def test_a_move_that_ends_between_copy_and_deletion_loses_nothing_and_is_made_again(
    run_dir: RunDir, proxy: FaultProxy, caplog
):
    run_dir.fragments.write(NAME, b"damaged")
    proxy.plan(Fault("403", 1, operations=["DeleteObject"]))
    run_dir.fragments.reject(NAME.filename, "first")
    assert "could not be moved" in caplog.text
    assert "permission denied" in caplog.text
    assert run_dir.fragments.list().fragments == [NAME]
    proxy.plan()
    run_dir.fragments.reject(NAME.filename, "second")
    assert run_dir.fragments.list().fragments == []
    kept = {path: data for path, data in store_of(run_dir, proxy).items() if not path.endswith(".reason.txt")}
    assert set(kept.values()) == {b"damaged"}


@pytest.mark.parametrize("kind", ["503", "truncated"])
def test_an_error_that_lasts_is_asked_for_six_times_and_told_in_one_sentence(
    run_dir: RunDir, proxy: FaultProxy, kind: Kind, caplog
):
    requests: dict[str, Callable[[], object]] = {
        "PutObject": lambda: run_dir.fragments.write(NAME, b"x"),
        "GetObject": run_dir.read_run,
        "ListObjectsV2": run_dir.fragments.list,
    }
    run_dir.write_file("run.json", b"{}")
    for operation, request in requests.items():
        proxy.clear()
        proxy.plan(Fault(kind))
        caplog.clear()
        with pytest.raises(RunError, match="run the same command again") as caught:
            request()
        # Of a connection that was used before and is reset, aiohttp asks once more by itself.
        assert retry.ATTEMPTS <= proxy.requests[operation] <= 2 * retry.ATTEMPTS
        assert caplog.text.count("follows in") == retry.ATTEMPTS - 1
        assert f"attempt 6 of {retry.ATTEMPTS}" in caplog.text
        assert "\n" not in str(caught.value)
        assert KEY not in caplog.text + str(caught.value)
        assert SECRET not in caplog.text + str(caught.value)


def test_a_lasting_error_takes_about_half_a_minute_at_most():
    """By the waits between attempts, whose longest are 1, 2, 4, 8 and 16 seconds."""
    longest = [min(retry.BACKOFF_S * 2**i, retry.LONGEST_WAIT_S) for i in range(retry.ATTEMPTS - 1)]
    assert sum(longest) == 31
    # One that is noticed only by its silence: up to the attempt that begins last.
    assert retry.GIVE_UP_S + retry.LONGEST_WAIT_S + connect.READ_TIMEOUT_S < 100


@pytest.mark.slow
def test_a_stall_is_noticed_and_asked_for_again(rclone_endpoint: str, monkeypatch):
    monkeypatch.setitem(connect.S3_CONFIG, "read_timeout", 1)
    for proxy in behind(rclone_endpoint, monkeypatch):
        run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
        data = os.urandom(300_000)
        for operation in ("PutObject", "GetObject", "ListObjectsV2"):
            proxy.plan(once("stall", 1, [operation], seconds=60))
            began = time.monotonic()
            run_dir.fragments.write(NAME, data)
            assert run_dir._store.read(f"fragments/{NAME.filename}") == data
            assert run_dir.fragments.list().fragments == [NAME]
            assert 1 <= time.monotonic() - began < 30, operation
        assert proxy.faults == {"stall": 3}
        proxy.plan(Fault("stall", operations=["GetObject"], seconds=60))
        monkeypatch.setattr(retry, "GIVE_UP_S", 2)
        began = time.monotonic()
        with pytest.raises(RunError, match="Timeout"):
            run_dir.read_run()
        assert time.monotonic() - began < 30


def test_a_store_that_was_pickled_makes_no_more_attempts_than_before(run_dir: RunDir, proxy: FaultProxy):
    run_dir.write_file("run.json", b"{}")
    there = pickle.loads(pickle.dumps(run_dir))
    proxy.plan(Fault("503"))
    proxy.clear()
    with pytest.raises(RunError, match="SlowDown"):
        there.read_run()
    assert proxy.requests.total() == retry.ATTEMPTS


@pytest.mark.slow
def test_old_uploads_are_aborted_beyond_the_first_page_and_though_a_request_fails(moto: FaultProxy):
    run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    s3 = client(moto.upstream.geturl())
    prefix = run_dir.url.rpartition("/")[2]
    for i in range(1005):
        s3.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/{i:04d}")
    moto.plan(once("503", 1, ["ListMultipartUploads"]), once("500", 5, ["AbortMultipartUpload"]))
    run_dir._store.clear_abandoned("", seconds=86400)  # this server dates every upload 2010
    assert moto.faults == {"503": 1, "500": 1}
    assert uploads(run_dir, moto) == []


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.02)
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING), pytest.raises(RunError, match="EndpointConnectionError"):
        RunDir(f"s3://{BUCKET}/x").read_run()
    assert caplog.text.count("follows in") == retry.ATTEMPTS - 1


@pytest.mark.parametrize(
    "endpoint", ["http://user:planted-password@127.0.0.1:9", "user:planted-password@host", "http://[::1", "http://"]
)
@pytest.mark.parametrize(
    "url", [f"s3://PLANTEDKEY:planted/secret@{BUCKET}/run", f"s3://{BUCKET}/run", "s3://no bucket!/run"]
)
def test_a_credential_in_an_address_is_refused_and_never_shown(url: str, endpoint: str, monkeypatch, caplog):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.02)
    use_endpoint(monkeypatch, endpoint)
    run_dir = RunDir(url)
    for request in (
        run_dir.read_run,
        run_dir.fragments.list,
        lambda: run_dir.create_run({}),
        lambda: write_archive(run_dir, []),
    ):
        with pytest.raises((RequestError, RunError)) as caught:
            request()
        assert caught.value.__suppress_context__
        shown = f"{caught.value} {run_dir!r} {caplog.text}".lower()
        assert "planted" not in shown
        assert SECRET not in shown


def test_a_record_is_read_from_the_end_of_an_object(run_dir: RunDir, proxy: FaultProxy):
    name, data, record, _ = encoded("parquet", 0, 600)
    run_dir.fragments.write(name, data)
    assert len(data) > FOOTER_BYTES
    path = f"fragments/{name.filename}"
    assert run_dir._store.read_end(path, 1000) == data[-1000:]
    assert run_dir._store.read_end(path, 10 * len(data)) == data
    assert run_dir.ranges().read_record(name, FINGERPRINT) == record
    with pytest.raises(MissingFragment):
        run_dir.ranges().read_record(FragmentName(0, 8, "parquet"), FINGERPRINT)
