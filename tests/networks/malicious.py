"""Small checkpoints, and objects that run code where they are unpickled."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from safetensors.torch import save


class Code:
    """Unpickled, this calls a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def small(layout: str) -> bytes:
    file = io.BytesIO()
    model = {"w": torch.arange(6.0), "b": torch.ones(2).half()}
    content = {"model": model, "ema": [torch.ones(2)], "lr": Code(print, 1)}
    if layout == "safetensors":
        return save(model)
    if layout == "plain":
        return pickle.dumps(content, 4)
    torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
    return file.getvalue()


SMALL = {layout: small(layout) for layout in ("zip", "old", "plain", "safetensors")}
