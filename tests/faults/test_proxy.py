"""The proxy fails what it was told to, as it was told to, and passes on everything else as it is."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator

import pytest

from tests.faults.proxy import Fault, FaultProxy, once
from tests.faults.servers import BUCKET, client, rclone, rclone_server

DATA = bytes(range(256)) * 1000


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if rclone() is None:
        pytest.skip("rclone is not installed")
    with rclone_server(tmp_path_factory.mktemp("rclone")) as endpoint:
        yield endpoint


@pytest.fixture
def proxy(upstream: str) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as proxy:
        yield proxy


def request(proxy: FaultProxy, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request without a retry, unsigned: whether the server lets it in does not matter."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_what_is_not_to_fail_passes_as_it_is(proxy):
    s3 = client(proxy.url)
    s3.put_object(Bucket=BUCKET, Key="a/ü b", Body=DATA)
    assert s3.get_object(Bucket=BUCKET, Key="a/ü b")["Body"].read() == DATA
    assert s3.head_object(Bucket=BUCKET, Key="a/ü b")["ContentLength"] == len(DATA)
    assert s3.get_object(Bucket=BUCKET, Key="a/ü b", Range="bytes=5-9")["Body"].read() == DATA[5:10]
    upload = s3.create_multipart_upload(Bucket=BUCKET, Key="b")["UploadId"]
    part = s3.upload_part(Bucket=BUCKET, Key="b", UploadId=upload, PartNumber=1, Body=DATA)
    s3.complete_multipart_upload(
        Bucket=BUCKET, Key="b", UploadId=upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )
    assert s3.get_object(Bucket=BUCKET, Key="b")["Body"].read() == DATA
    assert {entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET)["Contents"]} == {"a/ü b", "b"}
    s3.delete_objects(Bucket=BUCKET, Delete={"Objects": [{"Key": "b"}]})
    s3.delete_object(Bucket=BUCKET, Key="a/ü b")
    assert proxy.requests == {
        "PutObject": 1,
        "GetObject": 3,
        "HeadObject": 1,
        "CreateMultipartUpload": 1,
        "UploadPart": 1,
        "CompleteMultipartUpload": 1,
        "ListObjectsV2": 1,
        "DeleteObjects": 1,
        "DeleteObject": 1,
    }
    assert not proxy.faults


def test_the_requests_that_are_numbered_fail_and_no_other(proxy):
    proxy.plan(once("503", 2, ["GetObject"]), Fault("500", 4, operations=["GetObject"]))
    codes = [request(proxy, "GET", f"/{BUCKET}/none")[0] for _ in range(5)]
    assert [code in (500, 503) for code in codes] == [False, True, False, True, True]
    assert codes[1:] == [503, codes[2], 500, 500]
    assert request(proxy, "HEAD", f"/{BUCKET}/none")[0] not in (500, 503)
    assert proxy.faults == {"503": 1, "500": 2}
    assert proxy.failed == {"GetObject": 3}
    proxy.plan()
    assert request(proxy, "GET", f"/{BUCKET}/none")[0] == codes[0]


def test_chances_come_from_the_seed(upstream):
    def drawn(seed: int) -> list[int]:
        with FaultProxy(upstream, seed) as proxy:
            proxy.plan(Fault("503", probability=0.5))
            return [request(proxy, "GET", f"/{BUCKET}/none")[0] for _ in range(20)]

    assert drawn(1) == drawn(1) != drawn(2)
    assert 4 <= drawn(1).count(503) <= 16


@pytest.mark.parametrize("kind", ["403", "500", "503", "reset upload", "reset", "lost", "truncated"])
def test_an_upload_that_fails_reaches_the_store_or_not_as_its_kind_says(proxy, upstream, tmp_path, kind):
    s3 = client(upstream)
    s3.put_object(Bucket=BUCKET, Key="x", Body=b"old")
    proxy.plan(once(kind))
    signed = client(proxy.url).generate_presigned_url("put_object", {"Bucket": BUCKET, "Key": "x"})
    path = signed.removeprefix(proxy.url)
    if kind in ("403", "500", "503"):
        assert request(proxy, "PUT", path, DATA)[0] == int(kind)
    else:
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            request(proxy, "PUT", path, DATA)
    reached = kind in ("reset", "lost", "truncated")
    assert s3.get_object(Bucket=BUCKET, Key="x")["Body"].read() == (DATA if reached else b"old")
    assert proxy.faults == {kind: 1}


def test_a_download_breaks_stalls_or_is_late_in_the_middle(proxy, upstream):
    client(upstream).put_object(Bucket=BUCKET, Key="x", Body=DATA)
    path = client(proxy.url).generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": "x"})
    path = path.removeprefix(proxy.url)
    proxy.plan(once("truncated"))
    with pytest.raises(http.client.IncompleteRead) as caught:
        request(proxy, "GET", path)
    assert caught.value.partial == DATA[: len(DATA) // 2]
    proxy.plan(once("reset"))
    with pytest.raises(ConnectionResetError):
        request(proxy, "GET", path)
    proxy.plan(once("stall", seconds=0.4))
    began = time.monotonic()
    with pytest.raises(ConnectionResetError):
        request(proxy, "GET", path)
    assert 0.4 <= time.monotonic() - began < 30
    proxy.plan(once("slow", seconds=0.4))
    began = time.monotonic()
    assert request(proxy, "GET", path) == (200, DATA)
    assert 0.4 <= time.monotonic() - began < 30
    assert proxy.faults == {"truncated": 1, "reset": 1, "stall": 1, "slow": 1}


def test_a_new_plan_ends_a_stall(upstream):
    began = time.monotonic()
    with FaultProxy(upstream) as proxy:
        proxy.plan(Fault("stall", seconds=60))
        with socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(b"GET /samples/none HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(5) == b"HTTP/"  # the error's text is halted in the middle
            proxy.plan()
            with pytest.raises(ConnectionResetError):
                list(iter(lambda: connection.recv(10000), b""))
    assert time.monotonic() - began < 30
