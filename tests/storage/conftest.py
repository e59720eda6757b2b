"""Places to store a run in: a folder, this process's memory, and two S3 servers that are none of each other's kin."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.servers import environment, moto_server, rclone, rclone_server


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    pytest.importorskip("moto.server")
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def rclone_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if rclone() is None:
        pytest.skip("rclone is not installed")
    with rclone_server(tmp_path_factory.mktemp("rclone")) as endpoint:
        yield endpoint


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    import s3fs

    for name, value in environment(endpoint).items():
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
