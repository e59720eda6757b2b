"""Weights from a path or URL into a network, without running code that a checkpoint may hold."""

from __future__ import annotations

import hashlib
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor

from ray_sampler.errors import RequestError, redact, require

SUFFIXES = (".pt", ".pth", ".safetensors")
State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    tensors: State
    key: str = ""
    note: str | None = None
    shown: str = ""
    sha256: str | None = None
    saved: Any = None


def read_checkpoint(url: str, key: str | None = None) -> Checkpoint:
    return Checkpoint(load_checkpoint(url), shown=str(redact(url)))


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
