"""A file of random weights of the Inception network's real architecture."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch


def write_weights(path: Path) -> None:
    """Write a state dict as torch.save does; with these weights activations keep their scale with depth."""
    module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        # Its constructor loads weights, of which there are none yet.
        patch.setattr(module.torch, "load", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path="none")
    random = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        if name.endswith("conv.weight"):
            torch.nn.init.kaiming_normal_(tensor, generator=random)
        elif name == "fc.weight":
            tensor.normal_(0, 0.05, generator=random)
    torch.save(network.state_dict(), path)
