"""Weights are found in every layout that people save, by the same names and with the same hash."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash
from tests.networks.layouts import (
    EMA_MODEL,
    EXTRAS,
    FLOATS,
    LAYOUTS,
    OTHER,
    PARAMETERS,
    STATE,
    WRITERS,
    Writer,
    prefixed,
    refusal,
)


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(prefixes=st.lists(st.sampled_from(["module.", "_orig_mod.", "model.", "ema_model.", "net."]), max_size=5))
def test_prefixes_in_any_order_change_nothing(prefixes: list[str], tmp_path: Path) -> None:
    torch.save({"state_dict": prefixed(STATE, *prefixes)}, tmp_path / "w.ckpt")
    assert weights_hash(read_checkpoint(str(tmp_path / "w.ckpt")).tensors) == weights_hash(FLOATS)


def test_names_of_modules_inside_are_kept(tmp_path: Path) -> None:
    """A prefix that only some names have is a part of the network."""
    state = {"net.weight": torch.ones(1), "head.model.weight": torch.ones(2), "unet.out_gain": torch.ones(3)}
    torch.save(state, tmp_path / "w.pt")
    assert read_checkpoint(str(tmp_path / "w.pt")).tensors.keys() == state.keys()


@pytest.mark.parametrize("first", ["input_blocks.0.0.weight", "x_embedder.proj.weight"])
def test_a_known_network_is_found_under_the_name_of_any_attribute(first: str, tmp_path: Path) -> None:
    state = {first: torch.ones(1), "out.weight": torch.ones(2)}
    for name in ("unet.", "denoise_fn.", "model.backbone."):
        torch.save({"state_dict": prefixed(state, name) | prefixed(OTHER, "loss.")}, tmp_path / "w.ckpt")
        read = read_checkpoint(str(tmp_path / "w.ckpt"))
        assert weights_hash(read.tensors) == weights_hash(state)
        assert read.key == f"state_dict.{name[:-1]}"
    others = OTHER | {first: torch.zeros(1)}
    for key, other in (("net_ema", "net"), ("ema_net.module", "model"), ("ema_unet.ma_model", "unet")):
        torch.save(prefixed(others, f"{other}.") | prefixed(state, f"{key}."), tmp_path / "w.ckpt")
        read = read_checkpoint(str(tmp_path / "w.ckpt"))
        assert read.key == key
        assert read.note is not None
        assert f"the file also has '{other}'" in read.note
        assert weights_hash(read.tensors) == weights_hash(state)
        assert read_checkpoint(str(tmp_path / "w.ckpt"), other).tensors[first] == 0


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


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_plain_pickle_of_every_binary_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": STATE}, protocol))
    assert weights_hash(read_checkpoint(str(tmp_path / "w.pkl")).tensors) == weights_hash(FLOATS)


def test_weights_of_other_names_are_told(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"model": STATE, "averaged_model": OTHER, "statistics": {"a": torch.ones(1), "b": torch.ones(1)}}, path)
    note = read_checkpoint(str(path)).note
    assert note == "took the weights under 'averaged_model'; the file also has 'model'; --weights_key chooses"
    others = {name: OTHER[name] for name in FLOATS}
    assert weights_hash(read_checkpoint(str(path), "averaged_model").tensors) == weights_hash(others)


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


def test_of_averages_in_a_list_or_by_number_each_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    others = {name: OTHER[name] for name in FLOATS}
    for averages, first, second in (([STATE, OTHER], "0", "1"), ({0.999: STATE, 0.99: OTHER}, "0.999", "0.99")):
        torch.save({"net": OTHER, "ema": {"emas": averages}}, path)
        note = f"took the weights under 'ema.emas.{first}'; the file also has 'ema.emas.{second}', 'net'"
        assert read_checkpoint(str(path)).note == f"{note}; --weights_key chooses"
        chosen = read_checkpoint(str(path), f"ema.emas.{second}").tensors
        assert weights_hash(chosen) == weights_hash(others)


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
    said = refusal(path)
    assert "does not determine" in said
    assert said.endswith("or take other weights with --weights_key model")
    with pytest.raises(RequestError, match="without names"):
        read_checkpoint(str(path), "ema")
    assert read_checkpoint(str(path), "model").tensors.keys() == {"a", "b"}
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


def test_the_state_of_diffusers_emamodel_alone_is_a_list_without_names(tmp_path: Path) -> None:
    torch.save(EMA_MODEL, tmp_path / "ema.pt")  # of a network of no known family
    assert "averaged weights under 'shadow_params' as a list without names" in refusal(tmp_path / "ema.pt")
