"""`make chaos`: rounds of mistreated runs, then each storage request of a run failed, and a table of either."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tests.chaos.harness import Chaos, Score, counted
from tests.cluster.runs import random_weights
from tests.faults.sweep import Swept, faulty_bucket, sweep

ROUNDS_SHARE = 0.7
"""Of the minutes that are given; the rest is for the sweep."""


@dataclass(frozen=True)
class Request:
    rounds: int = 20
    minutes: float | None = None
    """Stop after this many minutes, whatever the rounds."""
    seed: int = 0


def disturbed(request: Request, checkpoint: Path, folder: Path) -> Score:
    """The rounds."""
    began = time.monotonic()
    with faulty_bucket(folder / "bucket", folder / "aws") as proxy:
        chaos = Chaos(checkpoint, folder, proxy, request.seed)
        try:
            for _ in range(request.rounds):
                if request.minutes is not None and time.monotonic() - began > 60 * ROUNDS_SHARE * request.minutes:
                    break
                chaos.round()
                score = chaos.score
                told = f"{score.kills.total()} kills, {score.damages.total()} fragments corrupted"
                print(f"round {score.rounds}: {told}, {score.identical} identical", file=sys.stderr, flush=True)
        finally:
            chaos.close()
    return chaos.score


def rows_of(swept: Swept) -> list[tuple[str, str]]:
    """The sweep's part of the table."""
    return [
        ("runs with a failing storage request", str(swept.runs)),
        *counted("requests failed on purpose", swept.failed),
        ("longest of these runs", f"{swept.longest_s:.0f} s"),
        ("failures", "; ".join(swept.failures) or "none"),
    ]


def show(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title, "")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def main(request: Request) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        checkpoint = Path(name) / "tiny.safetensors"
        save_file(random_weights(), checkpoint)
        for part in ("rounds", "sweep"):
            (Path(name) / part).mkdir()
        score = disturbed(request, checkpoint, Path(name) / "rounds")
        show(f"seed {request.seed}, {(time.monotonic() - began) / 60:.0f} minutes", score.rows())
        left = None if request.minutes is None else request.minutes - (time.monotonic() - began) / 60
        swept = sweep(checkpoint, Path(name) / "sweep", request.seed, minutes=left)
    show(f"{(time.monotonic() - began) / 60:.0f} minutes in all", rows_of(swept))
    return 1 if score.failures or swept.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=Request.rounds)
    parser.add_argument("--minutes", type=float, help="stop after this many minutes, whatever the rounds")
    parser.add_argument("--seed", type=int, default=Request.seed)
    sys.exit(main(Request(**vars(parser.parse_args()))))
