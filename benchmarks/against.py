"""Is anything slower or larger than at an earlier commit? The same programs of both, in turn, on the same cores.

Rows that both have, by their question; "ours" is this commit's value and "theirs" the other's, each what `ours` is in
the program itself. Another commit: --revision NAME.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from table import Goal, Row, parser, read_report, report

ROOT = Path(__file__).resolve().parent.parent
EARLIER = "876cd7c"
PROGRAMS = ("engine", "driver", "merge", "memory")
RATES = ("images/s", "shards/s")
"""Units in which more is better."""
ROUNDS = 2


def measured(checkout: Path, program: str, folder: Path) -> list[Row]:
    """What a program of a checkout finds with the package of that checkout."""
    file = folder / "rows.json"
    command = [sys.executable, str(checkout / "benchmarks" / f"{program}.py"), "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    return read_report(file)[0]


def compared(mine: list[list[Row]], other: list[list[Row]], program: str) -> list[Row]:
    """A row for each question that both commits answer, with the values of all rounds."""
    found: dict[str, Row] = {}
    for row in mine[0]:
        ours, theirs = (
            tuple(value for rows in side for each in rows if each.question == row.question for value in each.ours)
            for side in (mine, other)
        )
        if ours and theirs:
            goal = Goal("at least", 0.95) if row.unit in RATES else Goal("at most", 1.05)
            found[row.question] = Row(f"{program}: {row.question}", ours, theirs, row.unit, goal)
    return list(found.values())


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--revision", default=EARLIER, help="the commit to compare with (876cd7c)")
    made.add_argument("programs", nargs="*", help=f"({' '.join(PROGRAMS)})")
    arguments = made.parse_args()
    rows: list[Row] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        there = folder / "there"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(there), arguments.revision], check=True)
        stack.callback(subprocess.run, [*git, "remove", "--force", str(there)], check=True)
        for program in arguments.programs or PROGRAMS:
            mine: list[list[Row]] = []
            other: list[list[Row]] = []
            for turn in range(ROUNDS):
                for checkout, side in ((ROOT, mine), (there, other))[:: 1 if turn % 2 == 0 else -1]:
                    side.append(measured(checkout, program, folder))
            rows += compared(mine, other, program)
    report(rows, [f"theirs is commit {arguments.revision}."], arguments.json)


if __name__ == "__main__":
    main()
