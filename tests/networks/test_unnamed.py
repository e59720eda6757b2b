"""Averages that were saved as a list get the names of the network whose shapes they have, in the order that it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.dit import DitOptions, Transformer
from ray_sampler.networks.family import without_memory
from ray_sampler.networks.unnamed import ADM_FIRST, ADM_INPUT, ADM_LAST, ATTENTION, RESIDUAL, names_of
from ray_sampler.networks.weights import read_checkpoint, weights_hash
from tests.networks.golden import REFERENCE, golden_state
from tests.networks.test_adm_shapes import architectures, state_dict

SHAPE = {"input_size": 8, "patch_size": 2, "in_channels": 4, "width": 48, "mlp_width": 192, "frequencies": 256}


def shapes_of(state: dict[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in state.values()]


@settings(max_examples=60)
@given(arch=architectures())
def test_shapes_name_every_parameter_of_adm(arch: AdmOptions) -> None:
    state = state_dict(arch)
    assert names_of(shapes_of(state)) == list(state)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("head_channels", [None, 16])
@pytest.mark.parametrize("projectors", [0, 2])
def test_shapes_name_every_parameter_of_a_transformer(
    depth: int, out_channels: int, head_channels: int | None, projectors: int
) -> None:
    more: dict[str, Any] = {"depth": depth, "out_channels": out_channels, "head_channels": head_channels}
    options = DitOptions(**SHAPE, label_rows=11, **more)
    state = without_memory(lambda: Transformer(options)).state_dict()
    beside = {}
    for number in range(projectors):
        for name, (rows, columns) in {"0": (64, 48), "2": (64, 64), "4": (96, 64)}.items():
            beside[f"projectors.{number}.{name}.weight"] = torch.empty(rows, columns, device="meta")
            beside[f"projectors.{number}.{name}.bias"] = torch.empty(rows, device="meta")
    last = [name for name in state if name.startswith("final_layer.")]  # after REPA's projectors
    tail = {name: state.pop(name) for name in last}
    state = state | beside | tail
    assert names_of(shapes_of(state)) == list(state)


def test_what_is_of_no_known_network_or_lacks_a_parameter_gets_no_names() -> None:
    state = without_memory(
        lambda: Transformer(DitOptions(**SHAPE, depth=2, out_channels=4, label_rows=11, head_channels=None))
    )
    shapes = shapes_of(state.state_dict())
    assert names_of(shapes) is not None
    assert names_of([]) is None
    assert names_of(shapes[1:]) is None
    assert names_of(shapes[:-1]) is None
    assert names_of([*shapes, (3,)]) is None
    assert names_of(shapes[:20] + shapes[21:]) is None


@pytest.mark.parametrize("layers", [[RESIDUAL, ATTENTION], [RESIDUAL]])
def test_a_list_of_a_hundred_thousand_is_answered(layers: list[str]) -> None:
    """In linear time: with each middle tried against all other layers it took minutes and more."""
    parts = [ADM_FIRST, ADM_INPUT, *(layers * (100_000 // len(layers) // 8)), ADM_LAST]
    letters = [each.partition(":")[2].split() for part in parts for each in part.split(", ")]
    shapes = [tuple(int(letter) if letter.isdigit() else 8 for letter in each) for each in letters]
    assert len(shapes) > 100_000
    assert names_of(shapes) is None


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reference", ["dit8", "sit_repa8", "classcond32"])
def test_the_state_of_diffusers_emamodel_alone_is_read(reference: str, wrapped: bool, tmp_path: Path) -> None:
    adm = reference == "classcond32"
    tensors = golden_state() if adm else read_checkpoint(str(REFERENCE / reference / "checkpoint.pt")).tensors
    state = {"decay": 0.9999, "optimization_step": 7, "power": 2 / 3, "shadow_params": list(tensors.values())}
    torch.save(
        {"ema": state, "optimizer": {"state": {}, "param_groups": []}} if wrapped else state, tmp_path / "ema.pt"
    )
    read = read_checkpoint(str(tmp_path / "ema.pt"))
    assert weights_hash(read.tensors) == weights_hash(tensors)
    assert read.key == ("ema" if wrapped else "shadow_params")
