"""An HTTP proxy on loopback in front of a bucket's server that, on request, lets requests fail.

It runs on separate threads:

    with FaultProxy("http://127.0.0.1:9000") as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        proxy.plan(Fault("503", probability=0.1), Fault("reset", probability=0.02))
        ...
        proxy.plan()
        print(proxy.requests, proxy.faults)

A request body is read in full before it is passed on, so a client that dies within one leaves nothing in the store,
whatever the server does with half a body. The Host header stays as the client signed it.
"""

from __future__ import annotations

import email.message
import http.client
import json
import random
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Kind = Literal[
    "403", "500", "503", "reset", "reset upload", "lost", "truncated", "stall", "slow", "answer",
]  # fmt: skip
"""How a request fails:

403, 500, 503: it is refused with this status and S3's words for it; the server never sees it.
reset: the connection is reset in the middle of the answer, after the server has done what was asked.
reset upload: the connection is reset in the middle of the request's body; the server never sees it.
lost: the server does what was asked, and the connection is reset before the answer's first byte.
truncated: the answer ends in the middle, the connection closed as if it were whole.
stall: the answer halts in the middle, for `seconds`, then the connection is reset.
slow: the answer is right and comes after `seconds`.

answer: it is answered with the fault's own status and word, in the form of the store that is meant; the server never
sees it.

The middle of an answer without a body is before its first byte.
"""

Form = Literal["s3", "azure", "gcs", "page", "login"]
"""Whose way of telling a failure an answer takes; a page is HTML, as load balancers give it, and a login is that of a
network, which a parser of XML takes too."""

Request = tuple[str, str, email.message.Message]
"""Method, path with query, and headers."""

WORDS = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass(frozen=True)
class Fault:
    """What fails, from the moment that a plan is set. Requests that match it are counted from 1."""

    kind: Kind
    first: int = 1
    """Number of the first request to fail."""
    last: int | None = None
    """Number of the last one; None while the plan is in force."""
    probability: float = 1.0
    """Of failing, for a request between the two."""
    operations: Collection[str] | None = None
    """S3's names of the operations that it matches, as PutObject, or methods, as PUT; None for all."""
    seconds: float = 0.0
    """How long it stalls, or is late."""
    status: int = 0
    word: str = ""
    form: Form = "s3"
    when: Callable[[Request], bool] | None = None
    """What a request must be beside its operation; None for any."""


def answer(status: int, word: str = "", operations: Collection[str] | None = None, **more: Any) -> Fault:
    """Every request of these operations is refused with `status`; `more` are fields of the fault."""
    return Fault("answer", operations=operations, status=status, word=word, **more)


def told(form: Form, status: int, word: str) -> tuple[list[tuple[str, str]], bytes]:
    """The headers and the body by which a store reports a failure."""
    xml = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>{word} of a store</Message></Error>".encode()
    match form:
        case "s3":
            return [("Content-Type", "application/xml")], xml
        case "azure":
            return [("Content-Type", "application/xml"), ("x-ms-error-code", word)], xml
        case "gcs":
            about = {"code": status, "message": word, "errors": [{"message": word, "reason": word}]}
            return [("Content-Type", "application/json")], json.dumps({"error": about}).encode()
        case "page":
            page = f"<html><head><title>{status}</title></head><body><center><hr>nginx</center></body></html>"
            return [("Content-Type", "text/html")], page.encode()
        case "login":
            page = "<html><head><title>Welcome</title></head><body><form method='post' action='/login'/></body></html>"
            return [("Content-Type", "text/html")], page.encode()


def once(kind: Kind, number: int = 1, operations: Collection[str] | None = None, seconds: float = 0.0) -> Fault:
    """Request `number` fails, and no other."""
    return Fault(kind, number, number, operations=operations, seconds=seconds)


def operation_of(method: str, path: str, headers: email.message.Message) -> str:
    """S3's name for what a request asks."""
    url = urllib.parse.urlsplit(path)
    query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
    has_key = "/" in url.path.strip("/")
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    if "uploadId" in query:
        copied = "UploadPartCopy" if "x-amz-copy-source" in headers else "UploadPart"
        names = {"PUT": copied, "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
        return names.get(method, method)
    if method == "POST" and "delete" in query:
        return "DeleteObjects"
    if not has_key:
        listing = "ListObjectsV2" if query.get("list-type") == ["2"] else "ListObjects"
        return {"GET": listing, "HEAD": "HeadBucket", "PUT": "CreateBucket"}.get(method, method)
    if method == "PUT":
        return "CopyObject" if "x-amz-copy-source" in headers else "PutObject"
    return {"GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(method, method)


class FaultProxy:
    """A proxy before `upstream`, an http:// URL; its own is `url`. Chances are drawn from `seed`."""

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.upstream = urllib.parse.urlsplit(upstream)
        self.requests: Counter[str] = Counter()
        """By operation, the failed ones among them."""
        self.faults: Counter[str] = Counter()
        """By kind."""
        self.failed: Counter[str] = Counter()
        """By operation."""
        self.released = threading.Event()
        self._chance = random.Random(seed)
        self._faults: tuple[Fault, ...] = ()
        self._matched: list[int] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.plan()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def plan(self, *faults: Fault) -> None:
        """Replace what fails from now on, nothing without an argument; stalls that last end at once."""
        with self._lock:
            self.released.set()
            self.released = threading.Event()
            self._faults, self._matched = faults, [0] * len(faults)

    def clear(self) -> None:
        """Begin to count anew."""
        with self._lock:
            for counter in (self.requests, self.faults, self.failed):
                counter.clear()

    def draw(self, operation: str, request: Request) -> tuple[Fault | None, threading.Event]:
        """Count a request; whether and how it fails, and what ends a stall."""
        with self._lock:
            self.requests[operation] += 1
            drawn = None
            for i, fault in enumerate(self._faults):
                wanted = fault.operations
                if wanted is not None and operation not in wanted and request[0] not in wanted:
                    continue
                if fault.when is not None and not fault.when(request):
                    continue
                self._matched[i] += 1
                due = fault.first <= self._matched[i] and (fault.last is None or self._matched[i] <= fault.last)
                if due and drawn is None and self._chance.random() < fault.probability:
                    drawn = fault
            if drawn is not None:
                self.faults[drawn.kind] += 1
                self.failed[operation] += 1
            return drawn, self.released


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that went away, as those of killed processes do."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the counters are enough."""

    def _serve(self) -> None:
        operation = operation_of(self.command, self.path, self.headers)
        fault, released = self.server.proxy.draw(operation, (self.command, self.path, self.headers))
        if fault is not None and fault.kind == "reset upload":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self._reset()
        body = self._body()
        if fault is None:
            return self._answer(*self._forward(body))
        match fault.kind:
            case "403" | "500" | "503":
                word = WORDS[fault.kind]
                text = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>{word}</Message></Error>".encode()
                self._answer(int(fault.kind), [("Content-Type", "application/xml")], text)
            case "answer":
                self._answer(fault.status, *told(fault.form, fault.status, fault.word))
            case "lost":
                self._forward(body)
                self._reset()
            case "slow":
                released.wait(fault.seconds)
                self._answer(*self._forward(body))
            case "reset" | "truncated" | "stall":
                self._half(*self._forward(body))
                if fault.kind == "stall":
                    released.wait(fault.seconds)
                if fault.kind == "truncated":
                    self.close_connection = True
                else:
                    self._reset()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = self.server.proxy.upstream
        connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP | {"expect"}:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            # Where to continue an upload is given as an address, which must be this proxy's.
            there, here = upstream.geturl(), self.server.proxy.url
            headers = [(n, v.replace(there, here) if n.lower() == "location" else v) for n, v in response.getheaders()]
            # An emulator answers so for an upload of which it has nothing; the store itself says nothing then.
            headers = [each for each in headers if each != ("Range", "bytes=0-0")]
            return response.status, headers, response.read()
        finally:
            connection.close()

    def _head(self, status: int, headers: list[tuple[str, str]], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(length))

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._head(status, headers, len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _half(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """The first half of an answer, nothing of one without a body."""
        if body and self.command != "HEAD":
            self._head(status, headers, len(body))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()
        self.close_connection = True
