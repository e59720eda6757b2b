"""Transformers compute what the published ones compute, and their samples come out of whole requests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ray_sampler.cli import main
from ray_sampler.cluster.job import Job, prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks import dit
from ray_sampler.networks.dit import DitOptions, Transformer
from ray_sampler.networks.family import DTYPES, without_memory
from ray_sampler.sampling.parameterisation import Preconditioned
from ray_sampler.sampling.plan import sample_block
from tests.loading import loaded
from tests.networks.reference import FOLDER, numbers

DIT, REPA = FOLDER / "dit8" / "checkpoint.pt", FOLDER / "sit_repa8" / "checkpoint.pt"
SMALL: dict[str, Any] = {"gpus_per_actor": 0.0, "decoder": "none", "precision": "fp32"}
OF_DIT: dict[str, Any] = {"prediction": "eps", "num_heads": 3}
OF_REPA: dict[str, Any] = {"num_heads": 4}
OF: dict[str, dict[str, Any]] = {"dit8": OF_DIT, "sit_repa8": OF_REPA}


def job(model: Path, **flags: Any) -> Job:
    return prepare(RunConfig(**(SMALL | {"model": str(model)} | flags)))


def sampled(made: Job, indices: Tensor) -> Tensor:
    networks = {role: loaded(network) for role, network in made.networks.items()}
    with torch.inference_mode():
        return sample_block(networks, made.plan, indices)[0]


# The published implementations' numbers.


@pytest.mark.parametrize(("name", "out"), [("dit8", "eps_and_rest"), ("sit_repa8", "v")])
def test_a_network_gives_the_published_numbers(name: str, out: str) -> None:
    expected = numbers(name, "forward")
    network = loaded(job(FOLDER / name / "checkpoint.pt", **OF[name]).networks["main"])
    found = network(expected["x"], expected["t"].float(), expected["y"])
    torch.testing.assert_close(found, expected[out], rtol=1e-5, atol=1e-5)


LEVELS = ",".join(map(repr, numbers("dit8", "samples")["levels"].tolist()))
CASES: dict[tuple[str, str], dict[str, Any]] = {
    ("dit8", "euler"): {"sampler": "euler", "sigmas": LEVELS},
    ("dit8", "euler_cfg"): {"sampler": "euler", "sigmas": LEVELS, "guidance": 2.0},
    ("dit8", "euler_cfg3"): {"sampler": "euler", "sigmas": LEVELS, "guidance": 2.0, "guidance_channels": 3},
    ("dit8", "ddpm10"): {"sampler": "ddpm", "steps": 10},
    ("dit8", "ddpm10_cfg3"): {"sampler": "ddpm", "steps": 10, "guidance": 1.5, "guidance_channels": 3},
    ("sit_repa8", "ode"): {"sampler": "flow_euler", "steps": 10},
    ("sit_repa8", "ode_cfg"): {
        "sampler": "flow_euler",
        "steps": 10,
        "guidance": 1.8,
        "guidance_interval": "0,0.7",
    },
    ("sit_repa8", "ode_heun"): {"sampler": "flow_heun", "steps": 6},
    ("sit_repa8", "sde"): {"sampler": "flow_sde", "steps": 12},
    ("sit_repa8", "sde_cfg"): {"sampler": "flow_sde", "steps": 12, "guidance": 1.5, "guidance_interval": "0.1,0.8"},
}
"""As about.json beside the numbers says."""


@pytest.mark.parametrize(("name", "case"), CASES)
def test_a_request_gives_the_published_samples(name: str, case: str, tmp_path: Path) -> None:
    expected = numbers(name, "samples")
    labels = np.zeros(1000, np.int64)
    labels[expected["seeds"]] = expected["labels"]
    np.save(tmp_path / "labels.npy", labels)
    flags: dict[str, Any] = {"generator": "determ-indiv", "seed": 0, "num_samples": 1000}
    flags |= OF[name] | {"labels": str(tmp_path / "labels.npy")} | CASES[name, case]
    made = job(FOLDER / name / "checkpoint.pt", **flags)
    assert made.plan.state == "fp64"
    x, wanted = sampled(made, expected["seeds"]), expected[f"x0/{case}"].double()
    assert (x - wanted).abs().max() < 2e-6 * wanted.abs().max()


# The network, beside a straightforward computation.


def straightforward(state: Mapping[str, Tensor], heads: int, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Peebles & Xie 2023, figure 3, sample by sample in float64."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(values: Tensor) -> Tensor:
        return values / (1 + torch.exp(-values))

    def normal(values: Tensor, eps: float) -> Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()

    def affine(name: str, values: Tensor) -> Tensor:
        return normal(values, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"] if f"{name}.weight" in w else values

    results = []
    kernel = w["x_embedder.proj.weight"]
    width, _, p, _ = kernel.shape
    side = x.shape[-1] // p
    for image, time, label in zip(x.double(), t.double(), y, strict=True):
        squares = [image[:, r * p : r * p + p, c * p : c * p + p] for r in range(side) for c in range(side)]
        tokens = torch.stack([(kernel * square).sum((1, 2, 3)) for square in squares])
        tokens = tokens + w["x_embedder.proj.bias"] + w["pos_embed"][0]
        waves = torch.tensor([time * 10000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
        embedded = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([waves.cos(), waves.sin()]))))
        c = silu(embedded + w["y_embedder.embedding_table.weight"][label])
        depth = sum(name.endswith("attn.qkv.weight") for name in w)
        for block in (f"blocks.{i}" for i in range(depth)):
            six = linear(f"{block}.adaLN_modulation.1", c).reshape(6, width)
            h = linear(f"{block}.attn.qkv", normal(tokens, 1e-6) * (1 + six[1]) + six[0])
            mixed = []
            for head in range(heads):
                own = slice(head * width // heads, (head + 1) * width // heads)
                q, k, v = (part[:, own] for part in h.split(width, dim=1))
                q, k = affine(f"{block}.attn.q_norm", q), affine(f"{block}.attn.k_norm", k)
                mixed.append(torch.softmax(q @ k.T / math.sqrt(width // heads), dim=1) @ v)
            tokens = tokens + six[2] * linear(f"{block}.attn.proj", torch.cat(mixed, dim=1))
            h = linear(f"{block}.mlp.fc1", normal(tokens, 1e-6) * (1 + six[4]) + six[3])
            gelu = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            tokens = tokens + six[5] * linear(f"{block}.mlp.fc2", gelu)
        shift, scale = linear("final_layer.adaLN_modulation.1", c).split(width)
        last = linear("final_layer.linear", normal(tokens, 1e-6) * (1 + scale) + shift)
        out = torch.zeros(last.shape[1] // p**2, *image.shape[1:], dtype=torch.float64)
        for place, row in enumerate(last):
            r, s = place // side * p, place % side * p
            out[:, r : r + p, s : s + p] = row.reshape(p, p, -1).permute(2, 0, 1)
        results.append(out)
    return torch.stack(results)


def options(**more: Any) -> DitOptions:
    shape: dict[str, Any] = {
        "input_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "width": 24,
        "depth": 2,
        "mlp_width": 96,
        "frequencies": 256,
        "label_rows": 6,
        "head_channels": None,
        "num_heads": 3,
    }
    return DitOptions(**(shape | more))


def weights(shape: DitOptions, seed: int = 0) -> dict[str, Tensor]:
    """A state dict of random weights, without the heads."""
    stream = torch.Generator().manual_seed(seed)
    empty = without_memory(lambda: Transformer(shape)).state_dict()
    return {name: 0.3 * torch.randn(tensor.shape, generator=stream) for name, tensor in empty.items()}


def saved(path: Path, shape: DitOptions, **more: Tensor) -> Path:
    torch.save({**weights(shape), **more}, path)
    return path


SHAPES: dict[str, DitOptions] = {
    "DiT": options(),
    "patches of 4, deeper": options(patch_size=4, depth=3, input_size=16, num_heads=2),
    "no variance, three channels": options(in_channels=3, out_channels=3, patch_size=1, input_size=4),
    "normalised queries and keys": options(head_channels=6, num_heads=4),
    "one class, a narrow perceptron": options(label_rows=2, mlp_width=48),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_of_any_shape_computes_what_its_formulas_say(name: str, tmp_path: Path) -> None:
    shape = SHAPES[name]
    path = saved(tmp_path / "w.pt", shape)
    heads = {} if shape.head_channels else {"num_heads": shape.num_heads}
    opened = job(path, prediction="eps", **heads).networks["main"]
    assert opened.spec.options.num_heads == shape.num_heads
    assert opened.spec.shape == (shape.in_channels, shape.input_size, shape.input_size)
    stream = torch.Generator().manual_seed(1)
    x, t = torch.randn((3, *opened.spec.shape), generator=stream), torch.tensor([0.0, 0.37, 12.0])
    y = torch.tensor([0, 1, shape.label_rows - 1])
    expected = straightforward(weights(shape), shape.num_heads or 0, x, t, y)
    torch.testing.assert_close(loaded(opened)(x, t, y).double(), expected, rtol=1e-4, atol=1e-4)


def test_without_a_label_a_network_takes_the_last_row() -> None:
    network = loaded(job(DIT, **OF_DIT).networks["main"])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 4.0])
    assert torch.equal(network(x, t), network(x, t, torch.tensor([5, 5])))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near_to_float32(precision: Any) -> None:
    opened = job(REPA, **OF_REPA).networks["main"]
    whole, half = loaded(opened), loaded(opened, precision)
    expected = numbers("sit_repa8", "forward")
    inputs = expected["x"], expected["t"], expected["y"]
    difference = (whole(*inputs) - half(*inputs)).abs().max()
    assert 0 < difference < (4e-3 if precision == "fp16" else 3e-2)
    dtypes = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    assert dtypes["pos_embed"] == dtypes["blocks.0.adaLN_modulation.1.weight"] == torch.float32
    assert dtypes["blocks.0.attn.qkv.weight"] == DTYPES[precision]


def test_a_network_is_one_graph_for_the_compiler() -> None:
    network = loaded(job(REPA, **OF_REPA).networks["main"])
    expected = numbers("sit_repa8", "forward")
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    inputs = expected["x"], expected["t"], expected["y"]
    torch.testing.assert_close(compiled(*inputs), network(*inputs))


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    made = job(DIT, **OF_DIT, sampler="ddpm", steps=3, guidance=2.0)
    one, other = sampled(made, torch.tensor([0, 1, 2, 3])), sampled(made, torch.tensor([9, 8, 2, 7]))
    assert torch.equal(one[2], other[2])


def test_published_sizes_have_the_published_counts_and_heads() -> None:
    sizes = {(384, 12): 32_963_360, (768, 12): 130_512_416, (1024, 24): 458_102_816, (1152, 28): 675_129_632}
    for (width, depth), count in sizes.items():
        shape = options(input_size=32, width=width, depth=depth, mlp_width=4 * width, label_rows=1001)
        empty = without_memory(partial(Transformer, shape)).state_dict()
        assert sum(tensor.numel() for tensor in empty.values()) == count
        assert dit.options_from(empty).num_heads == dit.PUBLISHED_HEADS[width, depth]
    larger = options(input_size=64, width=1152, depth=28, mlp_width=4608, label_rows=1001)
    assert sum(t.numel() for t in without_memory(lambda: Transformer(larger)).state_dict().values()) == 676_014_368


# What is told of a file, and what must be given.


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["inspect", "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_inspect_describes_a_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, str(REPA), "--num_heads", "4")
    state = torch.load(REPA, weights_only=True)["ema"]
    expected = {"family": "dit", "shape": [4, 8, 8], "num_classes": 10, "null_label": 10, "weights_key": "ema"}
    expected |= {"parameters": sum(tensor.numel() for tensor in state.values()), "sigma_min": 0.002, "sigma_max": 1e4}
    assert expected.items() <= found.items()
    assert found["defaults"].items() >= {"clip_denoised": False, "rounding": "truncate", "state": "fp64"}.items()
    assert found["command"] == f"ray-sampler sample --model {REPA} --num_heads 4 --decoder none"


def test_inspect_leaves_open_what_nothing_determines(capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, str(DIT))
    assert (found["sigma_min"], found["sigma_max"], found["num_classes"]) == (None, None, 5)
    assert found["command"].endswith("--prediction PREDICTION --num_heads HEADS")
    assert main(["inspect", str(DIT)]) == 0
    shown = capsys.readouterr().out
    assert "--prediction and --num_heads are missing" in shown
    found = inspected(capsys, str(DIT), "--prediction", "velocity", "--data_at", "1", "--num_heads", "3")
    assert (found["sigma_max"], found["defaults"]["rounding"]) == (1e4, "nearest")


@pytest.mark.parametrize(
    ("rows", "flags", "classes", "null"),
    [
        (6, {}, 5, 5),
        (6, {"num_classes": 5}, 5, 5),
        (6, {"num_classes": 6}, 6, None),
        (2, {}, 1, 1),
        (1, {}, 0, None),
        (0, {}, 0, None),
    ],
)
def test_the_last_row_of_the_label_table_is_the_null_label_unless_all_are_classes(
    rows: int, flags: dict[str, Any], classes: int, null: int | None, tmp_path: Path
) -> None:
    made = job(saved(tmp_path / "w.pt", options(label_rows=rows)), **OF_DIT, **flags, steps=2)
    spec = made.networks["main"].spec
    assert (spec.num_classes, spec.null_label) == (classes, null)
    assert sampled(made, torch.arange(2)).isfinite().all()


REFUSED: list[tuple[Path, dict[str, Any], str]] = [
    (DIT, {"num_heads": 3}, "--prediction is missing, and not in the weights; give --prediction eps for DiT"),
    (DIT, {"num_heads": 3, "prediction": "velocity"}, "--data_at is missing"),
    (DIT, {"prediction": "eps"}, "--num_heads is missing"),
    (DIT, OF_DIT | {"data_at": 1}, "--data_at is 1, which this network cannot use"),
    (DIT, OF_DIT | {"num_heads": 5}, "--num_heads is 5; it must divide the width of the network, 48"),
    (DIT, OF_DIT | {"num_classes": 7}, "--num_classes is 7, but the file says 5"),
    (DIT, OF_DIT | {"image_size": 16}, "--image_size is 16, but the file says 8"),
    (DIT, OF_DIT | {"learn_sigma": False}, "--learn_sigma is False, but the file says True"),
    (DIT, OF_DIT | {"num_channels": 48}, "--num_channels is 48, which this network cannot use"),
    (DIT, OF_DIT | {"data_at": 3}, "--data_at is 3; it must be the t that holds data, 0 or 1"),
    (DIT, OF_DIT | {"num_classes": 6, "guidance": 2.0}, "the network has no null label"),
    (DIT, OF_DIT | {"sampler": "flow_euler"}, "--sampler is flow_euler, which samples flows"),
    (DIT, OF_DIT | {"sampler": "ddpm", "steps": 1001}, "--steps is 1001; for --sampler ddpm it must be at most 1000"),
    (DIT, OF_DIT | {"sampler": "ddpm", "schedule": "logsnr"}, "--schedule is 'logsnr', but --sampler ddpm has fixed"),
    (DIT, OF_DIT | {"decoder": None}, "--decoder is missing"),
    (REPA, OF_REPA | {"prediction": "eps"}, "--prediction is eps, but the file says velocity"),
    (REPA, OF_REPA | {"data_at": 1}, "--data_at is 1, but the file says 0"),
    (REPA, OF_REPA | {"sampler": "ddpm"}, "--sampler is ddpm, which samples networks of a table of alphas"),
    (REPA, OF_REPA | {"sampler": "flow_sde", "clip_denoised": True}, "--clip_denoised is True, but --sampler flow_sde"),
    (REPA, OF_REPA | {"sampler": "flow_heun", "schedule": "karras"}, "--sampler flow_heun has fixed times"),
    (REPA, OF_REPA | {"sampler": "flow_heun", "sigmas": "80,1"}, "--sampler flow_heun has fixed times"),
    (REPA, OF_REPA | {"shift": 2.0}, "only --schedule shifted has a shift"),
    (Path("digits"), {"prediction": "eps"}, "--prediction is eps, which this network cannot use"),
    (Path("digits"), {"sampler": "flow_euler"}, "--sampler is flow_euler, which samples flows"),
]


@pytest.mark.parametrize(("model", "flags", "sentence"), REFUSED, ids=[f"{i}" for i in range(len(REFUSED))])
def test_a_wrong_request_is_one_sentence(model: Path, flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError) as error:
        job(model, **flags)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_another_transformer_is_refused(tmp_path: Path) -> None:
    """As LightningDiT's, whose perceptrons have other names."""
    state = {name.replace("mlp.fc1", "mlp.w12"): tensor for name, tensor in weights(options()).items()}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(RequestError, match="it is another transformer than those of DiT, SiT and REPA"):
        job(tmp_path / "w.pt", **OF_DIT)
    torch.save({**weights(options()), "blocks.0.gate": torch.zeros(3)}, tmp_path / "w.pt")
    with pytest.raises(RequestError, match=r"1 unexpected \(blocks.0.gate\); it is another transformer"):
        job(tmp_path / "w.pt", **OF_DIT)


# Guidance by another network.


def test_a_smaller_network_guides_one_with_a_variance(tmp_path: Path) -> None:
    """The guide has other heads, classes or none, and no variance; what is learned stays the network's own."""
    guide = saved(tmp_path / "guide.pt", options(out_channels=4, depth=1, width=36, mlp_width=36, label_rows=1))
    flags: dict[str, Any] = OF_DIT | {"sampler": "ddpm", "steps": 4, "labels": "1,2,3"}
    alone, halved = (sampled(job(DIT, **flags, guide=str(guide), guidance=w), torch.arange(3)) for w in (1.0, 0.5))
    assert halved.isfinite().all()
    assert not torch.allclose(alone, halved)
    assert halved.shape == (3, 4, 8, 8)


def test_autoguidance_by_itself_changes_nothing() -> None:
    flags: dict[str, Any] = OF_REPA | {"sampler": "flow_heun", "steps": 4, "prediction": "velocity", "data_at": 0}
    alone = sampled(job(REPA, **flags), torch.arange(2))
    guided = sampled(job(REPA, **flags, guide=str(REPA), guidance=3.0), torch.arange(2))
    torch.testing.assert_close(alone, guided, rtol=1e-5, atol=1e-5)


# Both directions of time, and every sigma solver.


def test_time_may_run_either_way(tmp_path: Path) -> None:
    """The velocity points to noise, and t runs from 1 to 0, whatever the network's own time does; D is x_t - t v."""
    path = saved(tmp_path / "w.pt", options(out_channels=4))
    for data_at in (0, 1):
        made = job(path, prediction="velocity", data_at=data_at, num_heads=3)
        network, kind = loaded(made.networks["main"]), made.plan.parameterisation
        assert isinstance(kind, Preconditioned)
        x, y, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 2]), torch.tensor(0.3).double()
        own = network(x.float(), torch.full((2,), 1 - 0.3 if data_at else 0.3), y).double()
        v = kind.velocity(network, y)(x, t)
        torch.testing.assert_close(v, -own if data_at else own, rtol=1e-5, atol=1e-5)
        denoised = kind.denoiser(network, y)(x / (1 - t), t / (1 - t))
        torch.testing.assert_close(denoised, x - t * v, rtol=1e-5, atol=1e-5)
        assert kind.velocity(network, y)(x, torch.tensor(1.0).double()).isfinite().all()


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "unipc", "ancestral"])
def test_flows_and_eps_networks_serve_solvers_in_sigma(sampler: str) -> None:
    for model, flags in ((DIT, OF_DIT), (REPA, OF_REPA)):
        x = sampled(job(model, **flags, sampler=sampler, steps=6, guidance=1.5), torch.arange(2))
        assert x.dtype == torch.float64
        assert x.isfinite().all()
