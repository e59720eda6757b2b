"""Places to store a run in: a folder, this process's memory, and two S3 servers that are none of each other's kin."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import botocore.session
import pytest

KEY = "storage-test-key"
SECRET = "storage-test-secret"


def s3_client(endpoint: str):
    return botocore.session.Session().create_client(
        "s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1"
    )


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    s3_client(endpoint).create_bucket(Bucket="samples")
    yield endpoint
    server.stop()


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    rclone = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if rclone is None:
        pytest.skip("rclone is not installed")
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "samples").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(10)


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    import s3fs

    for name, value in (
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", KEY),
        ("AWS_SECRET_ACCESS_KEY", SECRET),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def moto(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The endpoint of a server that this test's environment points to."""
    use_endpoint(monkeypatch, moto_endpoint)
    return moto_endpoint


@pytest.fixture(params=["local", "memory", "s3-moto", "s3-rclone"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a run directory that does not exist yet."""
    name = uuid.uuid4().hex
    if request.param == "local":
        return str(tmp_path / "run")
    if request.param == "memory":
        return f"memory://{name}/run"
    endpoint = request.getfixturevalue("moto_endpoint" if request.param == "s3-moto" else "rclone_endpoint")
    use_endpoint(monkeypatch, endpoint)
    return f"s3://samples/{name}/run"
