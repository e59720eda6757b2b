"""How long until a resumed run knows what is missing, with 100,000 fragments on an S3 server?

Ours lists the fragments and finds the gaps; theirs is one recursive listing of the same folder through s3fs. The server
is `rclone serve s3` on loopback; each side has a fresh connection, whose set-up is not counted.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import s3fs

from ray_sampler.storage.ranges import cover, missing
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import RunDir
from table import Goal, Row, in_turn, parser, report
from tests.faults.servers import BUCKET, environment, rclone_server

FRAGMENTS, SHARD = 100_000, 512
MISSING = (7, 50_000, 99_999)
"""Shards that are not there."""


def ours() -> float:
    s3fs.S3FileSystem.clear_instance_cache()
    run_dir = RunDir(f"s3://{BUCKET}/run")
    run_dir.read_run()
    began = time.perf_counter()
    gaps = missing(cover(run_dir.fragments.list().fragments, FRAGMENTS * SHARD), FRAGMENTS * SHARD)
    taken = time.perf_counter() - began
    assert len(gaps) == len(MISSING)
    return taken


def theirs() -> float:
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem(use_listings_cache=False)
    filesystem.exists(f"{BUCKET}/run/run.json")
    began = time.perf_counter()
    found = filesystem.find(f"{BUCKET}/run/fragments")
    taken = time.perf_counter() - began
    assert len(found) == FRAGMENTS - len(MISSING)
    return taken


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / BUCKET / "run" / "fragments"
        folder.mkdir(parents=True)
        for i in set(range(FRAGMENTS)) - set(MISSING):
            (folder / FragmentName(i * SHARD, (i + 1) * SHARD, "parquet").filename).touch()
        with rclone_server(Path(name), looks_every="24h") as endpoint:
            os.environ |= environment(endpoint)
            known, listed = in_turn(3, ours, theirs)
    subject = f"what is missing of {FRAGMENTS:,} fragments on S3, against a listing"
    report([Row(subject, known, listed, "s", Goal("at most", 1.1))], [], arguments.json)


if __name__ == "__main__":
    main()
