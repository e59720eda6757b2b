"""`make chaos`: rounds of mistreated runs, and one table of what became of them."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from tests.chaos.harness import Chaos
from tests.cluster.runs import random_weights


@dataclass(frozen=True)
class Request:
    rounds: int = 20
    minutes: float | None = None
    """Stop after so many minutes, whatever the rounds."""
    seed: int = 0


def main(request: Request) -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(random_weights(), folder / "tiny.safetensors")
        chaos = Chaos(folder / "tiny.safetensors", folder, request.seed)
        try:
            for _ in range(request.rounds):
                if request.minutes is not None and time.monotonic() - began > 60 * request.minutes:
                    break
                chaos.round()
                print(f"round {chaos.score.rounds}: {chaos.score.kills.total()} kills", file=sys.stderr, flush=True)
        finally:
            chaos.close()
    table = Table(f"seed {request.seed}, {(time.monotonic() - began) / 60:.0f} minutes", "")
    for row in chaos.score.rows():
        table.add_row(*row)
    Console().print(table)
    return 0 if chaos.score.identical == chaos.score.rounds else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Request)))
