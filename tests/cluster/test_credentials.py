"""No credential that a run was given shows up in what it writes or says."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.session
import pytest

from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, flags_of, savez
from tests.conftest import Configure

ROOT = Path(__file__).resolve().parents[2]

KEY, SECRET, SESSION = "PLANTEDKEY0001", "planted-secret-0002", "planted-session-0003"
PASSWORD, SIGNATURE = "planted-password-0004", "planted-signature-0005"


@pytest.fixture
def bucket() -> Iterator[tuple[str, object]]:
    """The endpoint of an S3 server with an empty bucket, samples, and a client of it."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    client.create_bucket(Bucket="samples")
    yield endpoint, client
    server.stop()


@pytest.fixture
def served(checkpoint: Path) -> Iterator[str]:
    """The address, as host:port, of a web server that has the checkpoint."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(checkpoint.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.accidents
def test_a_run_into_a_bucket_shows_no_credential_anywhere(configure: Configure, tmp_path, bucket, served, samples):
    endpoint, client = bucket
    config = configure(
        model=f"http://user:{PASSWORD}@{served}/tiny.safetensors?signature={SIGNATURE}", output="s3://samples/some/run"
    )
    credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SESSION}
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "sample.py"), *flags_of(config)],
        cwd=tmp_path, env=environment | settings | credentials, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"s3://samples/some/run/{ARCHIVE}"
    listed = client.list_objects_v2(Bucket="samples")["Contents"]
    objects = {entry["Key"]: client.get_object(Bucket="samples", Key=entry["Key"])["Body"].read() for entry in listed}
    assert objects[f"some/run/{ARCHIVE}"] == savez(samples)
    assert {"run.json", "summary.json", "report.html", "preview.png"} < {key.rpartition("/")[2] for key in objects}
    everything = objects | {"stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    for secret in (KEY, SECRET, SESSION, PASSWORD, SIGNATURE):
        assert [where for where, data in everything.items() if secret.encode() in data] == []
