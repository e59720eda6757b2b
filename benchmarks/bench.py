"""Run the benchmark programs, all or those named as arguments (engine, noise, ...), and write down what they found.

Each keeps all its values in benchmarks/results/PROGRAM.json; benchmarks/results/latest.json and the results in
benchmarks/README.md are made of those.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

from table import HEADINGS, Row, read_report

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results", HERE / "README.md"
LATEST = RESULTS / "latest.json"
BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
NO_PROGRAMS = {"bench", "gpu_cases", "request_path", "statements", "stub", "table", "textbook"}
ON_REQUEST = {"against"}
"""Run where they are named only: this one takes an hour."""
PACKAGES = ("torch", "ray", "numpy", "pyarrow", "fsspec")


def programs() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NO_PROGRAMS)


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def machine() -> str:
    """Date, machine and versions, in one sentence."""
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    load = os.getloadavg()[0]
    return (
        f"{date.today():%Y-%m-%d}, {os.cpu_count()} CPU cores ({processor()}), {platform.system()}, "
        f"Python {platform.python_version()}, {versions}; load average {load:.1f} at the start."
    )


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([table, "\n".join(f"- {note}" for note in notes)] if notes else [table])


def write_results() -> None:
    """Make latest.json and the README's results of what each program found last."""
    found = {name: read_report(RESULTS / f"{name}.json") for name in programs() if (RESULTS / f"{name}.json").exists()}
    rows = [row.summary() for of_program, _ in found.values() for row in of_program]
    LATEST.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sections = [f"### {name}\n\n{markdown(*report)}" for name, report in found.items()]
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} has lost its marks {BEGIN} and {END}; the results are in {RESULTS} only")
    README.write_text("\n\n".join([before + BEGIN, *sections, END + after]))


def run_program(name: str) -> bool:
    """Whether a program ran to its end; then what it found is kept, with where it was found."""
    where, began = machine(), time.perf_counter()
    print(f"== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--json", str(rows)], cwd=HERE.parent)
        if done.returncode == 0:
            report = json.loads(rows.read_text())
            report["notes"].append(where)
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"== {name}: {time.perf_counter() - began:.0f} s\n", flush=True)
    return done.returncode == 0


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in programs()]
    if unknown:
        raise SystemExit(f"there is no benchmark {unknown[0]!r}; there are {', '.join(programs())}")
    wanted = names or [name for name in programs() if name not in ON_REQUEST]
    failed = [name for name in wanted if not run_program(name)]
    write_results()
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
