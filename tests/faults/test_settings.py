"""URLs with odd characters, and the settings by which botocore and s3fs are made to fit a store."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from ray_sampler.errors import RequestError
from ray_sampler.storage import retry
from ray_sampler.storage.archive import archive_intact, content_of, lay_out
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.run_dir import RunDir
from tests.faults.lives import ARCHIVE, NAMES, live
from tests.faults.proxy import Fault, FaultProxy, Request, answer
from tests.faults.servers import BUCKET, client
from tests.storage.conftest import moto_endpoint, use_endpoint
from tests.storage.fill import FINGERPRINT, fill

__all__ = ["moto_endpoint"]

Configured = Callable[[dict[str, object]], None]


@pytest.fixture
def proxy(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    with FaultProxy(moto_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Configured:
    """Sets FSSPEC_S3, as fsspec reads it when it is imported."""

    def configure(options: dict[str, object]) -> None:
        environment = {"FSSPEC_S3": json.dumps(options)}
        conf: dict[str, object] = {}
        fsspec.config.set_conf_env(conf, environment)
        monkeypatch.setitem(fsspec.config.conf, "s3", conf["s3"])

    return configure


@pytest.mark.parametrize("name", ["a#b?c", "a%20b 100%", "ü&é+", "what?#%"])
def test_a_url_of_odd_characters_is_written_read_and_printed_as_it_is(proxy: FaultProxy, name: str):
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}/{name}"
    assert live(url).code == 0
    run_dir = RunDir(url + "/")
    assert run_dir.url == url
    assert run_dir.path_of(ARCHIVE) == f"{url}/{ARCHIVE}"
    prefix = url.removeprefix(f"s3://{BUCKET}/")
    found = client(proxy.upstream.geturl()).list_objects_v2(Bucket=BUCKET, Prefix=prefix)
    assert f"{prefix}/{ARCHIVE}" in {entry["Key"] for entry in found["Contents"]}


@pytest.mark.parametrize("tail", ["?sig=planted", "#token=planted", "?X-Amz-Signature=planted&x", "?planted@x"])
def test_what_may_be_a_credential_is_not_printed(tail: str):
    assert "planted" not in RunDir(f"s3://{BUCKET}/run{tail}").url


@pytest.mark.parametrize("protocol", ["s3", "gs", "abfs", "s3a", "az"])
@pytest.mark.parametrize("path", ["bucket//dir", "bucket/a//b", "bucket/./a", "bucket/a/../b", "/bucket/a", ""])
def test_a_path_that_stores_read_differently_is_a_wrong_request(protocol: str, path: str):
    with pytest.raises(RequestError, match="empty step"):
        RunDir(f"{protocol}://{path}")


def seen(proxy: FaultProxy, wanted: Callable[[Request], bool], method: str = "PUT") -> bool:
    """Whether a request that a run makes is as `wanted`."""
    found: list[Request] = []

    def look(request: Request) -> bool:
        if request[0] == method and wanted(request):
            found.append(request)
        return False

    proxy.plan(Fault("answer", when=look))
    assert live(f"s3://{BUCKET}/{uuid.uuid4().hex}").code == 0
    return bool(found)


def test_settings_of_fsspec_reach_the_requests(proxy: FaultProxy, configured: Configured):
    def encrypted(request: Request) -> bool:
        return request[2].get("x-amz-server-side-encryption") == "aws:kms"

    assert not seen(proxy, encrypted)
    configured({"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/mine"}})
    assert seen(proxy, encrypted)
    assert seen(proxy, lambda request: request[2].get("x-amz-server-side-encryption-aws-kms-key-id") == "alias/mine")
    configured({"requester_pays": True})
    assert seen(proxy, lambda request: request[2].get("x-amz-request-payer") == "requester")
    assert seen(proxy, lambda request: request[2].get("x-amz-request-payer") == "requester", "GET")


def test_botocore_settings_are_merged_under_ours(proxy: FaultProxy, configured: Configured):
    configured({"config_kwargs": {"user_agent_extra": "planted-agent", "connect_timeout": 3000}})
    assert seen(proxy, lambda request: "planted-agent" in request[2].get("User-Agent", ""))
    run_dir = RunDir(f"s3://{BUCKET}/x")
    assert run_dir._store.filesystem.config_kwargs["connect_timeout"] == 10  # type: ignore[union-attr]


def test_checksums_and_addressing_are_set_as_botocore_has_them(proxy: FaultProxy, configured: Configured):
    def checksummed(request: Request) -> bool:
        return any(name.lower().startswith("x-amz-checksum") for name in request[2])

    assert seen(proxy, checksummed)
    configured({"config_kwargs": {"request_checksum_calculation": "when_required"}})
    assert not seen(proxy, checksummed)
    configured({"config_kwargs": {"s3": {"addressing_style": "path"}}})
    assert seen(proxy, lambda request: request[1].startswith(f"/{BUCKET}/"))


def test_a_fragment_in_cold_storage_is_sampled_again_and_an_archive_there_is_told(proxy: FaultProxy, caplog):
    run_dir = RunDir(f"s3://{BUCKET}/{uuid.uuid4().hex}")
    fill(run_dir, NAMES[:1])
    puts: list[str] = []

    def of_the_old_one(request: Request) -> bool:
        if request[0] == "PUT" and "x-amz-copy-source" not in request[2]:
            puts.append(request[1])
        bad = NAMES[0].filename
        copied = bad in request[2].get("x-amz-copy-source", "")
        return ((request[0] == "GET" and bad in request[1]) or copied) and not any(
            f"/fragments/{bad}" in put for put in puts
        )

    proxy.plan(answer(403, "InvalidObjectState", when=of_the_old_one))
    life = live(run_dir.url)
    assert (life.code, [name for name, _ in life.rejected]) == (0, [NAMES[0].filename])
    assert "Glacier" in life.rejected[0][1]
    assert "could not be moved" in caplog.text
    records = {name: run_dir.fragments.read(name, FINGERPRINT).record for name in NAMES}
    contents = {name: content_of(record) for name, record in records.items()}
    layout = lay_out(run_dir, cover(NAMES, 8), contents, 8, (8, 8, 3), True, FINGERPRINT)
    assert archive_intact(run_dir, layout)
    proxy.plan(answer(403, "InvalidObjectState", ["GetObject"]))
    with pytest.raises(Exception, match="restore it"):
        archive_intact(run_dir, layout)


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


@pytest.fixture
def self_signed(tmp_path: Path) -> Iterator[str]:
    """The address of a server whose certificate is not trusted."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    signed = certificate.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = tmp_path / "server.pem"
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem.write_bytes(private + signed.public_bytes(encoding))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"https://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_certificate_that_is_not_trusted_is_told_with_the_remedy(self_signed: str, monkeypatch, caplog):
    use_endpoint(monkeypatch, self_signed)
    life = live(f"s3://{BUCKET}/run")
    assert (life.code, "AWS_CA_BUNDLE" in life.said) == (2, True), life.said
    assert "follows in" not in caplog.text


def test_a_host_that_is_not_there_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    use_endpoint(monkeypatch, "http://nobody.invalid")
    began = time.monotonic()
    life = live(f"s3://{BUCKET}/run")
    assert (life.code, "AWS_ENDPOINT_URL" in life.said) == (1, True), life.said
    assert time.monotonic() - began < 60
