"""What a store cannot do is one sentence, without a key; what may pass is tried again."""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.exceptions
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage import failures, retry
from ray_sampler.storage.run_dir import RunDir
from tests.faults.servers import KEY, SECRET
from tests.storage.fill import NAME


def test_a_wrong_url_is_refused_in_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="unknown protocol"):
        RunDir("nonsense://bucket/run")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.delitem(sys.modules, "ray_sampler.storage.gcs_store", raising=False)  # as in a new process
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    with pytest.raises(RequestError, match=r"pip install 'ray-sampler\[gcs\]'"):
        RunDir("gs://bucket/run")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="is a file"):
        RunDir(str(tmp_path / "file"))
    with pytest.raises(RequestError, match="a file is in the place"):
        RunDir(str(tmp_path / "file" / "run")).create_run({})


def test_a_missing_bucket_and_wrong_keys_are_refused_without_showing_a_key(rclone_endpoint, moto, monkeypatch, caplog):
    with pytest.raises(RequestError, match="its bucket does not exist"):
        RunDir(f"s3://nobody-{uuid.uuid4().hex}/run").create_run({})
    with pytest.raises(RequestError, match="its bucket does not exist"):
        RunDir(f"s3://nobody-{uuid.uuid4().hex}/run").fragments.list()
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", rclone_endpoint)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret-key")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match=r"credentials|permission") as caught:
        RunDir("s3://samples/run").create_run({})
    for shown in (str(caught.value), caplog.text):
        assert KEY not in shown
        assert SECRET not in shown
        assert "another-secret" not in shown


def test_missing_credentials_are_refused(moto, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RequestError, match="no credentials were found"):
        RunDir("s3://samples/run").create_run({})


def test_a_full_or_read_only_disk_is_one_sentence(tmp_path, monkeypatch):
    run_dir = RunDir(str(tmp_path / "run"))
    for number, kind, words in (
        (errno.ENOSPC, RunError, "the disk is full"),
        (errno.EROFS, RequestError, "read-only"),
        (errno.EACCES, RequestError, "permission denied"),
    ):

        def fail(descriptor, number=number):
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(kind, match=words):
                run_dir.fragments.write(NAME, b"x")
        assert list(Path(tmp_path / "run" / "fragments").iterdir()) == []


def test_an_answer_that_is_not_http_passes_and_has_no_status():
    from aiohttp import ClientResponseError
    from aiohttp.http_exceptions import BadStatusLine

    request: Any = SimpleNamespace(real_url="http://127.0.0.1/")
    garbled = ClientResponseError(request, (), status=400, message="Bad status line")
    garbled.__cause__ = BadStatusLine("<Error>")
    for error in (garbled, botocore.exceptions.HTTPClientError(error=garbled)):
        assert failures.is_passing(error)
        assert failures.status(error) is None
        assert failures.code(error) == ""


def test_links_that_lead_back_to_themselves_are_a_wrong_request(tmp_path):
    (tmp_path / "run").symlink_to("run")
    with pytest.raises(RequestError, match="leads back to itself"):
        RunDir(str(tmp_path / "run")).read_run()


def test_passing_errors_are_retried_and_logged_and_lasting_ones_end(monkeypatch, caplog):
    """A store that answers 503 twice, then as it should; and one that never does."""
    run_dir = RunDir(f"memory://{uuid.uuid4().hex}")
    slow_down = botocore.exceptions.ClientError({"Error": {"Code": "SlowDown", "Message": f"not {KEY}"}}, "PutObject")
    answers = [slow_down, slow_down]
    original = MemoryFileSystem.pipe_file

    def answer(self, *args, **kwargs):
        if answers:
            raise answers.pop()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", answer)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with caplog.at_level(logging.WARNING):
        run_dir.write_file("preview.png", b"x")
    assert run_dir.read_file("preview.png") == b"x"
    assert caplog.text.count("SlowDown") == 2
    answers.extend([slow_down] * 50)
    with pytest.raises(RunError, match="SlowDown"):
        run_dir.write_file("preview.png", b"y")
    assert len(answers) == 50 - retry.ATTEMPTS
    assert KEY not in caplog.text


def test_a_token_server_that_fails_is_not_taken_for_missing_credentials() -> None:
    class ClientAuthenticationError(OSError):  # as azure-core names it
        def __init__(self, status: int | None) -> None:
            self.status_code = status

    assert isinstance(failures.failure(ClientAuthenticationError(503), "write", "abfs://c/run"), RunError)
    said = failures.failure(ClientAuthenticationError(None), "write", "abfs://c/run")
    assert isinstance(said, RequestError)
    assert "no credentials were found" in str(said)
