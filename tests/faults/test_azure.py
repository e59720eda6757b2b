"""Runs into Azure Blob Storage, as Azurite, its emulator, understands it. `make system` installs that one."""

from __future__ import annotations

import datetime
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_sampler.errors import RequestError
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.cluster.processes import PATIENCE_S, kill_session, started, wait_for
from tests.cluster.runs import LONGER, savez
from tests.conftest import Configure
from tests.faults.clouds import ACCOUNT, CONTAINER, KEY, azurite_server, connection_string, use_cloud
from tests.faults.lives import live

NAME = FragmentName(0, 4, "parquet")


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of an emulator with one container, which this process finds."""
    with azurite_server(tmp_path_factory.mktemp("azurite")) as endpoint, pytest.MonkeyPatch.context() as patch:
        use_cloud(patch, "azure", endpoint)
        yield endpoint


@pytest.fixture
def url(connection: str) -> str:
    return f"abfs://{CONTAINER}/{uuid.uuid4().hex}"


def test_a_run_directory_keeps_its_promises(url: str):
    run_dir = RunDir(url)
    assert run_dir.create_run({"seed": 1}) == {"seed": 1}
    assert run_dir.create_run({"seed": 2}) == {"seed": 1}
    data = os.urandom(100_000)
    run_dir.fragments.write(NAME, data)
    assert run_dir.fragments.list().fragments == [NAME]
    assert run_dir._store.read(f"fragments/{NAME.filename}") == data
    run_dir.fragments.reject(NAME.filename, "damaged")
    assert run_dir.fragments.list().fragments == []
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
        def chunks() -> Iterator[bytes]:
            for _ in range(40):
                yield block
            assert not run_dir.has(name)
            if error:
                raise error

        run_dir.write_archive(name, chunks(), 40 * 2**20)

    with pytest.raises(ValueError, match="stop"):
        stage("samples_8x1x1x1.npz", ValueError("stop"))
    stage("samples_9x1x1x1.npz", None)
    assert [entry.name for entry in run_dir._store.list("")] == ["samples_9x1x1x1.npz"]
    assert run_dir.read_file("samples_9x1x1x1.npz") == block * 40


def test_a_container_that_is_not_there_is_one_sentence(connection: str):
    with pytest.raises(RequestError, match="bucket does not exist"):
        RunDir("abfs://elsewhere/run").create_run({})


@pytest.mark.parametrize(
    ("rights", "hours", "code", "said"),
    [
        ("racwl", 1, 0, "could not be deleted"),
        ("rl", 1, 2, "permission denied"),
        ("rw", 1, 2, "cannot list"),
        ("racwdl", -1, 2, "expired"),
    ],
    ids=["no delete", "read-only", "no list", "expired"],
)
def test_a_shared_access_signature_that_is_too_narrow_is_one_sentence(
    connection: str, monkeypatch, caplog, capfd, rights, hours, code, said
):
    import adlfs
    from azure.storage.blob import ContainerSasPermissions, generate_container_sas

    until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)
    permission = ContainerSasPermissions.from_string(rights)
    signature = generate_container_sas(ACCOUNT, CONTAINER, account_key=KEY, permission=permission, expiry=until)
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(connection, signature))
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    with caplog.at_level(logging.WARNING):
        life = live(f"abfs://{CONTAINER}/{uuid.uuid4().hex}")
    adlfs.AzureBlobFileSystem.clear_instance_cache()
    assert life.code == code, life.said
    assert said in (life.said if code else caplog.text)
    assert "follows in" not in caplog.text
    assert life.computed == (code == 0)
    shown = life.said + caplog.text + "".join(capfd.readouterr())
    assert "Traceback" not in shown
    assert "sig=" not in shown


@pytest.mark.accidents
def test_a_run_that_is_killed_continues(configure: Configure, url: str, tmp_path: Path, longer_samples):
    config, log = configure(output=url, **LONGER), tmp_path / "log"
    run_dir = RunDir(url)
    with started(config, log) as process:
        wait_for(lambda _: len(run_dir.fragments.list().fragments) >= 3, Path(url), process, log)
        kill_session(process)
    kept = run_dir.fragments.list(times=True)
    with started(config, log) as process:
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    assert run_dir.read_file("samples_48x8x8x3.npz") == savez(longer_samples)
    assert run_dir.fragments.list(times=True).modified.items() >= kept.modified.items()
    assert KEY not in log.read_text()
    for name in ("run.json", "summary.json", "report.html"):
        assert KEY.encode() not in (run_dir.read_file(name) or b"")
