"""Weights from a path or URL into a network, without running code that a checkpoint may hold."""

from __future__ import annotations

import hashlib
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ray_sampler.config import Architecture, Precision, RequestError, redact, require
from ray_sampler.models.presets import BUNDLED
from ray_sampler.models.unet import UNet

SUFFIXES = (".pt", ".pth", ".safetensors")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAMED = 3
"""How many offending tensors an error names."""

State = dict[str, Tensor]


def open_weights(weights: str) -> State:
    """The state dict of a bundled model's name, or of a path or URL; see `load_checkpoint`."""
    if weights not in BUNDLED:
        return load_checkpoint(weights)
    with as_file(files("ray_sampler.models") / "digits" / BUNDLED[weights].file) as path:
        return load_checkpoint(str(path))


def load_checkpoint(url: str) -> State:
    """The tensors of a checkpoint, on the CPU, by state-dict name, as they are stored.

    A local file is memory-mapped; a remote one is fetched once, to a temporary file. The file holds the
    state dict itself, or one under the key "state_dict".

    Args:
        url: a .pt, .pth or .safetensors file: a local path or any fsspec URL.

    Raises:
        RequestError: there is no such file, it cannot be reached or read, or it is no checkpoint; a pickle
            that would run code is refused before any of it runs.
    """
    shown = str(redact(url))
    suffix = Path(shown).suffix.lower()
    require(
        suffix in SUFFIXES, f"--model is {shown!r}; its name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    )
    if "://" not in url:
        return _read(Path(url).expanduser(), suffix, shown)
    with tempfile.TemporaryDirectory() as folder:
        return _read(_fetch(url, Path(folder) / f"weights{suffix}", shown), suffix, shown)


def _fetch(url: str, target: Path, shown: str) -> Path:
    """A local copy of the file at `url`; a local one is taken where it is."""
    try:
        fs, path = fsspec.core.url_to_fs(url)
        if isinstance(fs, LocalFileSystem):
            return Path(path)
        info = fs.info(path)
        if info["type"] == "file":
            fs.get_file(path, str(target))
    except FileNotFoundError:
        raise RequestError(f"--model is {shown}; no such file can be reached") from None
    except Exception as error:  # each filesystem has exceptions of its own
        # The address may be spelled anew in it, signature and all: %2F becomes a slash.
        said = re.sub(r"[\w+.-]+://[^\s'\"]+", shown, str(error).replace(url, shown))
        reason = said.strip().partition("\n")[0]
        raise RequestError(
            f"--model is {shown}; it cannot be read ({type(error).__name__}: {reason}); "
            "check its address and your credentials"
        ) from None
    require(info["type"] == "file", f"--model is {shown}, a directory; name the checkpoint file in it")
    size = info.get("size")
    require(
        size is None or target.stat().st_size == size,
        f"--model is {shown}; only {target.stat().st_size} of its {size} bytes arrived; try again",
    )
    return target


def _read(path: Path, suffix: str, shown: str) -> State:
    require(not path.is_dir(), f"--model is {shown}, a directory; name the checkpoint file in it")
    require(path.exists(), f"--model is {shown}; there is no such file")
    try:
        content = load_file(path) if suffix == ".safetensors" else _unpickle(path)
    except PermissionError as error:
        raise RequestError(f"--model is {shown}; it cannot be read ({error.strerror})") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes lead a parser to any exception
        refused = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        require(
            refused is None,
            f"--model is {shown}; loading it would run code ({refused and refused[1]}), so it is refused; "
            "save its state dict alone, with safetensors or torch.save(model.state_dict(), ...)",
        )
        raise RequestError(f"--model is {shown}; it is truncated, damaged, or no {suffix} checkpoint") from error
    return _state_dict(content, shown)


def _unpickle(path: Path) -> Any:
    with path.open("rb") as file:
        mappable = file.read(4) == b"PK\x03\x04"  # checkpoints of before PyTorch 1.6 are not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of, it refuses
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)


def _state_dict(content: Any, shown: str) -> State:
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    dense = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        for name, value in content.items()
    )
    require(
        dense and bool(content),
        f"--model is {shown}; it must hold a state dict, that is tensors by name, alone or under the key 'state_dict'",
    )
    return {name: value.detach() for name, value in content.items()}


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256, as 64 hexadecimal digits, of the names, dtypes, shapes and bytes of all tensors, sorted by name.

    The same tensors give the same hash from whatever file they come.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fit(state: Mapping[str, Tensor], arch: Architecture, precision: Precision) -> State:
    """`state` as a network of `arch` needs it: torso convolutions in `precision`, all else float32, contiguous.

    Raises:
        RequestError: names or shapes are not those of `arch`; names the first of them, and the flag where
            the checkpoint itself tells its value.
    """
    wanted = _empty_network(arch, precision).state_dict()
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    mismatched = [
        f"{name} {list(state[name].shape)} in place of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
        if names
    ]
    if problems:
        hints = _hints(state, arch)
        advice = (
            f"the checkpoint asks for {' '.join(hints)}" if hints else "check the architecture flags, or give --preset"
        )
        raise RequestError(f"--model does not fit the architecture: of its tensors, {', '.join(problems)}; {advice}")
    for name in wanted:
        kind = state[name].dtype
        require(kind.is_floating_point, f"--model has {name} as {kind}; weights must be floating-point numbers")
    return {name: state[name].to(tensor.dtype).contiguous() for name, tensor in wanted.items()}


def _hints(state: Mapping[str, Tensor], arch: Architecture) -> list[str]:
    """Flags, with values, that the checkpoint's own tensors show and `arch` has otherwise."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    shown: dict[str, Any] = {}
    if "input_blocks.0.0.weight" not in shapes or len(shapes.get("time_embed.0.weight", ())) != 2:
        return []  # of another family
    shown["num_channels"] = shapes["time_embed.0.weight"][1]
    classes = shapes.get("label_emb.weight")
    shown["class_cond"] = classes is not None
    if classes is not None:
        shown["num_classes"] = classes[0]
    embedding, convolution = (shapes.get(f"input_blocks.1.0.{name}.weight") for name in ("emb_layers.1", "in_layers.2"))
    if embedding and convolution:
        shown["use_scale_shift_norm"] = embedding[0] == 2 * convolution[0]
    if any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name) for name in shapes):
        shown["resblock_updown"] = False
    return [f"--{name} {value}" for name, value in shown.items() if value != getattr(arch, name)]


def build(arch: Architecture, state: Mapping[str, Tensor], precision: Precision, device: torch.device | str) -> UNet:
    """The network of `arch` with the weights of `state` (from `fit`) on `device`, ready to sample.

    Tensors are copied one by one, and not where they are as the network needs them: then they may be shared memory,
    and must not be written to. Channels last, in evaluation mode, without gradients.
    """
    network = _empty_network(arch, precision)
    placed = {
        name: state[name].to(
            device,
            empty.dtype,
            memory_format=torch.channels_last if empty.dim() == 4 else torch.contiguous_format,
        )
        for name, empty in network.state_dict().items()
    }
    network.load_state_dict(placed, assign=True)
    network.requires_grad_(False).eval()
    return network


class _Uninitialised(TorchFunctionMode):
    """Layers are made without their first random weights: those of a network without memory take a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _empty_network(arch: Architecture, precision: Precision) -> UNet:
    """A network without memory for its weights."""
    with torch.device("meta"), _Uninitialised():
        return UNet(arch).convert_torso(DTYPES[precision])
