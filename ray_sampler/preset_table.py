"""The table of `ray-sampler presets`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ray_sampler.options import of
from ray_sampler.presets import BUNDLED, PRESETS
from ray_sampler.sampling.solvers import SOLVERS

COLUMNS = {
    "name": 0,
    "what it is": 120,
    "parameters": 95,
    "sampler": 0,
    "NFE": 0,
    "published": 0,
    "file": 170,
}
"""Of the table of presets, each with the width of a terminal that has room for it."""


def print_presets() -> None:
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    titles = [title for title, least in COLUMNS.items() if console.width >= least]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in titles:
        right = title in ("parameters", "NFE")
        table.add_column(title, no_wrap=title != "what it is", justify="right" if right else "left")
    for name, model in (BUNDLED | PRESETS).items():
        cells = (
            name,
            model.description,
            f"{model.parameters / 1e6:,.1f} M",
            sampler_of(model.settings),
            str(evaluations_of(model.settings)),
            model.score,
            "in the package" if name in BUNDLED else model.file or "give --model",
        )
        shown = dict(zip(COLUMNS, cells, strict=True))
        table.add_row(*(shown[title] for title in titles))
    console.print(table)
    console.print(
        "Use a preset as --preset NAME, which fetches its weights, or --preset NAME --model FILE where you have them, "
        "and a bundled model as --model NAME."
    )


def sampler_of(settings: Mapping[str, Any]) -> str:
    """A solver with its settings, in a few words."""
    ts = f" ts {settings['ts']}" if settings.get("ts") and settings["sampler"] == "multistep" else ""
    guidance = f", guidance {settings['guidance']:g}" if "guidance" in settings else ""
    churn = f", churn {settings['s_churn']:g}" if "s_churn" in settings else ""
    steps = "" if settings["sampler"] == "onestep" else f" {settings['steps']}"
    return f"{settings['sampler']}{steps}{ts}{churn}{guidance}"


def evaluations_of(settings: Mapping[str, Any]) -> int:
    """Network evaluations for one sample, those of a guide not counted."""
    solver = SOLVERS[settings["sampler"]]
    return solver.evaluations(settings["steps"], of(solver.options, settings))
