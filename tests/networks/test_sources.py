"""Files come over a network whole or not at all, are kept in the user's cache, and no message holds a credential."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash


def checkpoint(value: int, count: int = 100_000) -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.full((count,), float(value))}, file)
    return file.getvalue()


class Server(ThreadingHTTPServer):
    """A server of one file, which can break off."""

    content = checkpoint(1)
    tag = '"1"'
    cut = 0
    """How many of the next transfers end half way."""
    status = 200
    gets = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/w.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def headers_of(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.send_header("ETag", self.server.tag)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.headers_of(200)

    def do_GET(self) -> None:
        self.server.gets += 1
        if self.server.status != 200:
            return self.send_error(self.server.status)
        self.headers_of(200)
        content = self.server.content
        if self.server.cut:
            self.server.cut -= 1
            self.wfile.write(content[: len(content) // 2])
            return self.connection.close()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ray-sampler"


def value(url: str) -> float:
    return read_checkpoint(url).tensors["w"][0].item()


def refusal(url: str) -> str:
    with pytest.raises(RequestError) as refused:
        read_checkpoint(url)
    assert refused.value.__suppress_context__ or "128" not in str(refused.value.__context__)
    return str(refused.value)


def test_a_file_is_fetched_once_and_its_hash_is_told(server: Server, cache: Path) -> None:
    for _ in range(3):
        read = read_checkpoint(server.url)
        assert read.sha256 == hashlib.sha256(server.content).hexdigest()
        assert weights_hash(read.tensors) == weights_hash({"w": torch.ones(100_000)})
        assert (read.shown, read.note) == (server.url, None)
    assert server.gets == 1
    assert any(path.stat().st_size == len(server.content) for path in cache.rglob("*"))
    assert all(folder.stat().st_mode & 0o077 == 0 for folder in cache.iterdir())


def test_a_kept_file_serves_without_a_network(server: Server) -> None:
    url = server.url
    assert value(url) == 1
    server.shutdown()
    server.server_close()
    assert value(url) == 1


def test_a_file_that_changed_there_is_fetched_anew(server: Server) -> None:
    assert value(server.url) == 1
    server.content, server.tag = checkpoint(2), '"2"'
    assert value(server.url) == 2
    assert server.gets == 2


def test_a_transfer_that_breaks_off_is_begun_anew(server: Server) -> None:
    server.cut = 2
    assert value(server.url) == 1


def test_no_part_of_a_file_is_ever_kept(server: Server, cache: Path) -> None:
    server.cut = 3
    assert "cannot be read" in refusal(server.url)
    server.cut = 0
    assert value(server.url) == 1
    for path in cache.rglob("*"):  # what a full disk or a crash of the machine leaves
        if path.is_file() and path.stat().st_size > 1000:
            os.truncate(path, 1000)
    assert "1000 of its" in refusal(server.url)
    assert value(server.url) == 1


def test_a_process_that_is_killed_while_it_fetches_leaves_nothing_that_is_taken(server: Server) -> None:
    reached, go = threading.Event(), threading.Event()

    class Waiting(Handler):
        def do_GET(self) -> None:
            self.headers_of(200)
            self.wfile.write(self.server.content[:1000])
            reached.set()
            go.wait(30)

    server.RequestHandlerClass = Waiting
    script = "import sys; from ray_sampler.networks.weights import read_checkpoint; read_checkpoint(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", script, server.url])
    assert reached.wait(60)
    process.kill()
    process.wait()
    go.set()
    server.RequestHandlerClass = Handler
    assert value(server.url) == 1


def test_runs_that_begin_together_fetch_once(server: Server) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(value, [server.url] * 4)) == [1] * 4
    assert server.gets == 1


def test_a_page_in_place_of_a_file_is_not_kept(server: Server) -> None:
    good, server.content = server.content, b"<html>Sign in</html>"
    assert "HTML page" in refusal(server.url)
    server.content = good
    assert value(server.url) == 1


def test_a_cache_that_cannot_be_written_is_told_and_passed_by(server: Server, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    read = read_checkpoint(server.url)
    assert read.tensors["w"][0] == 1
    assert read.sha256 == hashlib.sha256(server.content).hexdigest()
    assert read.note is not None
    assert "cannot be written" in read.note
    assert "XDG_CACHE_HOME" in read.note


@pytest.mark.parametrize("query", ["sig=very-secret", "sig=very-secret%2Fa%3D%2b", "a=b c&sig=very-secret%7E"])
def test_an_address_with_a_credential_is_shown_without_and_not_kept(query: str, server: Server, cache: Path) -> None:
    url = server.url.replace("://", "://user:very-secret@") + f"?{query}"
    read = read_checkpoint(url)
    assert read.shown == server.url
    assert "very-secret" not in repr(read)
    assert not any(b"very-secret" in path.read_bytes() for path in cache.rglob("*") if path.is_file())
    server.status = 403
    with pytest.raises(RequestError) as caught:
        read_checkpoint(url)
    assert "ClientResponseError: 403" in str(caught.value)
    assert server.url in str(caught.value)
    assert "very-secret" not in str(caught.value)
    assert caught.value.__suppress_context__  # nor does a traceback show the error that quotes it


def test_what_is_not_there_or_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    server.status = 404
    assert "no such file can be reached" in refusal(server.url)
    for scheme in ("http", "unknown"):
        message = refusal(f"{scheme}://user:very-secret@127.0.0.1:9/w.pt?sig=very-secret")
        assert "very-secret" not in message
        assert "127.0.0.1:9/w.pt" in message
    for name, text in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, text)
    message = refusal("s3://bucket/w.pt")
    assert "cannot be read" in message
    assert "very-secret" not in message


def test_other_addresses_give_what_the_path_gives(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(Server.content)
    with fsspec.open("memory://checkpoints/w.pt", "wb") as file:
        file.write(Server.content)
    local = read_checkpoint(str(tmp_path / "w.pt"))
    assert (local.sha256, read_checkpoint((tmp_path / "w.pt").as_uri()).sha256) == (None, None)
    fetched = read_checkpoint("memory://checkpoints/w.pt")
    assert fetched.sha256 == hashlib.sha256(Server.content).hexdigest()
    assert weights_hash(fetched.tensors) == weights_hash(local.tensors)
