"""Numbers computed with the original implementation, which are not part of the repository."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.config import Architecture

ROOT = Path(__file__).resolve().parents[2]


def golden_folder() -> Path:
    """classcond32 of the golden numbers; skips the calling test or module where they are absent."""
    folder = Path(os.environ.get("RAY_SAMPLER_GOLDEN", ROOT.parent / "shared" / "golden")) / "classcond32"
    if not folder.is_dir():
        pytest.skip(f"no golden numbers at {folder}; RAY_SAMPLER_GOLDEN may name their folder", allow_module_level=True)
    return folder


def golden_flags() -> dict[str, Any]:
    flags: dict[str, Any] = json.loads((golden_folder() / "flags.json").read_text())
    return flags


def architecture_of(flags: dict[str, Any]) -> Architecture:
    return Architecture(**{f.name: flags[f.name] for f in fields(Architecture) if f.name in flags})
