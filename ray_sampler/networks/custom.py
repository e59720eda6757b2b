"""A user's own network: `--model python:package.module:function`, and the `Model` that the function returns."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ray_sampler.errors import RequestError, printable, require
from ray_sampler.networks.called import Called, twin
from ray_sampler.networks.families import OWN_DEFAULTS
from ray_sampler.networks.family import (
    NAMED,
    PREFIX,
    Network,
    NetworkSpec,
    Parameterisation,
    Precision,
    as_it_is,
    beside_user,
)
from ray_sampler.networks.user_code import brief, function_of, travelling
from ray_sampler.networks.weights import weights_hash
from ray_sampler.presets import model_name

__all__ = ["Called", "Model", "open_custom"]

DECODERS = (None, "sd", "edm2")
KINDS = "denoiser, edm, consistency, eps, v, x0, velocity"
MEANT = {
    **dict.fromkeys(("epsilon", "noise", "eps_prediction"), "eps"),
    **dict.fromkeys(("v_prediction", "vpred", "v_pred"), "v"),
    **dict.fromkeys(("sample", "x_start", "xstart", "x_0", "data"), "x0"),
    **dict.fromkeys(("flow", "flow_matching", "flow_prediction", "rectified_flow", "vector_field"), "velocity"),
    **dict.fromkeys(("d", "denoised"), "denoiser"),
}
"""What other programs call kinds."""


class Model:
    """A network of the user's own, with all that is needed to sample it.

    Args:
        network: called as network(x, t) or, with classes, network(x, t, y): x (B, C, H, W) float32, t (B,) float32, y
            (B,) int64; returns a tensor like x.
        kind: what it computes: "denoiser" (D itself, t is sigma), "edm", "consistency", "eps", "v", "x0", "velocity",
            or an object with the methods of `ray_sampler.sampling.parameterisation.Parameterisation`.
        shape: (C, H, W) of x.
        num_classes: 0 for an unconditional network.
        null_label: the label for "no class", for guidance; None where the network has none.
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
        kind: str | Parameterisation | None = None,
        shape: tuple[int, int, int] | None = None,
        num_classes: int = 0,
        null_label: int | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        decoder: str | None = None,
        **options: Any,
    ) -> None:
        name = type(network).__name__
        require(isinstance(network, nn.Module), f"Model's network is of type {name}; it must be a torch.nn.Module")
        check_kind(kind)
        num_classes, null_label, sigma_min, sigma_max = map(plain, (num_classes, null_label, sigma_min, sigma_max))
        shape = tuple(map(plain, shape)) if isinstance(shape, (tuple, list)) else shape
        whole = isinstance(shape, (tuple, list)) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
        require(whole, f"Model's shape is {shape!r}; it must be (C, H, W), three whole numbers above 0")
        require(
            type(num_classes) is int and num_classes >= 0,
            f"Model's num_classes is {num_classes!r}; it must be a whole number, 0 for an unconditional network",
        )
        require(
            null_label is None or (type(null_label) is int and 0 <= null_label < 2**31 and num_classes > 0),
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
        require(decoder in DECODERS, f"Model's decoder is {decoder!r}; it must be None, 'sd' or 'edm2'")
        assert shape is not None, "checked above"
        self.network = network
        self.kind = kind
        self.shape = (shape[0], shape[1], shape[2])
        self.num_classes = num_classes
        self.null_label = null_label
        self.sigma_min = None if sigma_min is None else float(sigma_min)
        self.sigma_max = None if sigma_max is None else float(sigma_max)
        self.decoder = decoder
        one_hot = plain(options.pop("one_hot", False))
        require(
            isinstance(one_hot, int) and one_hot in (0, 1), f"Model's one_hot is {one_hot!r}; it must be True or False"
        )
        self.one_hot = bool(one_hot)
        self.options = options


def check_kind(kind: Any) -> None:
    """Raises RequestError: it is neither the name of a kind nor a parameterisation."""
    require(
        kind is not None and not isinstance(kind, tuple | list),
        f"Model's kind is missing; give what the network computes, as Model(network, 'eps', shape): one of {KINDS}",
    )
    spelled = re.sub(r"[\s-]", "_", kind.strip().lower()) if isinstance(kind, str) else ""
    meant = MEANT.get(spelled, spelled if spelled in KINDS.split(", ") else kind)
    require(meant == kind, f"Model's kind is {kind!r}; {meant!r} is probably meant; it must be one of {KINDS}")
    of_class = getattr(kind, "__name__", "") if isinstance(kind, type) else ""
    require(not of_class, f"Model's kind is the class {of_class}; give an object of it, {of_class}()")
    require(
        isinstance(kind, str) or all(callable(getattr(kind, name, None)) for name in ("denoiser", "identity")),
        f"Model's kind is of type {type(kind).__name__}; it must be a name such as 'denoiser' or 'eps', or "
        "an object with the methods of a Parameterisation, denoiser and identity",
    )


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


def open_custom(model: Any, settings: Mapping[str, Any], given: frozenset[str]) -> Network:
    """The network that a user's function returns.

    Args:
        model: python:package.module:function, or that function, or what it returns.
        settings: by flag name; `weights` is passed to the function.
        given: names of the settings that the user gave.

    Raises:
        RequestError: there is no such function, it raises, or it returns something else; its weights are not finite
            numbers; a given setting contradicts it.
    """
    weights, tag = settings.get("weights"), settings.get("tag")
    shown = f"--model is {printable(model_name(model))}"
    function, made = called(model, weights)
    tensors = tensors_of(made.network, shown)
    check_values(shown, tensors)
    kinds = [type(module) for module in made.network.modules()]
    name = model.removeprefix(PREFIX) if isinstance(model, str) else model_name(kinds[0])
    home = name.partition(":")[0] if isinstance(model, str) else None
    by_value, source = travelling(home, [function, *kinds, type(made.kind), *made.options.values()])
    network = made.network.cpu() if made is not model else twin(made.network, torch.device("cpu"))
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
        defaults=OWN_DEFAULTS,
        latent=made.decoder,
    )
    spec.check_given({name: settings[name] for name in given})
    here = os.path.abspath(weights) if weights and os.path.exists(weights) else weights
    return Network(
        spec=spec,
        build=partial(wrapped, made, network),
        prepare=as_it_is,
        tensors={},
        weights=weights_hash(tensors),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        note=note_of(made),
        own=True,
        by_value=by_value,
        source=source,
        remakes=() if function is made else tuple(partial(remade, each, here) for each in (function, model)),
    )


def note_of(made: Model) -> str | None:
    """What the user should know of a Model whose null label is one of the classes that are sampled."""
    if made.null_label is None or made.null_label >= made.num_classes:
        return None
    instead = f"; if there are {made.null_label} beside it, give num_classes={made.null_label}"
    return (
        f"Model's null_label {made.null_label} is one of its {made.num_classes} classes, so that samples of that label "
        f"are of none{instead if made.null_label == made.num_classes - 1 > 0 else ''}"
    )


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python has it, anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def called(model: Any, weights: str | None) -> tuple[Any, Model]:
    """A user's function, given or named, and what it returns for a weights file; a Model is taken as it is.

    Raises:
        RequestError: there is no such function, it raises, or returns something else.
    """
    shown = f"--model is {printable(model_name(model))}"
    with beside_user():
        function = function_of(model.removeprefix(PREFIX)) if isinstance(model, str) else model
        try:
            made = function if isinstance(function, Model) else function(weights)
        except (Exception, SystemExit) as error:
            raise RequestError(f"{shown}; the function raised {brief(error)}") from error
    require(
        isinstance(made, Model),
        f"{shown}; the function returned a {type(made).__name__}; it must return a ray_sampler.Model",
    )
    return function, made


def wrapped(made: Model, network: nn.Module, precision: Precision) -> Called:
    """A user's network as all networks are called."""
    return Called(network, made.num_classes, made.one_hot, precision, isinstance(made.kind, str)).eval()


def remade(model: Any, weights: str | None, precision: Precision) -> Called:
    """The network of a user's function or its name, on a worker to which it could not be sent."""
    _, made = called(model, weights)
    return wrapped(made, made.network.cpu(), precision)


def tensors_of(network: nn.Module, shown: str) -> dict[str, Tensor]:
    """What is hashed of a network: dense tensors by name, those of packed quantised layers too.

    Raises:
        RequestError: a tensor cannot be read as ordinary numbers; names it. Or state_dict raises.
    """
    found: dict[str, Tensor] = {}
    try:
        state = network.state_dict()
    except Exception as error:  # whatever the user's own raises
        raise RequestError(f"{shown}; its network's state_dict() raised {brief(error)}") from error
    for name, value in state.items():
        packed = value if isinstance(value, tuple) else ()
        parts = {f"{name}.{i}": part for i, part in enumerate(packed) if isinstance(part, Tensor) and part.is_quantized}
        for key, tensor in parts.items() if packed else {name: value}.items():
            if isinstance(tensor, Tensor):
                try:
                    found[key] = tensor if tensor.is_meta or is_lazy(tensor) else dense(tensor)
                except Exception as error:  # whatever torch raises for an unsupported tensor
                    kind = f"{str(tensor.dtype).removeprefix('torch.')}, {tensor.layout}"
                    raise RequestError(
                        f"{shown}; its tensor {key} ({kind}) cannot be read as numbers; make it a dense one"
                    ) from error
    return found


def dense(tensor: Tensor) -> Tensor:
    """A tensor as ordinary numbers side by side, whose bytes can be read."""
    tensor = tensor.detach()
    if tensor.is_nested:
        raise TypeError("its parts have no common shape")
    if tensor.is_quantized:
        return tensor.dequantize().cpu()
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).resolve_conj().resolve_neg().cpu()


def check_values(shown: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises RequestError: a tensor has no values yet, or some that are not finite."""
    empty = [key for key, tensor in tensors.items() if tensor.is_meta or is_lazy(tensor)]
    require(not empty, f"{shown}; its network has no values for {', '.join(empty[:NAMED])}; load its weights first")
    numbers = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
    bad = [key for key, t in numbers.items() if not (t.float() if t.dtype.itemsize == 1 else t).isfinite().all()]
    require(not bad, f"{shown}; its network has values that are not finite, in {', '.join(bad[:NAMED])}")
