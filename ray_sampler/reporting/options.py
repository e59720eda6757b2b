"""What a run shows: the flags that say it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_sampler.options import option

Mode = Literal["auto", "bar", "log", "none"]


@dataclass(frozen=True, kw_only=True)
class ReportingOptions:
    """What a run shows."""

    progress: Mode = option("auto", "A live bar, a line every 10 seconds, or nothing; auto is a bar on a terminal.")
    json_log: bool = option(False, "Progress lines as JSON.")
    dry_run: bool = option(False, "Print the resolved run as JSON; open no checkpoint, touch nothing.")
