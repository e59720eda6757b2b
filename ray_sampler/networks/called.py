"""A user's network as it is called, what it keeps between calls, and what is said where it gives something else.

What it keeps is apart for each thread, and put back before each block.
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.errors import RunError
from ray_sampler.networks.family import DTYPES, Precision
from ray_sampler.networks.user_code import brief, installed


class Called(nn.Module):
    """A user's network, called as all networks are: labels as it wants them, float32 out, in the run's precision.

    Args:
        checked: whether it must return one tensor like x; a parameterisation of the user's own answers for itself.
    """

    def __init__(
        self, network: nn.Module, num_classes: int, one_hot: bool, precision: Precision, checked: bool = True
    ) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.one_hot = one_hot
        self.precision = precision
        self.checked = checked
        self._put_back: Callable[[], None] | None = None

    def another(self, device: torch.device | None = None) -> Called:
        """A copy for another thread with the same weights, or one on another device."""
        arguments = (self.num_classes, self.one_hot, self.precision, self.checked)
        return Called(twin(self.network, device), *arguments).eval()

    def begin(self) -> None:
        """Be as after loading: what earlier calls left in attributes and buffers is forgotten."""
        if self._put_back is None:
            self._put_back = remember(self.network)
        self._put_back()

    def train(self, mode: bool = True) -> Called:
        """As of every module. What torch.export made has no modes, and raises where it is asked for one."""
        try:
            return super().train(mode)
        except NotImplementedError:  # by torch.export's train and eval; its own children keep no mode either
            for module in self.modules():
                module.training = mode
            return self

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *more: Any, **named: Any) -> Any:
        """What the network makes of copies, as it may write to what it gets, and to what it returned, in a later call.

        Whatever else it gets or returns is copied as `copied` does.

        Raises:
            RunError: the network raises, or returns something unlike x, which arithmetic might take all the same.
                Memory that runs out is the cause of the error then.
        """
        dtype = DTYPES[self.precision]
        half = dtype != torch.float32
        with torch.autocast(x.device.type, dtype if half else torch.bfloat16, enabled=half):
            labels = (y,) if more else ()
            if y is not None:
                labels = (self._rows(y) if self.one_hot else y.clone(),)
            try:
                output = self.network(x.clone(), t.clone(), *labels, *copied(more), **copied(named))
            except (Exception, SystemExit) as error:
                said = brief(error, place_of(self.network)) + remedy_of(
                    error, self.network, "x, t" + ", y" * bool(labels)
                )
                raise RunError(f"the network of --model raised {said}") from error
        if self.checked:
            wrong = unlike(output, x)
            if wrong:
                raise RunError(f"the network of --model returned {wrong}{place_of(self.network)}")
        return output.to(torch.float32, copy=True) if isinstance(output, Tensor) else copied(output)

    def _rows(self, y: Tensor) -> Tensor:
        """One-hot rows (B, num_classes) float32; any label past the classes is the null label, a row of zeros."""
        return F.one_hot(y.clamp(max=self.num_classes), self.num_classes + 1)[:, : self.num_classes].float()


def copied(value: Any) -> Any:
    """A value with copies of its tensors, in lists, tuples, dictionaries and dataclasses too; all else is as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple | list):
        items = [copied(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, type) or not (isinstance(value, dict) or dataclasses.is_dataclass(value)):
        return value
    ours: Any = copy.copy(value)
    if isinstance(value, dict):  # as results of diffusers and transformers, which are dataclasses too
        for key, item in value.items():
            ours[key] = copied(item)
    else:
        for field in dataclasses.fields(value):
            object.__setattr__(ours, field.name, copied(getattr(value, field.name)))
    return ours


def unlike(output: Any, x: Tensor) -> str | None:
    """What a network returned in place of a tensor like x, and the remedy."""
    if isinstance(output, Tensor):
        odd = [str(output.layout).removeprefix("torch.")] * (output.layout != torch.strided)
        odd += [str(output.dtype).removeprefix("torch.")] * output.is_quantized
        odd += [f"on {output.device}"] * (output.device != x.device)
        if odd:
            return f"a tensor that is {', '.join(odd)}; it must return a dense one on {x.device}, like x"
        if output.shape == x.shape and not output.is_complex():
            return None
        said = f"a tensor of shape {list(output.shape)} for x of shape {list(x.shape)}; it must return one like x"
        if output.is_complex():
            return f"complex numbers, {output.dtype}; it must return real ones like x, as output.real"
        doubled = output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        return said + f", without a variance half: return output[:, :{x.shape[1]}]" * doubled
    said = f"a {type(output).__name__}; it must return a tensor like x"
    if isinstance(output, (tuple, list)):
        found = [f"output[{i}]" for i, item in enumerate(output) if isinstance(item, Tensor)]
    else:
        names = [*getattr(output, "__dict__", ()), *getattr(output, "__dataclass_fields__", ())]
        found = [f"output.{name}" for name in names if isinstance(getattr(output, name, None), Tensor)]
        if isinstance(output, Mapping):
            found += [f"output[{name!r}]" for name, item in output.items() if isinstance(item, Tensor)]
    return said + (f", as {found[0]}" if found else "")


def remedy_of(error: BaseException, network: nn.Module, arguments: str) -> str:
    """What to do about an exception of a network, where those of torch and Python do not say it."""
    if f"{type(network).__name__}.forward()" in str(error):
        return f"; it is called as network({arguments})"
    if "require grad" in str(error) or "Inference tensors" in str(error):
        return "; take gradients of a clone of x, under torch.inference_mode(False) and torch.enable_grad()"
    others = {p.dtype for p in network.parameters() if p.is_floating_point()} - {torch.float32}
    named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
    return f"; x and t are float32, and its weights {named}: give Model network.float()" if others else ""


def place_of(network: nn.Module) -> str:
    """The user's file and line of a network's forward, as messages end."""
    code = getattr(network.forward, "__code__", None)
    return (
        f" ({code.co_filename}, line {code.co_firstlineno})" if code and not installed(Path(code.co_filename)) else ""
    )


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
