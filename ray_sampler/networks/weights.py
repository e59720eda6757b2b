"""The weights of a checkpoint, from whatever file people have, without running anything in it.

The content of a file decides what it is, never its name. Each file is read once, from one descriptor, into memory of
this process, so the tensors that are hashed are the tensors that are used, whatever happens to the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ray_sampler.errors import RequestError, redact
from ray_sampler.networks import nvidia
from ray_sampler.networks.choose import Part, WrongKey, choose, listed
from ray_sampler.networks.formats import Entry, Odd, Stored, content_of, load
from ray_sampler.networks.inert import Refused
from ray_sampler.networks.sources import Folder, Source, open_source

HEAD = 2**16
NAMED = 3
"""How many offending tensors an error names."""
MAX_INDEX = 2**25
MAX_PARTS = 500
PART = re.compile(r"(\d{5})-of-(\d{5})\.\w+$")
INDEX = ".index.json"
FROM_PRETRAINED = (
    "give --model python:my_unet:load --weights FOLDER, where load returns a Model of what "
    "UNet2DModel.from_pretrained(FOLDER) gives: docs/models.md has its lines, under A network of diffusers"
)
"""What to do with a network of diffusers."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read from a file."""

    tensors: dict[str, Tensor] = field(repr=False)
    """The weights: floating-point numbers on the CPU, in the dtype in which they are stored, by canonical name: without
    the prefixes of wrappers (DataParallel, torch.compile, Lightning, averages). Empty for a snapshot of NVIDIA's."""
    key: str
    """Where in the file they were, as in "ema" or "state_dict.model_ema"; "" is the top level."""
    note: str | None
    """A sentence for the user where a choice was made."""
    shown: str
    """The path or URL, without credentials."""
    sha256: str | None = None
    """Of the file, in hexadecimal digits, where it came over a network or that was asked for."""
    saved: Any = None
    """The networks of a snapshot of NVlabs/edm or NVlabs/edm2, by key."""


def read_checkpoint(url: str, key: str | None = None, flag: str = "--model", with_sha256: bool = False) -> Checkpoint:
    """The weights in the file at a path, a pipe or any fsspec URL, or in a directory with an index of its parts.

    It reads what torch.save writes (zip or older), safetensors, plain pickles, and snapshots of NVlabs/edm and edm2.
    Objects beside the weights are ignored: no name in the file is imported, looked up or called.

    Args:
        key: where in the file the weights are, with dots. By default an exponential moving average is taken where there
            is one, else the state dict.
        flag: that named the file, for messages.
        with_sha256: of a file of this machine too.

    Raises:
        RequestError: there is no such file, it cannot be read, or holds no weights; one sentence says what it is and
            what to do.
    """
    shown = str(redact(url))
    with open_source(url, flag) as found:
        try:
            if isinstance(found, Folder):
                return _folder(found, key, shown, flag)
            head = _head(found)
            if head.lstrip()[:1] == b"{" and b'"weight_map"' in head and found.size <= MAX_INDEX:
                return _indexed(found.file.read(MAX_INDEX), url.rpartition("/")[0] or ".", key, shown, flag)
            return _file(found, head, key, shown, with_sha256)
        except Refused as error:
            if isinstance(found, Source):
                found.discard()
            raise RequestError(f"{flag} is {shown}; {error}") from error
        except OSError as error:
            raise RequestError(f"{flag} is {shown}; it cannot be read ({error.strerror})") from error
        except WrongKey as error:
            raise RequestError(f"--weights_key is {key!r}; {error}; the file is {shown}") from None


def _head(source: Source) -> bytes:
    head = source.file.read(HEAD)
    source.file.seek(0)
    return head


def _file(source: Source, head: bytes, key: str | None, shown: str, with_sha256: bool) -> Checkpoint:
    part = PART.search(re.split(r"[?#]", shown)[0])
    if part and int(part[2]) > 1:
        raise Refused(
            f"by its name it is part {int(part[1])} of {int(part[2])} of a checkpoint; "
            "name the folder that holds all parts and their index (*.index.json)"
        )
    digest = source.sha256() if source.fetched or with_sha256 else None
    if nvidia.looks_like_nvidia(head):
        saved = nvidia.read_pickle(source.file)
        taken = key if key is not None else "ema" if "ema" in saved else next(iter(saved))
        if taken not in saved:
            raise WrongKey(f"the file has networks under {', '.join(map(repr, saved))}")
        _require_finite({name: t for name, t in saved[taken].tensors.items() if t.is_floating_point()})
        return Checkpoint({}, taken, source.note, shown, digest, saved)
    chosen = choose(content_of(source.file, head), key)
    notes = [note for note in (_note(chosen) if key is None else None, source.note) if note]
    return Checkpoint(_loaded(chosen.tensors), chosen.key, "; ".join(notes) or None, shown, digest)


def _note(chosen: Part) -> str | None:
    if chosen.others:
        others = ", ".join(listed(other) for other in chosen.others)
        return f"took the weights under {listed(chosen.key)}; the file also has {others}; --weights_key chooses"
    return None if chosen.obvious else f"took the weights under {listed(chosen.key)}"


def _loaded(entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """The floating-point tensors, read and checked; others that are not weights are left out."""
    odd = [f"{_shown(name)} as {entry.what}" for name, entry in entries.items() if isinstance(entry, Odd)]
    if odd:
        raise Refused(
            f"it has {', '.join(odd[:NAMED])}{', ...' if len(odd) > NAMED else ''}; "
            "save the weights as ordinary dense tensors"
        )
    stored = {name: entry for name, entry in entries.items() if isinstance(entry, Stored)}
    whole = [
        f"{_shown(name)} as {str(entry.like.dtype).removeprefix('torch.')}"
        for name, entry in stored.items()
        if not entry.like.dtype.is_floating_point and name.rpartition(".")[2] in ("weight", "bias")
    ]
    floats = {name: entry for name, entry in stored.items() if entry.like.dtype.is_floating_point}
    if whole or not floats:
        what = ", ".join(whole[:NAMED]) or "no floating-point tensors"
        raise Refused(f"it has {what}; weights must be floating-point numbers, so save them before they are quantised")
    if any(name.startswith(("down_blocks.", "transformer_blocks.")) for name in floats):
        raise Refused(
            "its names are those of a network in a pipeline of diffusers (such as "
            f"{_shown(next(name for name in floats if name.startswith(('down_blocks.', 'transformer_blocks.'))))}), "
            f"which is sampled through a function of your own: {FROM_PRETRAINED}"
        )
    empty = sum(0 in entry.like.shape for entry in floats.values())
    if 2 * empty > len(floats):
        raise Refused(
            "most of its tensors are empty: it is one part of a sharded checkpoint; consolidate the parts first"
        )
    for name in floats:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise Refused("it is damaged: the name of a tensor is not text") from None
    tensors = load(floats)
    _require_finite(tensors)
    return tensors


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        named = ", ".join(_shown(name) for name in bad[:NAMED])
        raise Refused(
            f"{len(bad)} of its {len(tensors)} tensors have values that are not finite ({named}"
            f"{', ...' if len(bad) > NAMED else ''}); take a checkpoint from before the training diverged"
        )


def _finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The extremes are found in one pass, and are NaN where one value is."""
    if not tensor.numel():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.half()  # which has every value of the types of 8 bits
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _shown(name: str) -> str:
    text = ascii(name)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}..."


def _folder(folder: Folder, key: str | None, shown: str, flag: str) -> Checkpoint:
    indices = sorted(name for name in folder.names if name.endswith(INDEX))
    if len(indices) == 1:
        with open_source(folder.join(indices[0]), flag) as index:
            assert isinstance(index, Source)
            return _indexed(index.file.read(MAX_INDEX), folder.url, key, shown, flag)
    if "model_index.json" in folder.names:
        raise Refused(
            f"a directory with a pipeline of diffusers, which is not read; its network is sampled: {FROM_PRETRAINED}"
        )
    if "config.json" in folder.names and any(name.startswith("diffusion_pytorch_model") for name in folder.names):
        raise Refused(
            f"a directory with a network of diffusers, which is sampled through a function: {FROM_PRETRAINED}"
        )
    if ".metadata" in folder.names:
        raise Refused(
            "a directory of torch.distributed.checkpoint; make one file of it with "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE"
        )
    many = f"has {len(indices)} indices of parts" if indices else "has no index of parts (*.index.json)"
    raise Refused(f"a directory that {many}; name the checkpoint file in it")


def _indexed(index: bytes, folder: str, key: str | None, shown: str, flag: str) -> Checkpoint:
    """The tensors of all files that an index lists."""
    try:
        weight_map = json.loads(index)["weight_map"]
        wanted = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused("its index of parts is damaged") from error
    files = sorted(set(wanted.values()))
    outside = [file for file in files if not re.fullmatch(r"[\w.\-+ ]+", file) or file.startswith(".")]
    if outside or not files or len(files) > MAX_PARTS:
        raise Refused(
            f"its index lists {_shown(outside[0]) if outside else f'{len(files)} parts'}; it must name files beside it"
        )
    entries: dict[str, Entry] = {}
    notes = []
    with contextlib.ExitStack() as stack:
        for number, file in enumerate(files):
            source = stack.enter_context(
                open_source("/" + file if folder == "/" else f"{folder.rstrip('/')}/{file}", flag)
            )
            if not isinstance(source, Source):
                raise Refused(f"its part {_shown(file)} is a directory")
            part = content_of(source.file, _head(source))
            for name, entry in part.items() if isinstance(part, dict) else ():
                if wanted.get(name) == file and isinstance(entry, Stored | Odd):
                    entries[name] = entry
                    if isinstance(entry, Stored):
                        entry.storage.part = number
            notes += [source.note] if source.note else []
        missing = [name for name in wanted if name not in entries]
        if missing:
            raise Refused(
                f"its parts lack {len(missing)} of the {len(wanted)} tensors in their index ({_shown(missing[0])})"
            )
        chosen = choose(entries, key)
        notes = [note for note in (_note(chosen) if key is None else None, *notes[:1]) if note]
        return Checkpoint(_loaded(chosen.tensors), chosen.key, "; ".join(notes) or None, shown)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, as 64 hexadecimal digits, of the names, dtypes, shapes and bytes of all tensors, sorted by name.

    The same tensors give the same hash from whatever file they come.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
