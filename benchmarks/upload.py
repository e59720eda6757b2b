"""How long do 1,000 fragments and an archive of 1 GB take to a bucket, against another commit?

The bucket is that of rclone's S3 server on this machine, one for each time. The archive is merged from the fragments
that lie in it, as a run does it: each is read and checked. Only that is timed, not the start of Python and of a client.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from table import Goal, Row, in_turn, parser, report

ROOT = Path(__file__).resolve().parent.parent
FRAGMENTS, SAMPLES, SIDE = 1000, 82, 64
"""82 pictures of 64 x 64 are a megabyte."""
BEFORE = "89afca2"
TIME = Goal("at most", 1.11)

PROGRAM = f"""
import time
import numpy as np
from ray_sampler.storage.archive import content_of, merge
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir

images = np.random.default_rng(0).integers(0, 256, ({SAMPLES}, {SIDE}, {SIDE}, 3), np.uint8)
labels, encoded, contents = np.zeros({SAMPLES}, np.int32), {{}}, {{}}
for start in range(0, {FRAGMENTS * SAMPLES}, {SAMPLES}):
    name = FragmentName(start, start + {SAMPLES}, "parquet")
    encoded[name], record = encode(Samples.of(start, images, labels), "f", {{}}, "parquet")
    contents[name] = content_of(record)
run_dir = RunDir("s3://samples/run")
run_dir.create_run({{}})
began = time.perf_counter()
for name, data in encoded.items():
    run_dir.fragments.write(name, data)
written = time.perf_counter()
merge(run_dir, cover(contents, {FRAGMENTS * SAMPLES}), contents, {FRAGMENTS * SAMPLES}, ({SIDE}, {SIDE}, 3), True, "f")
print([written - began, time.perf_counter() - written])
"""


def seconds(checkout: Path, found: list[list[float]]) -> float:
    """Seconds that the fragments took, and adds those and the archive's to `found`."""
    from tests.faults.servers import environment, rclone_server

    with tempfile.TemporaryDirectory(dir=ROOT) as folder, rclone_server(Path(folder)) as endpoint:
        variables = os.environ | environment(endpoint) | {"PYTHONPATH": str(checkout)}
        found.append(json.loads(subprocess.check_output([sys.executable, "-c", PROGRAM], env=variables)))
    return found[-1][0]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--revision", default=BEFORE, help="the commit to compare with (the last to write in any order)")
    made.add_argument("--repeats", type=int, default=5)
    arguments = made.parse_args()
    sides: tuple[list[list[float]], ...] = ([], [])
    with ExitStack() as stack:
        there = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "there"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(there), arguments.revision], check=True)
        stack.callback(subprocess.run, [*git, "remove", "--force", str(there)], check=True)
        checkouts = zip((ROOT, there), sides, strict=True)
        in_turn(arguments.repeats, *(lambda side=side: seconds(*side) for side in checkouts))
    rows = []
    for i, question in enumerate((f"{FRAGMENTS:,} fragments of 1 MB", "an archive of 1 GB, merged from them")):
        ours, theirs = (tuple(values[i] for values in side) for side in sides)
        rows.append(Row(f"upload of {question}", ours, theirs, "s", TIME))
    report(rows, (), arguments.json)


if __name__ == "__main__":
    main()
