"""Weights are found in every layout that people save, and what is none is said in one sentence."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash

State = dict[str, Tensor]


class Net(nn.Module):
    """Parameters, a buffer, and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 3))
        self.blocks = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False))


torch.manual_seed(0)
STATE: State = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
FLOATS: State = {name: tensor for name, tensor in STATE.items() if tensor.is_floating_point()}
OTHER: State = {name: tensor + 1 for name, tensor in STATE.items()}
PARAMETERS = [name for name, _ in Net().named_parameters()]


def prefixed(state: State, *prefixes: str) -> State:
    return {"".join(prefixes) + name: tensor for name, tensor in state.items()}


def lightning_ema(state: State) -> State:
    """As the LitEma of latent diffusion names its averages."""
    named = {f"model_ema.{name.replace('.', '')}": state[name] for name in PARAMETERS}
    return named | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


class Settings(argparse.Namespace):
    """Of a class of the user's own."""


class Attributes(dict[str, Any]):
    """A dictionary of a class of its own, as EasyDict."""


EXTRAS = {
    "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "args": argparse.Namespace(lr=np.float64(0.1), when=np.arange(3)),
    "cfg": Settings(a={(1, 2): {3}}),
    "epoch": 3,
    "step": torch.tensor(3),
}

LAYOUTS: dict[str, tuple[Any, str]] = {
    "alone": (STATE, ""),
    "ordered": (OrderedDict(STATE), ""),
    "of a module": (Net().state_dict() | STATE, ""),
    "parameters": (STATE | {name: nn.Parameter(tensor) for name, tensor in FLOATS.items()}, ""),
    "beside objects": ({**STATE, "args": Settings(lr=1)}, ""),
    "module.": (prefixed(STATE, "module."), ""),
    "_orig_mod.": (prefixed(STATE, "_orig_mod."), ""),
    "both": (prefixed(STATE, "module.", "_orig_mod."), ""),
    "both, the other way": (prefixed(STATE, "_orig_mod.", "module.", "module."), ""),
    "model.": (prefixed(STATE, "model."), ""),
    "a compiled part": ({name.replace("blocks.", "blocks._orig_mod."): t for name, t in STATE.items()}, ""),
    "state_dict": ({"state_dict": STATE, **EXTRAS}, "state_dict"),
    "model": ({"model": STATE, **EXTRAS}, "model"),
    "module": ({"module": prefixed(STATE, "module."), **EXTRAS}, "module"),
    "model_state_dict": ({"model_state_dict": STATE, "optimizer_state_dict": EXTRAS["opt"]}, "model_state_dict"),
    "ema": ({"model": OTHER, "ema": STATE, **EXTRAS}, "ema"),
    "model_ema": ({"model": OTHER, "model_ema": STATE, **EXTRAS}, "model_ema"),
    "ema_state_dict": ({"model_state_dict": OTHER, "ema_state_dict": STATE, **EXTRAS}, "ema_state_dict"),
    "ema, nested": ({"model": OTHER, "ema": {"state_dict": STATE, "decay": 0.9}}, "ema.state_dict"),
    "ema with counters": ({"model": OTHER, "ema": {**STATE, "num_updates": torch.tensor(3), "decay": 0.9}}, "ema"),
    "shadow_params": (
        {"ema": {"decay": 0.9, "num_updates": 3, "shadow_params": [STATE[n] for n in PARAMETERS]}, "model": STATE},
        "ema",
    ),
    "an averaged model": ({**prefixed(STATE, "module."), "n_averaged": torch.tensor(4)}, ""),
    "ema. beside model.": ({**prefixed(OTHER, "model."), **prefixed(STATE, "ema.")}, "ema"),
    "online_model and ema_model": (
        {
            "step": 3,
            "ema": {**prefixed(OTHER, "online_model."), **prefixed(STATE, "ema_model."), "initted": torch.tensor(True)},
        },
        "ema.ema_model",
    ),
    "Lightning": ({"state_dict": prefixed(STATE, "model."), "pytorch-lightning_version": "2.0"}, "state_dict"),
    "Lightning with other modules": (
        {"state_dict": {**prefixed(STATE, "model."), **prefixed(OTHER, "loss.vgg.")}},
        "state_dict.model",
    ),
    "Lightning's average": (
        {"state_dict": {**prefixed(STATE | {n: OTHER[n] for n in PARAMETERS}, "model."), **lightning_ema(STATE)}},
        "state_dict.model_ema",
    ),
    "another single name": ({"generator": STATE, **EXTRAS}, "generator"),
    "a class derived from dict": (Attributes(model=Attributes(STATE)), "model"),
    "a defaultdict": ({"model": defaultdict(list, STATE)}, "model"),
    "DeepSpeed": ({"module": STATE, "ds_config": {}, "optimizer": None}, "module"),
}


def save_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, 4))


Writer = Callable[[Any, Path], None]
WRITERS: list[Writer] = [torch.save, save_old, save_plain]


def refusal(url: str | Path, key: str | None = None) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(RequestError) as refused:
        read_checkpoint(str(url), key)
    message = str(refused.value)
    assert message.isprintable()
    assert message.startswith("--weights_key is " if key is not None else "--model is ")
    return message


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("write", WRITERS)
def test_every_layout_gives_the_same_names_values_and_hash(write: Writer, name: str, tmp_path: Path) -> None:
    content, key = LAYOUTS[name]
    path = tmp_path / "weights"  # no suffix
    write(content, path)
    read = read_checkpoint(str(path))
    assert read.key == key
    assert read.tensors.keys() == FLOATS.keys()
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in FLOATS.items())
    assert weights_hash(read.tensors) == weights_hash(FLOATS)
    assert (read.shown, read.sha256, read.saved) == (str(path), None, None)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.bin", "w"])
@pytest.mark.parametrize("prefix", ["", "model.", "module._orig_mod."])
def test_safetensors_give_the_same_whatever_their_name(prefix: str, name: str, tmp_path: Path) -> None:
    save_file(prefixed(STATE, prefix), tmp_path / name, {"format": "pt"})
    assert weights_hash(read_checkpoint(str(tmp_path / name)).tensors) == weights_hash(FLOATS)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_every_floating_point_type_is_read_as_it_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"w": torch.randn(5, 3).to(dtype), "b": torch.randn(()).to(dtype), "e": torch.zeros(0, 3, dtype=dtype)}
    for write in (*WRITERS, save_file):
        if dtype.itemsize == 1 and write is not save_file and write is not torch.save:
            continue  # which the older layouts cannot store
        write(state, tmp_path / "w")
        assert weights_hash(read_checkpoint(str(tmp_path / "w")).tensors) == weights_hash(state)


def test_the_hash_is_that_of_version_1(tmp_path: Path) -> None:
    torch.save({"b": torch.arange(3.0), "a": torch.ones(2, 2).half()}, tmp_path / "w.pt")
    read = read_checkpoint(str(tmp_path / "w.pt")).tensors
    ones, numbers = np.ones(4, "<f2").tobytes(), np.arange(3, dtype="<f4").tobytes()
    assert weights_hash(read) == hashlib.sha256(b"a float16 [2, 2]\n" + ones + b"b float32 [3]\n" + numbers).hexdigest()


def test_views_of_one_memory_and_other_orders_of_it_are_read(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    channels_last = base.reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    views = {"a": base[3:9].reshape(2, 3).t(), "b": channels_last, "c": base[5:]}
    for write in WRITERS:
        write(views, tmp_path / "w")
        read = read_checkpoint(str(tmp_path / "w")).tensors
        assert all(torch.equal(read[name], view) for name, view in views.items())


def test_a_choice_is_told_and_a_key_chooses_another(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": OTHER, "ema": STATE, **EXTRAS}, path)
    note = read_checkpoint(str(path)).note
    assert note == "took the weights under 'ema'; the file also has 'model'; --weights_key chooses"
    assert torch.equal(read_checkpoint(str(path), "model").tensors["pos_embed"], OTHER["pos_embed"])
    assert read_checkpoint(str(path), "model").note is None
    said = refusal(path, "modle")
    assert "'ema', 'model'" in said
    torch.save({"model": STATE}, path)
    assert read_checkpoint(str(path)).note is None


def test_a_key_reaches_into_nested_and_flat_names(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    flat = {**prefixed(STATE, "model."), **prefixed(OTHER, "ema.")}
    torch.save({"state_dict": flat, "a.b": {"c": STATE}}, path)
    for key in ("model", "state_dict.model", "a.b.c"):
        read = read_checkpoint(str(path), key)
        assert read.key == key
        assert weights_hash(read.tensors) == weights_hash(FLOATS)
    assert read_checkpoint(str(path)).key == "state_dict.ema"
    assert read_checkpoint(str(path), "state_dict").key == "state_dict.ema"
    save_file(flat, path)
    assert read_checkpoint(str(path)).key == "ema"
    assert weights_hash(read_checkpoint(str(path), "model").tensors) == weights_hash(FLOATS)


def test_several_weights_under_unknown_names_ask_for_a_key(tmp_path: Path) -> None:
    torch.save({"generator": STATE, "critic": OTHER}, tmp_path / "w.pt")
    assert "'generator', 'critic'; --weights_key chooses" in refusal(tmp_path / "w.pt")
    read = read_checkpoint(str(tmp_path / "w.pt"), "generator")
    assert weights_hash(read.tensors) == weights_hash(FLOATS)


def test_averages_without_names_are_named_only_where_it_is_certain(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    listed = [FLOATS[name] for name in PARAMETERS]
    torch.save({"ema": {"shadow_params": listed}}, path)
    assert "without names" in refusal(path)
    torch.save({"ema": {"shadow_params": [torch.zeros(2)]}, "model": {"a": torch.zeros(2), "b": torch.zeros(2)}}, path)
    assert "does not tell for certain" in refusal(path)
    # A frozen parameter has no average: the shapes show which it is.
    torch.save({"ema": {"shadow_params": [torch.ones(3)]}, "model": {"a": torch.zeros(2), "b": torch.zeros(3)}}, path)
    read = read_checkpoint(str(path)).tensors
    assert (read["a"].tolist(), read["b"].tolist()) == ([0, 0], [1, 1, 1])


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("given", ["folder", "index", "url"])
def test_an_index_of_parts_is_read_whole(index: str, given: str, tmp_path: Path) -> None:
    suffix = index.split(".")[1]
    names = list(FLOATS)
    parts = {f"w-0000{i + 1}-of-00002.{suffix}": {n: FLOATS[n] for n in names[i::2]} for i in range(2)}
    files: dict[str, str] = {}
    for file, part in parts.items():
        (save_file if suffix == "safetensors" else torch.save)(part, tmp_path / file)
        files |= dict.fromkeys(part, file)
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    url = {"folder": str(tmp_path), "index": str(tmp_path / index), "url": "memory://parts"}[given]
    if given == "url":
        fs = fsspec.filesystem("memory")
        for path in tmp_path.iterdir():
            fs.pipe_file(f"/parts/{path.name}", path.read_bytes())
    assert weights_hash(read_checkpoint(url).tensors) == weights_hash(FLOATS)
    assert "part 1 of 2" in refusal(tmp_path / next(iter(parts)))
    if given == "url":
        fs.rm("/parts", recursive=True)
        return
    (tmp_path / next(iter(parts))).unlink()
    assert "no such file" in refusal(url)


@pytest.mark.parametrize("file", ["../w.pt", "/etc/passwd", "a/b.pt", ".hidden", "http://x/y", ""])
def test_an_index_names_files_beside_it(file: str, tmp_path: Path) -> None:
    (tmp_path / "m.index.json").write_text(json.dumps({"weight_map": {"w": file}}))
    assert "must name files beside it" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_a_damaged_index_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "m.index.json").write_text(content)
    assert "its index" in refusal(tmp_path)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("w.pt"))
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w.pt", b"x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"<html>", "HTML page"),
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "XML"),
        (gzip.compress(b"x"), "gunzip"),
        (b"\x28\xb5\x2f\xfd....", "unzstd"),
        (b'{"hidden_size": 3}', "JSON"),
        (b"lr: 3\nsteps: 4\n", "a text"),
        (b"\x89PNG....", "a picture"),
        (npz(), "NumPy"),
        (zipped(), "unpack it"),
        (tar(), "tar archive"),
        (b"\x00\x01\x02\x03" * 10, "no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert said in refusal(tmp_path / "w.pt")


OPTIMIZER = torch.optim.AdamW(Net().parameters()).state_dict()
NAN: State = FLOATS | {"blocks.0.weight": torch.tensor([1, torch.nan]), "blocks.2.weight": torch.tensor(-torch.inf)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (OPTIMIZER, "state of an optimizer"),
        ({"optimizer": OPTIMIZER, "epoch": 3}, "state of an optimizer"),
        ([1, 2], "holds a list"),
        ([torch.zeros(3)], "holds a list"),
        (torch.zeros(3), "one tensor without a name"),
        ({}, "must hold a state dict"),
        (3, "must hold a state dict"),
        (Net, "must hold a state dict"),
        ({"w": 3}, "must hold a state dict"),
        ({3: torch.zeros(1)}, "must hold a state dict"),
        ({"model": {"w": 1.0}}, "must hold a state dict"),
        (Net(), "pickled module (tests.networks.test_weights.Net)"),
        ({"model": Net()}, "pickled module (tests.networks.test_weights.Net) under 'model'"),
        ({"ema": Net(), "model": STATE}, "pickled module (tests.networks.test_weights.Net) under 'ema'"),
        (nn.DataParallel(nn.Linear(1, 1)), "save its state dict alone, with torch.save(model.state_dict(), ...)"),
        (Settings(lr=3), "an object of tests.networks.test_weights.Settings"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1), "conv_in.weight": torch.zeros(1)}, "diffusers"),
        (prefixed({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}, "module."), "diffusers"),
        ({"w": torch.zeros(3).to_sparse(), "v": torch.zeros(1)}, "w as a sparse tensor"),
        ({"w": torch.zeros(3, device="meta"), "v": torch.zeros(1)}, "w as a tensor of the meta device"),
        ({"w": torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8), "v": torch.zeros(1)}, "quantised"),
        ({"a.weight": torch.zeros(3, dtype=torch.int8), "a.scale": torch.zeros(1)}, "a.weight as int8"),
        ({"steps": torch.zeros(3, dtype=torch.int64), "ids": torch.zeros(3, dtype=torch.int64)}, "no floating-point"),
        ({"a": torch.zeros(0), "b": torch.zeros(0), "c": torch.zeros(1)}, "one part of a sharded checkpoint"),
        (NAN, "2 of its 8 tensors have values that are not finite (blocks.0.weight, blocks.2.weight)"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_what_holds_no_weights_is_said_with_a_way_out(content: Any, said: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert said in refusal(tmp_path / "w.pt")


def test_a_pickled_average_beside_plain_weights_names_the_key_of_those(tmp_path: Path) -> None:
    torch.save({"ema": Net(), "model": STATE}, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt").endswith("--weights_key model")
    assert weights_hash(read_checkpoint(str(tmp_path / "w.pt"), "model").tensors) == weights_hash(FLOATS)


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
    assert "TorchScript" in refusal(tmp_path / "w.pt")


def test_values_that_are_not_chosen_may_be_anything(tmp_path: Path) -> None:
    torch.save({"model": NAN, "ema": STATE}, tmp_path / "w.pt")
    assert read_checkpoint(str(tmp_path / "w.pt")).key == "ema"


@pytest.mark.parametrize("write", [*WRITERS, save_file])
@pytest.mark.parametrize("kept", [0.0001, 0.01, 0.5, 0.99, -1])
def test_a_cut_file_is_named_truncated(write: Writer, kept: float, tmp_path: Path) -> None:
    write({"w": torch.randn(10_000)}, tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(content[: int(len(content) * kept) if kept > 0 else -1])
    assert "truncated" in refusal(tmp_path / "w")


def test_a_changed_bit_in_the_tensors_is_seen(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(1000.0)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    content[content.index(torch.tensor([501.0, 502.0]).numpy().tobytes())] ^= 1
    (tmp_path / "w.pt").write_bytes(content)
    assert "CRC-32" in refusal(tmp_path / "w.pt")


def test_a_file_that_was_saved_without_checksums_is_read(tmp_path: Path) -> None:
    script = f"""
import torch
torch.serialization.set_crc32_options(False)
torch.save({{"w": torch.arange(6.0)}}, {str(tmp_path / "w.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert read_checkpoint(str(tmp_path / "w.pt")).tensors["w"].tolist() == [0, 1, 2, 3, 4, 5]


def test_numbers_of_a_machine_with_the_other_byte_order_are_read(tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0, 2.0])}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    records["w/byteorder"] = b"big"
    records["w/data/0"] = np.array([1.0, 2.0], ">f4").tobytes()
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert read_checkpoint(str(tmp_path / "w.pt")).tensors["w"].tolist() == [1, 2]


def test_a_missing_file_a_directory_and_a_device_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "no such file" in refusal("memory://none.pt")
    for url in (tmp_path / "folder.pt", (tmp_path / "folder.pt").as_uri()):
        assert "a directory that has no index" in refusal(url)
    assert "a device" in refusal("/dev/zero")
    (tmp_path / "folder.pt" / "model_index.json").write_text("{}")
    assert "pipeline of diffusers" in refusal(tmp_path / "folder.pt")
    (tmp_path / "model_index.json").unlink(missing_ok=True)


def test_a_directory_of_distributed_checkpoints_names_the_command_that_joins_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"x")
    assert "dcp_to_torch" in refusal(tmp_path)


def test_another_flag_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^--guide is "):
        read_checkpoint(str(tmp_path / "none"), flag="--guide")
