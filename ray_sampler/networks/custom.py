"""A user's own network: `--model python:package.module:function`, and the `Model` that the function returns."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ray_sampler.errors import RequestError, RunError, printable, require
from ray_sampler.networks.family import DTYPES, NAMED, PREFIX, Network, NetworkSpec, Precision, beside_user
from ray_sampler.networks.weights import weights_hash

PACKAGE = Path(__file__).resolve().parents[1]
DECODERS = (None, "sd", "edm2")


class Model:
    """A network of the user's own, with all that is needed to sample it.

    Args:
        network: called as network(x, t) or, with classes, network(x, t, y): x (B, C, H, W) float32, t (B,) float32, y
            (B,) int64; returns a tensor like x.
        kind: what it computes: "denoiser" (D itself, t is sigma), "edm", "consistency", "eps", "v", "x0", "velocity",
            or an object with the methods of `ray_sampler.sampling.parameterisation.Parameterisation`.
        shape: (C, H, W) of x.
        num_classes: 0 for an unconditional network.
        null_label: the label that stands for none, for guidance; None where the network knows none.
        sigma_min, sigma_max: the range of noise levels that is sampled by default; None: the ends of an alphas table,
            0.002 to 10,000 for flows (t from 0.0001 beside noise), else 0.002 to 80.
        decoder: None where x is a picture in [-1, 1]; "sd" or "edm2" where it is a latent of that rule.
        options: of the kind: c_noise ("log/4", "250log" or a function of sigma), alphas (a table), data_at (0 or 1),
            and one_hot (True where y is wanted as float rows, (B, num_classes), zero for the null label).

    Raises:
        RequestError: an argument is wrong. The name of a kind and its options are checked when the model is opened.
    """

    def __init__(
        self,
        network: nn.Module,
        kind: Any,
        shape: tuple[int, int, int],
        num_classes: int = 0,
        null_label: int | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: str | None = None,
        **options: Any,
    ) -> None:
        name = type(network).__name__
        require(isinstance(network, nn.Module), f"Model's network is of type {name}; it must be a torch.nn.Module")
        num_classes, null_label, sigma_min, sigma_max = map(plain, (num_classes, null_label, sigma_min, sigma_max))
        shape = tuple(map(plain, shape)) if isinstance(shape, (tuple, list)) else shape
        whole = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        require(whole, f"Model's shape is {shape!r}; it must be (C, H, W), three whole numbers above 0")
        require(
            type(num_classes) is int and num_classes >= 0,
            f"Model's num_classes is {num_classes!r}; it must be a whole number, 0 for an unconditional network",
        )
        require(
            null_label is None or (type(null_label) is int and null_label >= 0 and num_classes > 0),
            f"Model's null_label is {null_label!r} with num_classes {num_classes}; it must be a label of a network "
            "with classes, or None",
        )
        low, high = 1e-30 if sigma_min is None else sigma_min, 1e29 if sigma_max is None else sigma_max
        levels = all(isinstance(s, (int, float)) for s in (low, high)) and 0 < low < high < 1e30
        require(
            levels,
            f"Model's sigma_min is {sigma_min!r} and sigma_max {sigma_max!r}; they must satisfy "
            "0 < sigma_min < sigma_max",
        )
        require(
            isinstance(kind, str) or all(callable(getattr(kind, name, None)) for name in ("denoiser", "identity")),
            f"Model's kind is of type {type(kind).__name__}; it must be a name such as 'denoiser' or 'eps', or "
            "an object with the methods of a Parameterisation, denoiser and identity",
        )
        require(decoder in DECODERS, f"Model's decoder is {decoder!r}; it must be None, 'sd' or 'edm2'")
        self.network = network
        self.kind = kind
        self.shape = (shape[0], shape[1], shape[2])
        self.num_classes = num_classes
        self.null_label = null_label
        self.sigma_min = None if sigma_min is None else float(sigma_min)
        self.sigma_max = None if sigma_max is None else float(sigma_max)
        self.decoder = decoder
        self.one_hot = bool(options.pop("one_hot", False))
        self.options = options


@dataclass(frozen=True)
class CustomOptions:
    """What of a user's network is fingerprinted beside its weights and its kind."""

    name: str
    """module:function."""
    shape: tuple[int, int, int]
    num_classes: int
    one_hot: bool
    tag: str | None

    def identity(self) -> dict[str, Any]:
        result: dict[str, Any] = {"model": self.name, "shape": "x".join(map(str, self.shape))}
        if self.num_classes:
            result["num_classes"] = self.num_classes
        if self.one_hot:
            result["one_hot"] = True
        return result | ({"tag": self.tag} if self.tag else {})


class Called(nn.Module):
    """A user's network, called as all networks are: labels as it wants them, float32 out, in the run's precision."""

    def __init__(self, network: nn.Module, num_classes: int, one_hot: bool, precision: Precision) -> None:
        super().__init__()
        self.network = network
        self.num_classes = num_classes
        self.one_hot = one_hot
        self.dtype = DTYPES[precision]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Raises RunError: the network raises, or returns something unlike x, which arithmetic might take all the same.

        Memory that runs out is the cause of the error then.
        """
        half = self.dtype != torch.float32
        with torch.autocast(x.device.type, self.dtype if half else torch.bfloat16, enabled=half):
            labels = () if y is None else (self._rows(y) if self.one_hot else y,)
            try:
                output = self.network(x, t, *labels)
            except Exception as error:
                raise RunError(f"the network of --model raised {told(error)}") from error
        if not isinstance(output, Tensor):
            raise RunError(f"the network of --model returned a {type(output).__name__}; it must return a tensor like x")
        if output.shape != x.shape:
            raise RunError(
                f"the network of --model returned a tensor of shape {list(output.shape)} for x of shape "
                f"{list(x.shape)}; it must return one like x, without a variance half"
            )
        return output.float()

    def _rows(self, y: Tensor) -> Tensor:
        """One-hot rows (B, num_classes) float32; any label past the classes is the null label, a row of zeros."""
        return F.one_hot(y.clamp(max=self.num_classes), self.num_classes + 1)[:, : self.num_classes].float()


def open_custom(model: str, settings: Mapping[str, Any], given: frozenset[str]) -> Network:
    """The network that a user's function returns.

    Args:
        model: python:package.module:function.
        settings: by flag name; `weights` is passed to the function.
        given: names of the settings that the user gave.

    Raises:
        RequestError: there is no such function, it raises, or it returns something else; its weights are no finite
            numbers; a given setting contradicts it.
    """
    name, tag = model.removeprefix(PREFIX), settings.get("tag")
    made, module = call(name, settings.get("weights"))
    check_values(name, tensors_of(made.network))
    network = made.network.cpu().eval()
    tensors = tensors_of(network)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    spec = NetworkSpec(
        family="python",
        options=CustomOptions(name, made.shape, made.num_classes, made.one_hot, tag),
        shape=made.shape,
        kind=made.kind,
        kind_options=made.options,
        num_classes=made.num_classes,
        null_label=made.null_label,
        sigma_min=made.sigma_min,
        sigma_max=made.sigma_max,
        defaults={"clip_denoised": False, "rounding": "truncate", "state": "fp32"},
        latent=made.decoder,
    )
    spec.check_given({name: settings[name] for name in given})
    return Network(
        spec=spec,
        build=lambda precision: Called(network, made.num_classes, made.one_hot, precision),
        prepare=lambda module, precision: module,
        tensors={},
        weights=weights_hash(tensors),
        parameters=parameters,
        by_value=companions(module),
    )


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python has it, anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """What is hashed of a network."""
    return {name: tensor for name, tensor in network.state_dict().items() if isinstance(tensor, Tensor)}


def check_values(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises RequestError: a tensor has no values yet, or some that are not finite."""
    shown = f"--model is {PREFIX}{printable(name)}"
    empty = [key for key, tensor in tensors.items() if tensor.is_meta or is_lazy(tensor)]
    require(not empty, f"{shown}; its network has no values for {', '.join(empty[:NAMED])}; load its weights first")
    floats = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}
    bad = [key for key, t in floats.items() if not (t.float() if t.dtype.itemsize == 1 else t).isfinite().all()]
    require(not bad, f"{shown}; its network has values that are not finite, in {', '.join(bad[:NAMED])}")


def call(name: str, weights: str | None) -> tuple[Model, ModuleType]:
    """What the function `module:function` returns for a weights file, and its module.

    Raises:
        RequestError: as of `open_custom`.
    """
    shown = f"--model is {PREFIX}{printable(name)}"
    module_name, separator, function_name = name.partition(":")
    require(
        bool(module_name and separator and function_name.isidentifier()),
        f"{shown}; it must be of the form python:package.module:function",
    )
    with beside_user():
        return called(name, module_name, function_name, weights)


def called(name: str, module_name: str, function_name: str, weights: str | None) -> tuple[Model, ModuleType]:
    """As `call`, of a name that was read, with the user's folder on the path."""
    shown = f"--model is {PREFIX}{printable(name)}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise RequestError(f"{shown}; importing it failed: {told(error)}") from error
        raise RequestError(
            f"{shown}; there is no module {module_name!r} in the current directory or on PYTHONPATH"
        ) from error
    except (Exception, SystemExit) as error:
        raise RequestError(f"{shown}; importing it failed: {told(error)}") from error
    function = getattr(module, function_name, None)
    require(callable(function), f"{shown}; module {module_name!r} has no function {function_name!r}")
    try:
        made = function(weights)  # type: ignore[misc]  # checked to be callable
    except (Exception, SystemExit) as error:
        raise RequestError(f"{shown}; the function raised {told(error)}") from error
    require(
        isinstance(made, Model),
        f"{shown}; the function returned a {type(made).__name__}; it must return a ray_sampler.Model",
    )
    return made, module


def told(error: BaseException) -> str:
    """An exception in one line, with the file and line of the user's code where it came up."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
    frames = [f for f in frames if PACKAGE not in Path(f.filename).resolve().parents]
    own = [f for f in frames if not installed(Path(f.filename))] or frames
    if isinstance(error, SyntaxError) and error.filename:
        where = f" ({error.filename}, line {error.lineno})"
    else:
        where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    message = printable(" ".join(str(error).split()))
    return f"{type(error).__name__}: {message}{where}" if message else f"{type(error).__name__}{where}"


def companions(module: ModuleType) -> tuple[str, ...]:
    """The module, and those of its package or folder that are loaded: they travel by value to nodes that lack them.

    Its folder is where its outermost package is found.
    """
    package = module.__name__.partition(".")[0]
    folder = None
    if module.__file__:
        file = Path(module.__file__).resolve()
        folder = file.parents[module.__name__.count(".") + hasattr(module, "__path__")]
    names = []
    for name, loaded in list(sys.modules.items()):
        if not isinstance(loaded, ModuleType) or name.partition(".")[0] in ("ray_sampler", "__main__"):
            continue
        path = getattr(loaded, "__file__", None)
        beside = bool(path and folder and folder in Path(path).resolve().parents and not installed(Path(path)))
        if name == package or name.startswith(package + ".") or beside:
            names.append(name)
    return tuple(names)


def installed(file: Path) -> bool:
    """Whether a module came with Python or a package manager."""
    parts = file.resolve().parts
    return "site-packages" in parts or "dist-packages" in parts or Path(sys.base_prefix) in file.resolve().parents
