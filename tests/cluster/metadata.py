"""A metadata service as AWS and Google Cloud have one, which gives a spot notice when it is told to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "AQAEAexample=="


class Service(ThreadingHTTPServer):
    """Of one machine."""

    goes_in: float | None = None
    """Seconds in which the machine goes; None before there is a notice."""
    asked = 0
    """Questions that were answered."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which Amazon's and Google's own libraries find another service than the cloud's."""
        host = f"127.0.0.1:{self.server_address[1]}"
        return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{host}/", "GCE_METADATA_HOST": host}


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
        if self.path == "/latest/api/token" and ttl.isdigit() and 1 <= int(ttl) <= 21600:
            self.answer(200, TOKEN)
        else:
            self.answer(400)

    def do_GET(self) -> None:
        goes_in = self.server.goes_in
        self.server.asked += 1
        if self.path == "/latest/meta-data/spot/instance-action":
            if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
                self.answer(401)  # as where version 2 is required
            elif goes_in is None:
                self.answer(404)
            else:
                time = datetime.now(UTC) + timedelta(seconds=goes_in)
                self.answer(200, json.dumps({"action": "terminate", "time": f"{time:%Y-%m-%dT%H:%M:%SZ}"}))
        elif self.path == "/computeMetadata/v1/instance/preempted":
            allowed = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200 if allowed else 403, "FALSE" if goes_in is None else "TRUE")
        else:
            self.answer(404)

    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def metadata_service() -> Iterator[Service]:
    with Service(("127.0.0.1", 0), Handler) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()
