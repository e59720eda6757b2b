"""What a user's network keeps between calls: apart for each thread, and put back before each block."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that every module has: tables of its parameters, buffers, children and hooks among them."""


@torch.inference_mode(False)
def twin(network: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of a module that shares its parameters, or has them on `device`; buffers and attributes are its own.

    Functions in it, as hooks, refer to the copy where they referred to the module. What cannot be copied is shared.
    """
    values = [value for module in network.modules() for value in vars(module).values()]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in values if isinstance(value, Tensor)}
    memo |= {id(buffer): buffer.detach().to(device or buffer.device, copy=True) for buffer in network.buffers()}
    for parameter in network.parameters():
        elsewhere = device and nn.Parameter(parameter.detach().to(device), requires_grad=False)
        memo[id(parameter)] = parameter if elsewhere is None else elsewhere
    cells = _closures(values, memo)
    try:
        copied: nn.Module = copy.deepcopy(network, memo_of_it := dict(memo))
    except Exception:  # whatever the attributes of a user's network raise
        memo |= {id(value): value for value in values if _copy(value, dict(memo)) is value}
        copied = copy.deepcopy(network, memo_of_it := dict(memo))
    for old, new in cells:
        with suppress(ValueError):  # it is empty
            new.cell_contents = _copy(old.cell_contents, memo_of_it)
    for ours, theirs in zip(copied.parameters(), network.parameters(), strict=True):
        if device is None and ours is not theirs:  # TorchScript copies its own
            ours.data = theirs.data
    return copied


def _closures(values: list[Any], memo: dict[int, Any]) -> list[tuple[types.CellType, types.CellType]]:
    """Have functions with closures copied, hooks and attributes; the cells of each and, still empty, of its copy."""
    cells: dict[int, tuple[types.CellType, types.CellType]] = {}
    found = [*values, *(each for value in values if isinstance(value, dict) for each in value.values())]
    for function in found:  # which grows
        if not isinstance(function, types.FunctionType) or not function.__closure__ or id(function) in memo:
            continue
        for cell in function.__closure__:
            cells.setdefault(id(cell), (cell, types.CellType()))
            with suppress(ValueError):
                found.append(cell.cell_contents)
        own = tuple(cells[id(cell)][1] for cell in function.__closure__)
        code, names, defaults = function.__code__, function.__globals__, function.__defaults__
        memo[id(function)] = made = types.FunctionType(code, names, function.__name__, defaults, own)
        made.__kwdefaults__ = function.__kwdefaults__
    return list(cells.values())


def _copy(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy, or the value itself where it cannot be copied or need not be."""
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a user's objects raise
        return value


@torch.inference_mode(False)
def remember(network: nn.Module) -> Callable[[], None]:
    """What puts attributes and buffers back as they are now; parameters, which nothing writes, are not looked at.

    Objects that are attributes are put back as deep copies. Attributes of TorchScript that are not buffers stay.
    """
    fixed = {id(each): each for each in (*network.modules(), *network.parameters())}
    tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
    objects: list[tuple[dict[str, Any], str, Any]] = []
    tensors = list(network.buffers())
    for module in network.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        own = vars(module)
        of_module = [own[name] for name in OF_EVERY_MODULE & own.keys() if isinstance(own[name], dict)]
        tables += [(table, dict(table)) for table in (own, *of_module)]
        for name, value in own.items():
            if isinstance(value, Tensor):
                tensors.append(value)
            elif name not in OF_EVERY_MODULE and (kept := _copy(value, dict(fixed))) is not value:
                objects.append((own, name, kept))
    kept_values = [(tensor, tensor.detach().clone()) for tensor in tensors if is_written(tensor)]

    @torch.no_grad()
    def put_back() -> None:
        for table, entries in tables:
            if len(table) != len(entries) or any(table.get(name) is not value for name, value in entries.items()):
                table.clear()
                table.update(entries)
        for tensor, value in kept_values:
            tensor.copy_(value)
        for own, name, kept in objects:
            own[name] = _copy(kept, dict(fixed))

    return put_back


def is_written(tensor: Tensor) -> bool:
    """Whether code can write to a tensor in place: not to a sparse one, or where elements share memory."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and all(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
