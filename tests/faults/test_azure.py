"""Runs into Azure Blob Storage, as Azurite, its emulator, understands it. `make system` installs that one."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_sampler.config import RequestError
from ray_sampler.storage.run_dir import FragmentName, RunDir
from tests.cluster.fleets import free_ports
from tests.cluster.processes import kill_group, started, wait_for
from tests.cluster.runs import LONGER, savez
from tests.conftest import ROOT, Configure
from tests.faults.servers import listens

CONTAINER = "samples"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite; its manual prints it."""

NAME = FragmentName(0, 4, "parquet")


def azurite() -> str | None:
    """The path of Azurite's blob server, None where it is not installed."""
    ours = ROOT / ".emulators" / "node_modules" / ".bin"
    return shutil.which("azurite-blob") or shutil.which("azurite-blob", path=str(ours))


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of an emulator with one container, which this process finds."""
    program = azurite()
    if program is None:
        pytest.skip("Azurite is not installed")
    from azure.storage.blob import BlobServiceClient

    [port] = free_ports(1)
    command = [program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--blobPort", str(port)]
    with (tmp_path_factory.mktemp("azurite") / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path_factory.mktemp("azurite"))
    try:
        deadline = time.monotonic() + 60
        while not listens(("127.0.0.1", port)):
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        string = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};"
        BlobServiceClient.from_connection_string(string).create_container(CONTAINER)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AZURE_STORAGE_CONNECTION_STRING", string)
            yield string
    finally:
        server.terminate()
        server.wait(10)


@pytest.fixture
def url(connection: str) -> str:
    return f"abfs://{CONTAINER}/{uuid.uuid4().hex}"


def test_a_run_directory_keeps_its_promises(url: str):
    run_dir = RunDir(url)
    assert run_dir.create_run({"seed": 1}) == {"seed": 1}
    assert run_dir.create_run({"seed": 2}) == {"seed": 1}
    data = os.urandom(100_000)
    run_dir.write_fragment(NAME, data)
    assert run_dir.fragments().fragments == [NAME]
    assert run_dir._store.read(f"fragments/{NAME.filename}") == data
    run_dir.reject(NAME.filename, "damaged")
    assert run_dir.fragments().fragments == []
    assert run_dir._store.read(f"rejected/{NAME.filename}") == data
    run_dir.probe_write("driver")
    assert run_dir.probe_seen("driver")
    run_dir.probes_clear()
    assert not run_dir.probe_seen("driver")
    run_dir.delete()
    assert run_dir._store.list("") == []


def test_a_staged_archive_is_there_whole_or_not_at_all(url: str):
    run_dir = RunDir(url)
    block = os.urandom(2**20)

    def stage(name: str, error: Exception | None) -> None:
        with run_dir.stage_archive(name, 40 * 2**20) as file:
            for _ in range(40):
                file.write(block)
            assert not run_dir.has(name)
            if error:
                raise error

    with pytest.raises(ValueError, match="stop"):
        stage("samples_8x1x1x1.npz", ValueError("stop"))
    stage("samples_9x1x1x1.npz", None)
    assert [entry.name for entry in run_dir._store.list("")] == ["samples_9x1x1x1.npz"]
    assert run_dir.read_file("samples_9x1x1x1.npz") == block * 40


def test_a_container_that_is_not_there_is_one_sentence(connection: str):
    with pytest.raises(RequestError, match="bucket does not exist"):
        RunDir("abfs://elsewhere/run").create_run({})


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(configure: Configure, url: str, tmp_path: Path, longer_samples):
    config, log = configure(output=url, **LONGER), tmp_path / "log"
    run_dir = RunDir(url)
    with started(config, log) as process:
        wait_for(lambda _: len(run_dir.fragments().fragments) >= 3, Path(url), process, log)
        kill_group(process)
    kept = run_dir.fragments(times=True)
    with started(config, log) as process:
        assert process.wait(90) == 0, log.read_text()
    assert run_dir.read_file("samples_48x8x8x3.npz") == savez(longer_samples)
    assert run_dir.fragments(times=True).modified.items() >= kept.modified.items()
    assert KEY not in log.read_text()
    for name in ("run.json", "summary.json", "report.html"):
        assert KEY.encode() not in (run_dir.read_file(name) or b"")
