"""What a run shows: the flags that say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_sampler.options import option

Mode = Literal["auto", "bar", "log", "none"]


@dataclass(frozen=True, kw_only=True)
class ReportingOptions:
    """What a run shows."""

    progress: Mode = option(
        "auto", "Show a live bar, a line every 10 seconds, or warnings only; auto is a bar on a terminal, else log."
    )
    json_log: bool = option(False, "Write progress lines as JSON.")
    dry_run: bool = option(
        False, "Print the resolved settings as JSON and exit; nothing is opened or written.", common=True
    )
