"""What a family of networks is, what describes one network, and the module that becomes of a checkpoint."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ray_sampler.errors import RequestError, require
from ray_sampler.networks.families import ARCHITECTURE
from ray_sampler.networks.weights import Checkpoint

Precision = Literal["fp32", "fp16", "bf16"]
Script = Literal["consistency-models", "edm", "edm2"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PREFIX = "python:"
"""Of a model that is a user's own function, python:package.module:function."""

DESCRIBING = (*(name for name in ARCHITECTURE if name != "dropout"), "weights_key")
"""Flags of a network that decide its samples."""

NAMED = 3
"""How many offending tensors an error names."""


class Parameterisation(Protocol):
    """What a network computes."""

    def denoiser(self, network: Any, y: Tensor | None, /) -> Any:
        """D of a network and the condition of a batch: called with x (B, C, H, W) and sigma (B,), it gives x_0."""
        ...

    def identity(self) -> dict[str, Any]:
        """What of it decides a sample, as JSON values."""


class Decodes(NamedTuple):
    """What a decoder makes of latents."""

    channels: int
    """Of a latent."""
    factor: int
    """Pixels in a row for each of a latent."""
    pictures: int
    """Channels of a picture: 1 or 3."""
    scaling: float = 1.0
    shift: float = 0.0
    """By which latents were scaled for their network: x = (z - shift) scaling."""


@dataclass(frozen=True)
class NetworkSpec:
    """One network without its tensors."""

    family: str
    options: Any
    """The family's own dataclass; it has `identity()`, what decides the network's function, flat."""
    shape: tuple[int, int, int]
    """(C, H, W) of x."""
    kind: Any
    """What it computes: a kind of `sampling.parameterisation`, or a parameterisation."""
    kind_options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 0
    """0: unconditional."""
    null_label: int | None = None
    """The null label (no class); None where the network has none."""
    sigma_min: float | None = 0.002
    sigma_max: float | None = 80.0
    """The range of levels that is sampled by default; None: its kind's."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Settings that the family or the file brings, by flag name."""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """Its architecture by flag name, beyond its size and classes, where the family has flags for it."""
    unlabelled_hint: str = ""
    """What else could be done where labels are asked for, and the network takes none; follows a remedy."""
    condition: str = "labels"
    """What it is given of each sample beside x and the time, by the name of a condition."""
    latent: str | None = None
    """The rule by which x becomes a picture (sd, edm2); None where x is a picture."""
    autoencoder: tuple[int, float | None] | None = None
    """Of latents: pixels in a row for each, and the scaling factor where it is used, as published."""
    lacks: str = ""
    """What must be given before it can be sampled, as a sentence; empty where that is nothing."""
    decodes: Decodes | None = None
    """Of a decoder: what it makes of latents. It is called as network(z) and returns pictures, both (B, C, H, W)."""
    script: Script = "consistency-models"
    """Whose script's arithmetic is followed to the last bit, so that published pictures come out again."""

    @property
    def architecture(self) -> dict[str, Any]:
        """What flags can say of it, by name."""
        told = {
            "image_size": self.shape[1],
            "class_cond": self.num_classes > 0,
            "num_classes": self.num_classes or None,
        }
        return told | dict(self.flags)

    @property
    def brought(self) -> dict[str, Any]:
        """The defaults that its family or file brings, by flag name, beside the range of levels."""
        return dict(self.defaults)

    def identity(self, weights: str) -> dict[str, Any]:
        """What decides the network's function, flat; `weights` is its hash."""
        family = {} if self.family == "adm" else {"family": self.family}
        return family | {"weights": weights} | dict(self.options.identity())

    def told(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """What the file says, by flag name: the size and the classes beside `more`."""
        side = self.shape[1]
        told = {
            "image_size": Told(str(side), lambda n: n == side or (self.latent is not None and n % side == 0)),
            "class_cond": self.num_classes > 0,
        }
        return told | ({"num_classes": self.num_classes} if self.num_classes else {}) | dict(more)

    def check_given(self, given: Mapping[str, Any], more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Check settings that the user gave against those of the file; repeating them is allowed.

        Args:
            more: of the file, by flag name, beside the size and the classes: a value, or one with another way to
                compare.

        Raises:
            RequestError: one contradicts it, or is for networks of another family.
        """
        told = self.told(more)
        decided = {"num_heads", "num_heads_upsample"} if given.get("num_head_channels", -1) > 0 else set()
        decided |= {"num_classes"} if self.num_classes == given.get("num_classes") else set()  # 0 of both too
        checked = {name: given[name] for name in DESCRIBING if name in given and name not in decided}
        for name, value in checked.items():
            require(name in told, f"--{name} is {value}, which this network cannot use; leave it out")
        for contradiction in contradictions(checked, told):
            raise RequestError(f"{contradiction}; leave it out or give another --model")


class Told(NamedTuple):
    """A setting of the file that several values of a flag match."""

    shown: str
    says: Callable[[Any], bool]


def contradictions(settings: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """What is to be said of each setting that is not what the file says, in the order of the settings."""
    known = {name: (value, told[name]) for name, value in settings.items() if name in told}
    return [
        f"--{name} is {'empty' if value == '' else value}, "
        f"but the file says {here.shown if isinstance(here, Told) else here}"
        for name, (value, here) in known.items()
        if not (here.says(value) if isinstance(here, Told) else value == here)
    ]


class Opened(NamedTuple):
    """What a family makes of a checkpoint."""

    spec: NetworkSpec
    tensors: dict[str, Tensor]
    """By the module's names, as stored, all of them fitting."""
    parameters: int | None = None
    """Of the file's network, used in sampling or not; None: all of `tensors`."""
    note: str | None = None
    """What the user should know of what was assumed."""
    untold: Mapping[str, str] = MappingProxyType({})
    """Flags whose values neither the file nor the settings determine, with a placeholder for each."""


def as_it_is(module: nn.Module, precision: Precision) -> nn.Module:
    """What most families do with a loaded network: nothing."""
    return module


@dataclass(frozen=True)
class Family:
    """How networks of one kind are told, described and built."""

    name: str
    recognises: Callable[[Checkpoint], bool]
    open: Callable[[Checkpoint, Mapping[str, Any], frozenset[str]], Opened]
    """(checkpoint, settings by flag name, which of them the user gave) -> what it is.

    Raises RequestError where a given setting contradicts the file."""
    build: Callable[[NetworkSpec, Precision], nn.Module]
    """The module under torch.device("meta"); dtypes and layout of its tensors say how they are shipped."""
    prepare: Callable[[nn.Module, Precision], nn.Module] = as_it_is
    """What a worker does once, after the tensors are on its device."""
    as_stored: bool = False
    """Whether tensors are shipped in the dtypes of the file, and not in those of the built module."""


@dataclass
class Network:
    """An opened network: its description, and the tensors that are hashed and shipped."""

    spec: NetworkSpec
    build: Callable[[Precision], nn.Module]
    """The module in a precision, without memory unless a user made it."""
    prepare: Callable[[nn.Module, Precision], nn.Module]
    tensors: dict[str, Tensor]
    """By the module's names, as stored. Whoever ships them takes them out one by one."""
    weights: str
    """SHA-256 of the tensors."""
    parameters: int
    """Of the file's network, used in sampling or not."""
    key: str = ""
    """Where in the file the tensors were found."""
    note: str | None = None
    """What the user should know of how the file was read."""
    untold: Mapping[str, str] = field(default_factory=dict)
    """Flags whose values neither the file nor the settings determine, with a placeholder for each."""
    sha256: str | None = None
    """Of a file that was fetched."""
    as_stored: bool = False
    """Whether the tensors keep their dtypes on the way, and `prepare` casts them."""
    own: bool = False
    """Whether its code is the user's."""
    by_value: tuple[str, ...] = ()
    """Names of modules that travel with the network, as other nodes lack their files."""
    source: Mapping[str, str] = field(default_factory=dict)
    """Hashes of the source of the user's modules, by file."""
    remakes: tuple[Callable[[Precision], nn.Module], ...] = ()
    """Ways to call the user's function, for a worker to which the network could not be sent."""


def without_memory(build: Callable[[], nn.Module]) -> nn.Module:
    """A module on the device meta, without gradients and in evaluation mode."""
    with torch.device("meta"), _Uninitialised():
        return build().requires_grad_(False).eval()


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], advice: str) -> None:
    """Check that tensors have the names and shapes of a module, and are floating-point numbers.

    Raises:
        RequestError: they do not; ends in `advice`.
    """
    problems = misfits(module, tensors)
    require(not problems, f"--model does not match the architecture: of its tensors, {', '.join(problems)}; {advice}")
    for name in module.state_dict():
        kind = tensors[name].dtype
        require(kind.is_floating_point, f"--model has {name} as {kind}; weights must be floating-point numbers")


def misfits(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Which tensors a module lacks, has not, or has in another shape; one phrase for each kind of problem."""
    wanted = module.state_dict()
    mismatched = [
        f"{name} {list(tensors[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    kinds = (
        ("missing", [name for name in wanted if name not in tensors]),
        ("unexpected", [name for name in tensors if name not in wanted]),
        ("of another shape", mismatched),
    )
    return [
        f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
        for what, names in kinds
        if names
    ]


def lay_out_contiguously(module: nn.Module) -> None:
    """Lay out tensors without memory in the order of their dimensions; a user's, which have memory, stay."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.is_meta and not parameter.is_contiguous():
                setattr(owner, name, nn.Parameter(parameter.contiguous(), requires_grad=False))


class _Uninitialised(TorchFunctionMode):
    """Layers are made without their first random weights: those of a network without memory take a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def beside_user() -> Iterator[None]:
    """Find modules in the current directory too, as a script does, wherever code of the user's runs in this process.

    Afterwards the path is as it was, but for what the user's own code did to it. Ray has actors look there anyway, so
    that a network's forward may import a module when it is first called.
    """
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        with redirect_stdout(sys.stderr):  # what a command prints is for other programs
            yield
    finally:
        if added:
            with suppress(ValueError):  # the user's code took it away
                sys.path.remove(here)
