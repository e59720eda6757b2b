"""Small checkpoints of every family, for requests that open them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ray_sampler.networks import edm2
from ray_sampler.networks.edm2 import Edm2UNet
from ray_sampler.networks.nvidia import SavedNetwork
from tests.networks.nvidia_files import snapshot
from tests.networks.test_dhariwal import Dhariwal

REFERENCE = Path(__file__).resolve().parents[1] / "golden" / "reference"

EDM2 = {
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 0,
    "model_channels": 16,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "channels_per_head": 16,
}


def edm2_snapshot(path: Path, encoder: str | None = "StandardRGBEncoder", seed: int = 0, **arguments: Any) -> Path:
    """An EDM2 snapshot of random weights, unconditional at 8 x 8 unless `arguments` say another thing."""
    wanted = EDM2 | arguments
    with torch.device("meta"):
        empty = Edm2UNet(edm2.options_from(SavedNetwork("Precond", wanted, {}))).state_dict()
    random = torch.Generator().manual_seed(seed)
    tensors = {f"unet.{name}": torch.randn(t.shape, generator=random) for name, t in empty.items()}
    path.write_bytes(snapshot("Precond", tensors, wanted, encoder))
    return path


def dhariwal_snapshot(path: Path, classes: int = 5) -> tuple[Path, Dhariwal]:
    """A snapshot of EDM's ADM network of random weights at 16 x 16, and an independent definition of it."""
    definition = Dhariwal(64, [1, 2], 1, [8], 16, classes)
    definition(torch.zeros(1, 3, 16, 16, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.tensor([0]))
    saved = definition.saved()
    path.write_bytes(snapshot("EDMPrecond", saved.tensors, saved.arguments))
    return path, definition
