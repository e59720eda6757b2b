"""What holds no weights is said in one sentence: what it is, and what to do."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash
from tests.networks.layouts import (
    FLOATS,
    STATE,
    WRITERS,
    Net,
    Settings,
    State,
    Writer,
    prefixed,
    refusal,
)


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
        (gzip.compress(b"x", mtime=0), "gunzip"),
        (b'{"hidden_size": 3}', "JSON"),
        (b"lr: 3\nsteps: 4\n", "text, not a checkpoint"),
        (npz(), "NumPy"),
        (zipped(), "unpack it"),
        (tar(), "checkpoint"),
        (b"\x00\x01\x02\x03" * 10, "checkpoint"),
    ],
)
def test_a_file_that_is_not_a_checkpoint_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    assert said in refusal(tmp_path / "w.pt")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it is deprecated, and in files
    QUANTISED = torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)
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
        (Net(), "pickled module (tests.networks.layouts.Net)"),
        ({"model": Net()}, "pickled module (tests.networks.layouts.Net) under 'model'"),
        ({"ema": Net(), "model": STATE}, "pickled module (tests.networks.layouts.Net) under 'ema'"),
        (nn.DataParallel(nn.Linear(1, 1)), "save its state dict alone, with torch.save(model.state_dict(), ...)"),
        (Settings(lr=3), "an object of tests.networks.layouts.Settings"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1), "conv_in.weight": torch.zeros(1)}, "diffusers"),
        (prefixed({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(1)}, "module."), "diffusers"),
        ({"w": torch.zeros(3).to_sparse(), "v": torch.zeros(1)}, "w as a sparse tensor"),
        ({"w": torch.zeros(3, device="meta"), "v": torch.zeros(1)}, "w as a tensor of the meta device"),
        ({"w": QUANTISED, "v": torch.zeros(1)}, "quantised"),
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


def test_averages_whose_names_can_be_two_tensors_are_refused(tmp_path: Path) -> None:
    flat = {"model.a.11": torch.ones(1), "model.a.1.1": torch.ones(1), "model_ema.a11": torch.zeros(1)}
    torch.save({"state_dict": flat}, tmp_path / "w.pt")
    assert refusal(tmp_path / "w.pt").endswith("can be two tensors; take other weights with --weights_key model")
    assert read_checkpoint(str(tmp_path / "w.pt"), "model").tensors.keys() == {"a.11", "a.1.1"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
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


@pytest.mark.parametrize("names", [("model_index.json",), ("config.json", "diffusion_pytorch_model.safetensors")])
def test_a_folder_of_diffusers_is_sampled_through_from_pretrained(names: tuple[str, ...], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    said = refusal(tmp_path)
    for part in ("diffusers", "UNet2DModel.from_pretrained(FOLDER)", "docs/models.md"):
        assert part in said
