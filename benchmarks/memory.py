"""Does memory grow with N? Peak memory of the driver, an actor and the merge, for a small and a large run.

A network of one block at 32x32 pixels, sampled in one step, stands in for a real one: what could grow with N is not
in the network. The merge runs in a separate Ray worker; peaks are the kernel's (VmHWM), read while processes live.
Ours is the peak at the larger number, theirs the same program's at the smaller one, which is large enough for an
actor's heap to have split into the blocks that it needs: that takes some 15,000 samples.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from stub import one_block, save_random, settings
from table import Goal, Row, parser, report

ARCHITECTURE = one_block(32)
FLAGS = " ".join(f"--{name} {value}" for name, value in settings(ARCHITECTURE).items()) + (
    " --sampler onestep --batch_size 100 --shard_size 500 --progress none"
)
SMALL, LARGE = 20_000, 60_000
GOAL = Goal("at most", 1.1)
PARTS = {"driver": "jobs/sample.py", "actor": "ray::Worker", "merge": "ray::merge_fragments"}


def peak_mib(pid: int) -> float:
    """Peak resident memory of a process so far, shared pages included, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def watch(process: subprocess.Popen[bytes], peaks: dict[str, float]) -> None:
    """Note the peak of each part until the driver ends."""
    while process.poll() is None:
        for child in psutil.Process().children(recursive=True):
            try:
                command = " ".join(child.cmdline())
                for part, mark in PARTS.items():
                    if mark in command:
                        peaks[part] = max(peaks.get(part, 0.0), peak_mib(child.pid))
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        time.sleep(0.02)


def measure(num_samples: int, checkpoint: Path, output: Path) -> dict[str, float]:
    """Peak MiB of each part in a run of `num_samples`."""
    peaks: dict[str, float] = {}
    command = [sys.executable, "jobs/sample.py", "--model", str(checkpoint), "--output", str(output), *FLAGS.split()]
    process = subprocess.Popen([*command, "--num_samples", str(num_samples)], stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"a run of {num_samples} samples failed with {process.returncode}")
    return peaks


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_random(ARCHITECTURE, Path(folder) / "stub.safetensors")
        small, large = (measure(n, checkpoint, Path(folder) / str(n)) for n in (SMALL, LARGE))
    rows = [
        Row(
            f"peak memory of the {part}: {LARGE:,} samples against {SMALL:,}",
            (large[part],),
            (small[part],),
            "MiB",
            GOAL,
        )
        for part in PARTS
    ]
    report(rows, [f"An archive of {LARGE:,} samples has {LARGE * 32 * 32 * 3 / 2**20:.0f} MiB."], arguments.json)


if __name__ == "__main__":
    main()
