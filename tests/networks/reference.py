"""Numbers that the published implementations gave on small random networks; see about.json in each folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_sampler.networks import edm, edm2
from ray_sampler.networks.nvidia import SavedNetwork, read_pickle, stripped

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "reference"
SIGMA_DATA = 0.5

Network = edm.SongUNet | edm2.Edm2UNet


def numbers(name: str, file: str) -> dict[str, Any]:
    """Float and integer arrays of `file`, as tensors."""
    with np.load(FOLDER / name / f"{file}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def saved(name: str, file: str = "net") -> SavedNetwork:
    with (FOLDER / name / f"{file}.pkl").open("rb") as pickle:
        return read_pickle(pickle)["ema"]


def network(name: str, file: str = "net", fold: bool = True) -> Network:
    """A reference network, in float32."""
    stored = saved(name, file)
    made: Network
    if stored.class_name == "Precond":
        with torch.device("meta"):
            made = edm2.Edm2UNet(edm2.options_from(stored))
        made.load_state_dict(stripped(stored.tensors, edm2.PREFIX), assign=True)
        return edm2.fold(made, torch.float32) if fold else made.eval()
    with torch.device("meta"):
        made = edm.SongUNet(edm.options_from(stored))
    made.load_state_dict(stripped(stored.tensors, edm.PREFIX), assign=True)
    return made.eval()


@torch.no_grad()
def denoised(made: Callable[..., Tensor], x: Tensor, sigma: Tensor, y: Tensor | None) -> Tensor:
    """D(x, sigma, y) with EDM's preconditioning, in float32: x (B, C, H, W), sigma (B,) or (1,)."""
    s = sigma.float().reshape(-1, 1, 1, 1)
    total = s**2 + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), 1 / total.sqrt()
    return c_skip * x.float() + c_out * made(c_in * x.float(), sigma.float().log() / 4, y)
