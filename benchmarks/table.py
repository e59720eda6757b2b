"""Rows of benchmark results: measured in turn, printed as a table, written as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # for the servers that the tests have

Values = tuple[float, ...]
"""One number a repeat."""


@dataclass(frozen=True)
class Goal:
    """What a row must reach: a bound on its ratio, ours / theirs, or on ours alone."""

    bound: Literal["at least", "at most"]
    value: float
    of: Literal["ratio", "ours"] = "ratio"

    def met(self, reached: float) -> bool:
        return reached >= self.value if self.bound == "at least" else reached <= self.value


@dataclass(frozen=True)
class Row:
    """One question: what we reach and what the other side does. No values: not measured here."""

    question: str
    ours: Values
    theirs: Values
    """Empty where nothing is compared."""
    unit: str
    goal: Goal | None = None

    @property
    def ratio(self) -> float | None:
        """Median of ours by median of theirs."""
        return median(self.ours) / median(self.theirs) if self.ours and self.theirs and median(self.theirs) else None

    @property
    def met(self) -> bool | None:
        """None where there is no goal, or nothing was measured."""
        reached = self.ratio if self.goal and self.goal.of == "ratio" else median(self.ours) if self.ours else None
        return None if self.goal is None or reached is None else self.goal.met(reached)

    def goal_text(self) -> str | None:
        if self.goal is None:
            return None
        return f"{self.goal.bound} {short(self.goal.value)}{'x' if self.goal.of == 'ratio' else f' {self.unit}'}"

    def summary(self) -> dict[str, Any]:
        """The row of latest.json."""
        return {
            "question": self.question,
            "ours": median(self.ours) if self.ours else None,
            "theirs": median(self.theirs) if self.theirs else None,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": self.goal_text(),
            "met": self.met,
            "repeats": len(self.ours),
        }

    def cells(self) -> tuple[str, ...]:
        """The row for people, with medians and, in brackets, the smallest and largest value."""
        ratio, met = self.ratio, self.met
        return (
            self.question,
            with_spread(self.ours) if self.ours else "not measured",
            with_spread(self.theirs) if self.theirs else "",
            self.unit,
            "" if ratio is None else f"{short(ratio)}x",
            self.goal_text() or "",
            "" if met is None else "yes" if met else "NO",
            str(len(self.ours)),
        )


HEADINGS = ("question", "ours", "theirs", "unit", "ours / theirs", "goal", "met", "repeats")


def short(number: float) -> str:
    """Three significant digits, and whole numbers whole: 0.0123, 1.50, 1,234."""
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.0f}" if number == int(number) else f"{number:,.{decimals}f}"


def with_spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return short(values[0])
    return f"{short(median(values))} ({short(min(values))} to {short(max(values))})"


def in_turn(repeats: int, *sides: Callable[[], float]) -> tuple[Values, ...]:
    """What each side returns, `repeats` times, one side after the other, so that a slow minute strikes all.

    Odd repeats go through the sides backwards, so that none always comes first.
    """
    found: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        order = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))
        for side in order:
            found[side].append(sides[side]())
    return tuple(tuple(values) for values in found)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A program's command line, with --json, which `report` obeys."""
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows with all values here")
    return made


def report(rows: Sequence[Row], notes: Sequence[str] = (), json_file: Path | None = None) -> None:
    """Print the table and, below it, each note: one sentence of what else was found. Write both to `json_file`."""
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row.cells())
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    for note in notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    if json_file:
        json_file.write_text(json.dumps({"rows": [asdict(row) for row in rows], "notes": list(notes)}))


def read_report(json_file: Path) -> tuple[list[Row], list[str]]:
    """What `report` wrote."""
    content = json.loads(json_file.read_text())
    rows = [
        Row(
            row["question"],
            tuple(row["ours"]),
            tuple(row["theirs"]),
            row["unit"],
            Goal(**row["goal"]) if row["goal"] else None,
        )
        for row in content["rows"]
    ]
    return rows, content["notes"]
