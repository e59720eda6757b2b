"""Which CPU computes. The numerics key names its instruction set alone, but the libraries choose kernels by more."""

from __future__ import annotations

import platform
from pathlib import Path

NAMED = ("vendor_id", "cpu family", "model")


def cpu() -> dict[str, str]:
    """Architecture, vendor, family and model, as far as the system reports them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    pairs = (line.partition(":") for line in lines)
    found = {key.strip(): value.strip() for key, _, value in pairs}
    return {"machine": platform.machine()} | {key: found[key] for key in NAMED if key in found}
