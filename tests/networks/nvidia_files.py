"""Snapshots as NVIDIA's scripts write them, made without their code."""

from __future__ import annotations

import pickle
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = "raise SystemExit('the source text of a snapshot was executed')\n"


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise AssertionError("a snapshot's function was called")


class EasyDict(dict[str, Any]):
    """Stands for dnnlib.util.EasyDict."""


class Persistent:
    """An object that is stored with its class's source text."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.meta: dict[str, Any] = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return _reconstruct_persistent_obj, (self.meta,)


@contextmanager
def _their_modules() -> Iterator[None]:
    """Their functions under the names by which pickles know them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    names = {"torch_utils.persistence": persistence, "dnnlib.util": util}
    names |= {package: types.ModuleType(package) for package in ("torch_utils", "dnnlib")}
    sys.modules.update(names)
    places = (_reconstruct_persistent_obj, "torch_utils.persistence"), (EasyDict, "dnnlib.util")
    for thing, module in places:
        thing.__module__ = module
    try:
        yield
    finally:
        for thing, _ in places:
            thing.__module__ = __name__
        for name in names:
            del sys.modules[name]


def dumped(content: Any, protocol: int = 4) -> bytes:
    with _their_modules(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of storages, which torch would like to see gone
        return pickle.dumps(content, protocol)


def module(
    class_name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any] = {},
    attributes: Mapping[str, Any] = {},
    buffers: tuple[str, ...] = ("freqs", "phases", "resample_filter"),
) -> Persistent:
    """A module with `tensors` by dotted name; those whose last part is in `buffers` are buffers.

    Modules named `enc` and `dec` are torch's own, as in the published networks.
    """
    state: dict[str, Any] = {"training": False, "_parameters": {}, "_buffers": {}, "_non_persistent_buffers_set": set()}
    inner: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = tensor
        elif head in buffers:
            state["_buffers"][head] = tensor
        else:
            state["_parameters"][head] = nn.Parameter(tensor, requires_grad=False)
    state["_modules"] = {name: _inner(name, part, buffers) for name, part in inner.items()}
    state |= {"_init_args": (), "_init_kwargs": dict(arguments), **attributes}
    return Persistent(class_name, state)


def _inner(name: str, tensors: dict[str, Tensor], buffers: tuple[str, ...]) -> Persistent | nn.Module:
    made = module({"unet": "UNet", "model": "SongUNet"}.get(name, "Layer"), tensors, buffers=buffers)
    if name not in ("enc", "dec"):
        return made
    container = nn.ModuleDict.__new__(nn.ModuleDict)
    container.__dict__.update(made.meta["state"])
    return container


def snapshot(
    class_name: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any] = {},
    encoder: str | None = None,
    protocol: int = 4,
) -> bytes:
    """A snapshot of a preconditioned network, whose tensors have the published names, `unet.` or `model.` included."""
    content: dict[str, Any] = {"ema": module(class_name, tensors, arguments), "loss_fn": None}
    if encoder:
        content["encoder"] = Persistent(encoder, {"_init_args": (), "_init_kwargs": {}})
    return dumped(content, protocol)


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=stream).to(dtype) for name, shape in shapes.items()}
