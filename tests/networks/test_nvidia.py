"""NVIDIA's snapshots are read to the last bit, and nothing in them is run."""

from __future__ import annotations

import gc
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ray_sampler.networks.nvidia import Refused, looks_like_nvidia, read_pickle
from tests.networks.nvidia_files import EasyDict, Persistent, dumped, module, random_tensors, snapshot
from tests.networks.reference import FOLDER, saved

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"unet.out_gain": (), "unet.enc.8x8_conv.weight": (4, 3, 3, 3), "unet.emb_fourier.freqs": (5,)}


def read(data: bytes) -> Any:
    return read_pickle(io.BytesIO(data))


def refusal(data: bytes) -> str:
    """What is said of `data`, which must be one sentence."""
    with pytest.raises(Refused) as caught:
        read(data)
    text = str(caught.value)
    assert text.isprintable()
    assert text.isascii()
    assert len(text) < 300
    return text


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]
)
def test_tensors_of_every_dtype_come_back_bit_by_bit_in_their_own_memory(dtype):
    tensors = {name: (100 * t).to(dtype) for name, t in random_tensors(SHAPES | {"unet.none": (0, 3)}).items()}
    tensors["unet.turned.weight"] = (100 * torch.randn(6, 4)).to(dtype).T
    tensors["unet.part.weight"] = (100 * torch.randn(6, 4)).to(dtype)[1:3, ::2]
    buffers = ("freqs", "out_gain", "none", "weight")  # a Parameter cannot hold whole numbers
    found = read(dumped({"ema": module("Precond", tensors, buffers=buffers)}))["ema"].tensors
    assert set(found) == set(tensors)
    for name, tensor in found.items():
        assert same_bits(tensor, tensors[name])
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    assert len({t.untyped_storage().data_ptr() for t in found.values() if t.numel()}) == len(found) - 1


def test_each_tensor_is_freed_when_it_is_dropped():
    gc.disable()
    try:
        tensors = read(snapshot("Precond", random_tensors(SHAPES)))["ema"].tensors
        memory = {name: StorageWeakRef(tensor.untyped_storage()) for name, tensor in tensors.items()}
        for name in list(tensors):
            assert not memory[name].expired()
            del tensors[name]
            assert memory[name].expired()
    finally:
        gc.enable()


def test_values_that_are_not_numbers_are_kept_bit_by_bit():
    bits = torch.tensor([0x7FC00001, -1, 0, -(2**31), 0x7F800000], dtype=torch.int32)
    tensors = {"unet.weight": bits.view(torch.float32)}
    assert same_bits(read(snapshot("Precond", tensors))["ema"].tensors["unet.weight"], tensors["unet.weight"])


def test_a_reference_file_has_the_names_and_shapes_written_down_beside_it():
    for name in ("edm2_16", "edm2_half16"):
        shapes = {key: list(tensor.shape) for key, tensor in saved(name).tensors.items()}
        assert shapes == json.loads((FOLDER / name / "state.json").read_text())


@pytest.mark.parametrize("name", ["edm2_16", "edm2_half16", "edm_ddpmpp16", "edm_ncsnpp8"])
def test_a_reference_file_has_the_parameters_counted_beside_it(name):
    assert saved(name).parameters == json.loads((FOLDER / name / "about.json").read_text())["parameters"]


def test_buffers_that_are_not_persistent_and_empty_places_are_left_out():
    made = module("Precond", {"kept": torch.ones(2), "freqs": torch.ones(3), "phases": torch.ones(3)})
    made.meta["state"]["_non_persistent_buffers_set"] = {"phases"}
    made.meta["state"]["_parameters"]["bias"] = None
    made.meta["state"]["_modules"]["skip"] = None
    assert list(read(dumped({"ema": made}))["ema"].tensors) == ["kept", "freqs"]


def test_arguments_are_plain_data():
    inner = module("UNet", {"w": torch.ones(1)}, {"channel_mult": [1, 2], "dropout": np.float32(0.5), "label_dim": 3})
    outer = module("Precond", {}, EasyDict(img_resolution=8, scale=np.float64(0.25), options=EasyDict(a=(1, None))))
    state = outer.meta["state"]
    state["_modules"] = {"unet": inner}
    state |= {"sigma_max": float("inf"), "use_fp16": True, "scales": np.arange(4, dtype=np.float32).reshape(2, 2)}
    found = read(dumped({"ema": outer}))["ema"]
    assert found.class_name == "Precond"
    expected = {"model_type": "UNet", "channel_mult": [1, 2], "dropout": 0.5, "label_dim": 3, "img_resolution": 8}
    expected |= {"scale": 0.25, "options": {"a": [1, None]}, "sigma_max": float("inf"), "use_fp16": True}
    assert found.arguments == expected | {"scales": [[0.0, 1.0], [2.0, 3.0]]}
    assert all(type(found.arguments[name]) is float for name in ("dropout", "scale"))


@pytest.mark.parametrize("name", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_is_known_under_its_old_name_as_well(name):
    data = snapshot("Precond", random_tensors(SHAPES), {"scale": np.float64(0.25)}, protocol=3)
    renamed, count = re.subn(rb"numpy\._?core\.multiarray", name, data)
    assert count == 1
    assert read(renamed)["ema"].arguments["scale"] == 0.25


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_binary_protocol_is_read(protocol):
    tensors = random_tensors({"unet.weight": (300,)})
    found = read(snapshot("Precond", tensors, {"scale": np.float64(0.25)}, protocol=protocol))["ema"]
    assert torch.equal(found.tensors["unet.weight"], tensors["unet.weight"])
    assert found.arguments["scale"] == 0.25


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("thing", "name"),
    [
        (Calls(print, "executed"), "builtins.print"),
        (Calls(eval, "1 + 1"), "builtins.eval"),
        (Calls(subprocess.run, ["true"]), "subprocess.run"),
        (Calls(torch.load, "x"), "torch.serialization.load"),
        (Calls(getattr, "x", "y"), "builtins.getattr"),
        (torch.nn.functional.silu, "torch.nn.functional.silu"),
        (np.load, "numpy.load"),
    ],
)
def test_whatever_else_is_named_is_refused_by_name(thing, name, capsys):
    text = refusal(dumped({"ema": module("Precond", random_tensors(SHAPES)), "loss_fn": thing}))
    assert f"it references {name}; " in text
    assert capsys.readouterr().out == ""


def test_the_source_text_is_not_executed_and_not_even_looked_at():
    data = snapshot("Precond", random_tensors(SHAPES))
    assert b"raise SystemExit" in data
    spoilt = data.replace(b"raise SystemExit", b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0")
    assert set(read(spoilt)["ema"].tensors) == set(read(data)["ema"].tensors) == set(SHAPES)


def test_names_are_cut_short_and_printable():
    long = b"\x80\x04\x8c\x01\x1b\x8c\xc8" + b"\xc3\xa9" * 100 + b"\x93."
    assert "\\x1b" in refusal(long)


def nested(depth: int) -> Any:
    inner: Any = module("Layer", {"w": torch.ones(1)})
    for _ in range(depth):
        layer = module("Layer", {})
        layer.meta["state"]["_modules"] = {"a": inner, "b": inner}
        inner = layer
    return inner


def circle() -> Any:
    state: dict[str, Any] = {"_parameters": {}, "_modules": {}}
    state["_modules"]["self"] = torch.nn.ModuleDict.__new__(torch.nn.ModuleDict)
    state["_modules"]["self"].__dict__.update(state)
    return Persistent("Precond", state)


def test_modules_without_end_are_refused():
    assert "no end" in refusal(dumped({"ema": nested(60)}))
    assert "no end" in refusal(dumped({"ema": circle()}))
    laughs: list[Any] = []
    for _ in range(40):
        laughs = [laughs] * 4
    assert "too many arguments" in refusal(dumped({"ema": module("Precond", {}, {"channel_mult": laughs})}))


class Raw:
    """A tensor that `_rebuild_tensor_v2` makes of `storage` with `arguments`, whatever they are."""

    def __init__(self, storage: Any, *arguments: Any) -> None:
        self.arguments = storage, *arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Storage:
    """A storage of `count` numbers, or of whatever bytes are given."""

    def __init__(self, count: int, data: bytes = b"") -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.data = data or torch.ones(count).storage().__reduce__()[1][0]

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


def with_tensors(*tensors: Any) -> bytes:
    made = module("Precond", {})
    made.meta["state"]["_parameters"] = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    return dumped({"ema": made})


FAR = 2**62


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (4,), (1,)),
        (1, (3,), (1,)),
        (0, (2,), (3,)),
        (0, (FAR, FAR), (0, 0)),
        (0, (FAR,), (0,)),
        (0, (4,), (0,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (FAR, (1,), (1,)),
        (2**70, (1,), (1,)),
        (0, (2, 1), (1,)),
        (0.0, (1,), (1,)),
    ],
)
def test_a_tensor_that_its_values_cannot_fill_is_refused(offset, size, stride):
    assert "damaged" in refusal(with_tensors(Raw(Storage(3), offset, size, stride, False, OrderedDict())))


@pytest.mark.parametrize("where", range(0, 400, 7))
def test_a_storage_with_a_wrong_byte_is_refused_or_read(where):
    data = bytearray(Storage(3).data)
    data[where % len(data)] ^= 0x80
    try:
        found = read(with_tensors(Raw(Storage(3, bytes(data)), 0, (3,), (1,), False, OrderedDict())))
    except Refused:
        return
    assert found["ema"].tensors["w0"].shape == (3,)


def test_a_storage_of_another_format_is_refused():
    zipped = io.BytesIO()
    torch.save(torch.ones(3), zipped)
    huge = Storage(3).data.replace(b"K\x03Nt", b"\x8a\x08\0\0\0\0\0\0\0\x40Nt")
    assert huge != Storage(3).data
    for data in (zipped.getvalue(), Storage(3).data[:-1], b"x", huge):
        assert "damaged" in refusal(with_tensors(Raw(Storage(3, data), 0, (3,), (1,), False, OrderedDict())))


HEAD = b"\x80\x04"


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Nr\xff\xff\xff\xff.",  # a memo of 2^32 entries
        HEAD + b"\x8e" + struct.pack("<Q", 2**62) + b"x.",  # bytes without end
        HEAD + b"\x8d" + struct.pack("<Q", 2**33) + b"x.",  # and text
        HEAD + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # and a number
        HEAD + b"\x95" + struct.pack("<Q", 2**62) + b"N.",  # and a frame
        HEAD + b")" + b"\x85" * 300_000 + b".",
        HEAD + b"N2" * 10 + b".",
        HEAD + b"N" * 1_000_001 + b".",
        HEAD + b"Q.",
        HEAD + b"(" * 10,
        HEAD,
        b"\x80\x09N.",
        b"",
        b".",
    ],
    ids=range(14),
)
def test_claims_of_a_few_bytes_are_refused_at_once(data):
    refusal(data)


def test_a_huge_array_of_numpy_is_refused():
    array = dumped({"ema": module("Precond", {}, {"a": np.zeros((2, 2))})})
    assert read(array)["ema"].arguments["a"] == [[0.0, 0.0], [0.0, 0.0]]
    wide = array.replace(b"K\x02K\x02\x86", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86")
    assert wide != array
    refusal(wide)
    assert "damaged" in refusal(dumped({"ema": module("Precond", {}, {"a": np.array([object], dtype="O")[:0]})}))


def test_pickles_without_a_network_are_refused():
    for content in ({}, {"ema": None}, [1, 2], {"ema": torch.ones(2)}, {"model": {"weight": 1}}, {1: circle()}):
        assert "without a network" in refusal(dumped(content))


def test_a_snapshot_is_known_by_its_content():
    zipped = io.BytesIO()
    torch.save({"torch_utils.persistence": "_reconstruct_persistent_obj"}, zipped)
    assert looks_like_nvidia(snapshot("Precond", random_tensors(SHAPES))[:1000])
    assert looks_like_nvidia((FOLDER / "edm_ncsnpp8" / "net.pkl").read_bytes()[:1000])
    for other in (zipped.getvalue(), pickle.dumps({"ema": 1}), b"", b"<html>"):
        assert not looks_like_nvidia(other)


MEASURE = """
import resource, sys
from ray_sampler.networks.nvidia import read_pickle
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "rb") as file:
    found = read_pickle(file)
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_reading_takes_little_more_memory_than_the_file_has_bytes(tmp_path):
    shapes = {f"unet.enc.8x8_block{i}.weight": (256, 256, 3, 3) for i in range(27)}
    data = snapshot("Precond", random_tensors(shapes, dtype=torch.float16))
    (tmp_path / "net.pkl").write_bytes(data)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "net.pkl")]
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert peak < 1.25 * len(data)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_change_of_bytes_runs_code_hangs_or_takes_memory(seed):
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.networks.fuzz", str(seed), "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.replace("'", '"'))
    assert set(outcomes) == {"refused", "read"}
    assert outcomes["refused"] > 3000
