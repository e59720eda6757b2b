"""Whoever has no credentials is told so within seconds, in one sentence, however long they are looked for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.servers import BUCKET

LONGEST_S = 45.0
"""Of a refusal: a few seconds on a machine that does nothing else, and less than a silent server would take."""

PROGRAM = """
import sys, time
from ray_sampler.errors import RequestError
from ray_sampler.storage.run_dir import RunDir
if sys.argv[1].startswith("abfs"):
    from ray_sampler.storage import azure_store
    azure_store.LOOK_FOR_CREDENTIALS_S = 3.0
began = time.monotonic()
try:
    RunDir(sys.argv[1]).create_run({})
except RequestError as error:
    print("ray-sampler:", error, file=sys.stderr)
print(time.monotonic() - began)
"""


class Silent(BaseHTTPRequestHandler):
    """A metadata server that takes requests and never answers, as some networks make of it."""

    def do_GET(self) -> None:
        released.wait(600)

    do_PUT = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class Refuser(BaseHTTPRequestHandler):
    """A store without users."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


released = threading.Event()


def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def silent() -> Iterator[str]:
    released.clear()
    yield from served(Silent)


@pytest.fixture
def refuser() -> Iterator[str]:
    yield from served(Refuser)


@pytest.mark.parametrize("store", ["s3", "gs", "abfs"])
def test_no_credentials_are_told_within_seconds(store: str, silent: str, refuser: str, tmp_path: Path):
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}[store])
    taken = {"AWS_", "GOOGLE_", "AZURE_", "STORAGE_", "GCE_", "FSSPEC_", "CLOUDSDK_"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuple(taken))}
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PATH": str(Path(sys.executable).parent)}
    urls = {"s3": f"s3://{BUCKET}/run", "gs": "gs://bucket/run", "abfs": "abfs://c@account.dfs.core.windows.net/run"}
    environment |= {
        "s3": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{silent}", "AWS_DEFAULT_REGION": "us-east-1"},
        "gs": {
            "GCE_METADATA_HOST": silent,
            "GCE_METADATA_TIMEOUT": "1",
            "GCE_METADATA_IP": silent,
            "FSSPEC_GS": f'{{"endpoint_url": "http://{refuser}"}}',
        },
        "abfs": {"AZURE_POD_IDENTITY_AUTHORITY_HOST": f"http://{silent}"},
    }[store]
    began = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, urls[store]], env=environment, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in ended.stderr.splitlines() if line.strip()]
    assert ended.stdout, ended.stderr
    assert float(ended.stdout) < LONGEST_S
    assert time.monotonic() - began < LONGEST_S + 15  # Python's start, and the end
    assert "no credentials were found" in ended.stderr
    assert len(lines) == 1, ended.stderr
