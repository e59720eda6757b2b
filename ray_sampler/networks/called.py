"""A user's network as it is called, and what is said where it gives something else than it should."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ray_sampler.errors import RunError
from ray_sampler.networks.family import DTYPES, Precision
from ray_sampler.networks.state import remember, twin
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
                output = self.network(x.clone(), t.clone(), *labels, *more, **named)
            except (Exception, SystemExit) as error:
                said = brief(error, place_of(self.network)) + remedy_of(
                    error, self.network, "x, t" + ", y" * bool(labels)
                )
                raise RunError(f"the network of --model raised {said}") from error
        if self.checked:
            wrong = unlike(output, x)
            if wrong:
                raise RunError(f"the network of --model returned {wrong}{place_of(self.network)}")
        return output.to(torch.float32, copy=True) if isinstance(output, Tensor) else output

    def _rows(self, y: Tensor) -> Tensor:
        """One-hot rows (B, num_classes) float32; any label past the classes is the null label, a row of zeros."""
        return F.one_hot(y.clamp(max=self.num_classes), self.num_classes + 1)[:, : self.num_classes].float()


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
