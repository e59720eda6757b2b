"""Everything that a GPU must show, within nine minutes: `make gpu`.

The tests of tests/gpu and the cases of gpu_cases.py run as separate processes, the most valuable first. What was
found is written after every step, into $OUT if that is set and else into benchmarks/results, so a run that is cut short
leaves its figures. Without a GPU nothing is measured; with --rehearse all steps run on the CPU then, with tiny
networks, to prove that they work.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from table import HEADINGS, Goal, Row, parser, read_report, report

HERE = Path(__file__).resolve().parent
BUDGET_S = 530.0
AHEAD_CORES = 8
"""CPU cores from which on later cases are compiled while the tests run."""
TAIL = 4000
"""Characters of the output of a step that failed."""


@dataclass(frozen=True)
class Step:
    """A process to run."""

    name: str
    command: tuple[str, ...]
    """Of the interpreter."""
    limit_s: float
    least_s: float = 20.0
    """With less time left it is not begun."""
    figures: bool = False
    """Whether it measures, and so must have the device to itself."""


def tests(name: str, *chosen: str) -> tuple[str, ...]:
    return ("-m", "pytest", f"tests/gpu/{name}.py", "-q", "-rs", "--tb=short", "-p", "no:cacheprovider", *chosen)


def case(name: str) -> tuple[str, ...]:
    return (str(HERE / "gpu_cases.py"), name)


STEPS = (
    Step("facts", case("facts"), 60),
    Step("tests: one process", tests("test_engine"), 90),
    Step("tests: two processes, not compiled", tests("test_processes", "-k", "eager"), 90),
    Step("tests: two processes, compiled", tests("test_processes", "-k", "compiled and not published"), 120),
    Step("tests: whole runs on Ray", tests("test_ray"), 110),
    Step("tests: imagenet64 compiled in two processes", tests("test_processes", "-k", "published"), 160, 60),
    Step("imagenet64", case("imagenet64"), 150, 40, figures=True),
    Step("price of determinism", case("price"), 150, 40, figures=True),
    Step("a whole run", case("job"), 80, 30, figures=True),
    Step("lsun256", case("lsun256"), 150, 40, figures=True),
    Step("inception", (str(HERE / "inception.py"),), 60, 20, figures=True),
    Step("layouts", case("layouts"), 60, 20, figures=True),
    Step("small networks", case("small"), 110, 30, figures=True),
    Step("batch sizes", case("batches"), 90, 20, figures=True),
)
"""In the order of their worth."""

AHEAD = ("imagenet64,lsun256", "imagenet64:free")
"""What is compiled ahead, by process: networks, `:free` without pinning."""


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    status: str
    """ok, failed, ran out of time, or not begun."""
    seconds: float = 0.0
    why: str = ""
    tests: str = ""
    """pytest's last line, and why it skipped what it did."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    output: str = ""
    """The end of what it printed, where it failed."""


@dataclass
class Results:
    """All outcomes, and where they are written."""

    folder: Path
    name: str
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(
            f"== {outcome.name}: {outcome.status} in {outcome.seconds:.0f} s. {outcome.tests or outcome.why}",
            flush=True,
        )
        if outcome.output:
            print(outcome.output, flush=True)
        self.write()

    def write(self) -> None:
        content = {
            "machine": self.name,
            "date": f"{date.today():%Y-%m-%d}",
            "torch": torch.__version__,
            "steps": [asdict(outcome) for outcome in self.outcomes],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        file = re.sub(r"[^a-z0-9]+", "-", f"gpu {self.name}".lower()).strip("-")
        (self.folder / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.folder / f"{file}.md").write_text(self.text())

    def text(self) -> str:
        """All of it for people."""
        lines = [
            f"# {self.name}, torch {torch.__version__}, {date.today():%Y-%m-%d}",
            "",
            "| step | | s | |",
            "| --- |" * 4,
        ]
        lines[-1] = "| --- | --- | --- | --- |"
        lines += [f"| {o.name} | {o.status} | {o.seconds:.0f} | {o.tests or o.why} |" for o in self.outcomes]
        rows = [row.cells() for o in self.outcomes for row in o.rows]
        if rows:
            lines += ["", *(f"| {' | '.join(cells)} |" for cells in [HEADINGS, ("---",) * len(HEADINGS), *rows])]
        notes = [note for o in self.outcomes for note in o.notes]
        return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def run(step: Step, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a step for this number of seconds at most."""
    with tempfile.TemporaryDirectory() as folder:
        found, printed = Path(folder) / "rows.json", Path(folder) / "output"
        extra = () if "pytest" in step.command else ("--json", str(found))
        began = time.monotonic()
        with printed.open("wb") as output:
            code = finished(begin([*step.command, *extra], environment, output), seconds)
        outcome = Outcome(step.name, "ok", time.monotonic() - began)
        text = printed.read_text(errors="replace")
        if "pytest" in step.command:
            lines = [line for line in text.splitlines() if line.startswith("SKIPPED")]
            outcome.tests = "; ".join([*text.rstrip().splitlines()[-1:], *lines])
        if found.exists():
            outcome.rows, outcome.notes = read_report(found)
        if code != 0:
            outcome.status = "ran out of time" if code is None else "failed"
            outcome.why = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
            outcome.output = text[-TAIL:]
        return outcome


def begin(command: Sequence[str], environment: dict[str, str], output: Any) -> subprocess.Popen[bytes]:
    """Start a Python process at the head of a new process group."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=HERE.parent,
        env=environment,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; None if the time was up, and the process and all that it started were ended."""
    try:
        return process.wait(timeout=max(0.0, seconds))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


class Ahead:
    """A process that fills Inductor's cache with what later steps need, while the tests run."""

    def __init__(self, names: str, folder: Path, environment: dict[str, str]) -> None:
        self.name = f"compile ahead: {names}"
        self.rows, self.printed = folder / f"{names}.json", folder / f"{names}.output"
        self.began = time.monotonic()
        with self.printed.open("wb") as output:
            command = [*case("ahead"), "--json", str(self.rows)]
            self.process = begin(command, environment | {"GPU_AHEAD": names}, output)

    def outcome(self, seconds: float) -> Outcome:
        """What became of it, after waiting for it so long: figures need the device to themselves."""
        code = finished(self.process, seconds)
        outcome = Outcome(self.name, "ok", time.monotonic() - self.began)
        if code == 0:
            outcome.rows, outcome.notes = read_report(self.rows)
        else:
            outcome.status = "ran out of time" if code is None else "failed"
            outcome.output = self.printed.read_text(errors="replace")[-TAIL:]
        return outcome


@contextmanager
def compiled_ahead(folder: Path, environment: dict[str, str], rehearsal: bool) -> Iterator[list[Ahead]]:
    """Processes that compile ahead, where there are cores for it; none outlives this."""
    enough = rehearsal or (os.cpu_count() or 1) >= AHEAD_CORES
    started = [Ahead(names, folder, environment) for names in AHEAD if enough]
    try:
        yield started
    finally:
        for each in started:
            finished(each.process, 0)


def go(results: Results, budget_s: float, rehearsal: bool) -> None:
    """Run the steps one after the other, as far as the time goes."""
    end = time.monotonic() + budget_s
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "GPU_REHEARSAL": "1" if rehearsal else "0",
    }
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        with compiled_ahead(Path(cache), environment, rehearsal) as ahead:
            for step in STEPS:
                while step.figures and ahead:
                    results.add(ahead[0].outcome(min(120.0, end - time.monotonic() - 120)))
                    del ahead[0]
                left = end - time.monotonic()
                if left < step.least_s:
                    results.add(Outcome(step.name, "not begun", why=f"{left:.0f} s were left of {budget_s:.0f}"))
                else:
                    results.add(run(step, min(step.limit_s * (3 if rehearsal else 1), left), environment))


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal on a CPU"


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--rehearse", action="store_true", help="where there is no GPU, run on the CPU")
    made.add_argument("--seconds", type=float, default=BUDGET_S, help="time that all steps may take")
    arguments = made.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.rehearse:
        report(
            [Row("imagenet64 on a GPU: heun 18 steps", (), (), "images/s", Goal("at least", 3))],
            ["This machine has no GPU: nothing was measured. --rehearse runs the code on the CPU with tiny networks."],
            arguments.json,
        )
        return 0
    given = os.environ.get("OUT")
    folder = Path(given) if given else HERE / "results" if gpu else Path(tempfile.mkdtemp(prefix="gpu-rehearsal-"))
    results = Results(folder, machine())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    go(results, arguments.seconds, rehearsal=not gpu)
    print(results.text())
    print(f"Written to {folder}.")
    if arguments.json:
        rows = [row for outcome in results.outcomes for row in outcome.rows]
        report(rows, [f"On one {machine()}, torch {torch.__version__}."], arguments.json)
    return any(outcome.status == "failed" for outcome in results.outcomes)


if __name__ == "__main__":
    raise SystemExit(main())
