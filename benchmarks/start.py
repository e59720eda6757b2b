"""How soon does a new user see pictures, and where do the seconds of `make sample` go?

The command of `make sample`, as a separate process, in a new folder each time: when its parts are there, in seconds
since it was typed, packages installed. Nothing else is compared.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from table import Goal, Row, parser, report

ROOT = Path(__file__).resolve().parents[1]
REPEATS = 3
LOOK_S = 0.02
MARKS = {
    "the run is known: imports, weights, fingerprint": "run ",
    "Ray is up, and actors are asked for": "starting: ",
    "an actor has loaded the network": "sampling: ",
    "the archive is there": "done: ",
}
"""What begins a line of the log, after its time."""
FILES = {"the first fragment is there": "fragments/*.parquet", "the first preview is there": "preview.png"}
END = "the command has ended, and Ray with it"
ORDER = (*list(MARKS)[:3], *FILES, list(MARKS)[3], END)


def timeline(output: Path) -> dict[str, float]:
    """Seconds from the start of the command to each mark."""
    command = [sys.executable, "jobs/sample.py", "--output", str(output), "--num_samples", "1000"]
    found: dict[str, float] = {}
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = process.stderr

    def read() -> None:
        for line in lines:
            for mark, start in MARKS.items():
                if line.partition(" ")[2].startswith(start):
                    found.setdefault(mark, time.perf_counter() - began)

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        for mark, pattern in FILES.items():
            if mark not in found and any(output.glob(pattern)):
                found[mark] = time.perf_counter() - began
        time.sleep(LOOK_S)
    found[END] = time.perf_counter() - began
    reader.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return found


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [timeline(Path(folder) / str(repeat)) for repeat in range(REPEATS)]
    goals = {END: Goal("at most", 90, "ours")}
    rows = [Row(mark, tuple(each[mark] for each in found), (), "s", goals.get(mark)) for mark in ORDER]
    sampling = median(each["the archive is there"] - each["an actor has loaded the network"] for each in found)
    report(rows, [f"Sampling, merging and the report took {sampling:.1f} s of it (median)."], arguments.json)


if __name__ == "__main__":
    main()
