"""Run the benchmark programs and write benchmarks/results/latest.json and the results in benchmarks/README.md.

Programs named as arguments (engine, noise, ...) run alone, and then nothing is written.
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
RESULTS, README = HERE / "results" / "latest.json", HERE / "README.md"
BEGIN, END = "<!-- results: written by make bench -->", "<!-- end of results -->"
NO_PROGRAMS = {"bench", "table", "textbook"}
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


def write_results(found: dict[str, tuple[list[Row], list[str]]], where: str) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    rows = [row.summary() for of_program, _ in found.values() for row in of_program]
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    sections = [f"### {name}\n\n{markdown(*report)}" for name, report in found.items()]
    before, begin, rest = README.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{README} has lost its marks {BEGIN} and {END}; the results are in {RESULTS} only")
    README.write_text("\n\n".join([before + BEGIN, where, *sections, END + after]))


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in programs()]
    if unknown:
        raise SystemExit(f"there is no benchmark {unknown[0]!r}; there are {', '.join(programs())}")
    where, found, failed = machine(), {}, []
    for name in names or programs():
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.json"
            done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), "--json", str(rows)], cwd=HERE.parent)
            if done.returncode:
                failed.append(name)
            else:
                found[name] = read_report(rows)
        print(f"== {name}: {time.perf_counter() - began:.0f} s\n", flush=True)
    if not names:
        write_results(found, where + (f" Failed, and left out: {', '.join(failed)}." if failed else ""))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
