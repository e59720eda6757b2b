"""Numbers computed with the original implementation, from tests/golden/reference."""

from __future__ import annotations

import io
import json
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.options import of

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "reference"


def golden_folder() -> Path:
    """classcond32 of the golden numbers."""
    return REFERENCE / "classcond32"


def golden_flags() -> dict[str, Any]:
    flags: dict[str, Any] = json.loads((golden_folder() / "flags.json").read_text())
    return flags


def golden_state() -> dict[str, Tensor]:
    """The network's state dict, on the CPU. The file is packed with xz, which halves it."""
    checkpoint = lzma.decompress((golden_folder() / "model.pt.xz").read_bytes())
    state: dict[str, Tensor] = torch.load(io.BytesIO(checkpoint), weights_only=True)
    return state


def options_of(flags: dict[str, Any]) -> AdmOptions:
    return of(AdmOptions, flags)
