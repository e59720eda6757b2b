"""Code written for the consistency-models repository runs with its import lines changed, and gives the same numbers."""

from __future__ import annotations

import argparse
import inspect
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ray_sampler.compat as compat
from ray_sampler.compat import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    get_generator,
    karras_sample,
    model_and_diffusion_defaults,
)
from ray_sampler.config import RequestError
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.parameterisation import edm_scalings
from ray_sampler.sampling.schedules import karras_sigmas
from tests.networks.golden import golden_flags, golden_folder, golden_state

REQUIRED = inspect.Parameter.empty
SAMPLE_ARGUMENTS = {
    "diffusion": REQUIRED,
    "model": REQUIRED,
    "shape": REQUIRED,
    "steps": REQUIRED,
    "clip_denoised": True,
    "progress": False,
    "callback": None,
    "model_kwargs": None,
    "device": None,
    "sigma_min": 0.002,
    "sigma_max": 80,
    "rho": 7.0,
    "sampler": "heun",
    "s_churn": 0.0,
    "s_tmin": 0.0,
    "s_tmax": float("inf"),
    "s_noise": 1.0,
    "generator": None,
    "ts": None,
}
MODEL_DEFAULTS = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "32,16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_fp16": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "weight_schedule": "karras",
}
GENERATOR_ARGUMENTS = {"generator": REQUIRED, "num_samples": 0, "seed": 0}
SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8"}


def arguments_of(function: Any) -> list[tuple[str, Any]]:
    return [(name, p.default) for name, p in inspect.signature(function).parameters.items()]


def test_signatures_and_defaults_are_the_originals() -> None:
    assert arguments_of(karras_sample) == list(SAMPLE_ARGUMENTS.items())
    assert arguments_of(get_generator) == list(GENERATOR_ARGUMENTS.items())
    assert model_and_diffusion_defaults() == MODEL_DEFAULTS
    assert {name for name, _ in arguments_of(create_model_and_diffusion)} == MODEL_DEFAULTS.keys() | {"distillation"}
    assert NUM_CLASSES == 1000


# A sampling function in the original's style


class Arguments:
    training_mode = "consistency_distillation"
    generator = "determ-indiv"
    clip_denoised = True
    num_samples = 5
    batch_size = 2
    sampler = "multistep"
    s_churn = 0.0
    s_tmin = 0.0
    s_tmax = float("inf")
    s_noise = 1.0
    steps = 40
    model_path = ""
    seed = 42
    ts = "0,22,39"
    sigma_min = 0.002
    sigma_max = 80.0
    image_size = 16
    num_channels = 32
    num_res_blocks = 1
    num_heads = 4
    num_heads_upsample = -1
    num_head_channels = 32
    attention_resolutions = "8"
    channel_mult = "1,2"
    dropout = 0.0
    class_cond = True
    use_checkpoint = False
    use_scale_shift_norm = True
    resblock_updown = True
    use_fp16 = True
    use_new_attention_order = False
    learn_sigma = False
    weight_schedule = "uniform"


def sample_as_the_original_does(args: Arguments, out: Path, device: str) -> None:
    distillation = "consistency" in args.training_mode
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(args, model_and_diffusion_defaults().keys()), distillation=distillation
    )
    model.load_state_dict(torch.load(args.model_path, map_location="cpu"))
    model.to(device)
    if args.use_fp16:
        model.convert_to_fp16()
    model.eval()

    ts = tuple(int(x) for x in args.ts.split(",")) if args.sampler == "multistep" else None
    all_images: list[np.ndarray] = []
    all_labels: list[np.ndarray] = []
    generator = get_generator(args.generator, args.num_samples, args.seed)
    while len(all_images) * args.batch_size < args.num_samples:
        model_kwargs = {}
        if args.class_cond:
            model_kwargs["y"] = torch.randint(low=0, high=NUM_CLASSES, size=(args.batch_size,), device=device)
        sample = karras_sample(
            diffusion,
            model,
            (args.batch_size, 3, args.image_size, args.image_size),
            steps=args.steps,
            model_kwargs=model_kwargs,
            device=device,
            clip_denoised=args.clip_denoised,
            sampler=args.sampler,
            sigma_min=args.sigma_min,
            sigma_max=args.sigma_max,
            s_churn=args.s_churn,
            s_tmin=args.s_tmin,
            s_tmax=args.s_tmax,
            s_noise=args.s_noise,
            generator=generator,
            ts=ts,
        )
        sample = ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8)
        sample = sample.permute(0, 2, 3, 1).contiguous()
        all_images.append(sample.cpu().numpy())
        all_labels.append(model_kwargs["y"].cpu().numpy())
    images = np.concatenate(all_images, axis=0)[: args.num_samples]
    labels = np.concatenate(all_labels, axis=0)[: args.num_samples]
    np.savez(out, images, labels)


def test_a_sampling_function_in_the_originals_style_runs_unchanged(tmp_path: Path) -> None:
    args = Arguments()
    args.model_path = str(tmp_path / "model.pt")
    model, _ = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    torch.save({name: torch.randn_like(t) * 0.05 for name, t in model.state_dict().items()}, args.model_path)
    sample_as_the_original_does(args, tmp_path / "samples_5x16x16x3.npz", "cpu")
    with np.load(tmp_path / "samples_5x16x16x3.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (5, 16, 16, 3)
    assert images.dtype == np.uint8
    assert images.std() > 0
    assert labels.shape == (5,)
    assert labels.dtype == np.int64


# The same numbers


@pytest.fixture(scope="module")
def golden_model() -> UNet:
    model, _ = create_model_and_diffusion(**golden_flags())
    model.load_state_dict(golden_state())
    return model.eval()


CHURN = {"s_churn": 3, "s_tmin": 0.05, "s_tmax": 50, "s_noise": 1.003}
CASES: dict[str, dict[str, Any]] = {
    "heun": {"sampler": "heun", "steps": 6},
    "heun_noclip": {"sampler": "heun", "steps": 6, "clip_denoised": False},
    "heun_churn": {"sampler": "heun", "steps": 6} | CHURN,
    "euler": {"sampler": "euler", "steps": 6},
    "dpm": {"sampler": "dpm", "steps": 6},
    "dpm_churn": {"sampler": "dpm", "steps": 6} | CHURN,
    "ancestral": {"sampler": "ancestral", "steps": 6},
    "onestep": {"sampler": "onestep", "steps": 6},
    "progdist": {"sampler": "progdist", "steps": 6},
    "multistep": {"sampler": "multistep", "steps": 40, "ts": (0, 17, 39)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("preconditioning", "generator"), [("edm", "determ-indiv"), ("consistency", "determ")])
def test_samples_are_the_originals_within_1e_4(
    preconditioning: str, generator: str, case: str, golden_model: UNet
) -> None:
    _, diffusion = create_model_and_diffusion(**golden_flags(), distillation=preconditioning == "consistency")
    x_0 = karras_sample(
        diffusion,
        golden_model,
        (4, 3, 32, 32),
        generator=get_generator(generator, 4, 42),
        model_kwargs={"y": torch.tensor([0, 3, 999, 500])},
        **CASES[case],
    )
    with np.load(golden_folder() / "samples.npz") as golden:
        expected = golden[f"{preconditioning}/{generator}/{case}"]
    assert np.abs(x_0.numpy() - expected).max() < 1e-4


def test_no_golden_case_is_left_out() -> None:
    with np.load(golden_folder() / "samples.npz") as golden:
        assert {name.split("/")[2] for name in golden.files} == CASES.keys()


# karras_sample's arguments


class Halving(nn.Module):
    """A network quick enough to count with."""

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        return x * 0.5 if y is None else x * 0.5 + y[:, None, None, None]


DIFFUSION = compat.KarrasDenoiser()


def quick(sampler: str, **arguments: Any) -> Tensor:
    ts = (0, 2, 4) if sampler == "multistep" else None
    shape = (2, 3, 4, 4)
    return karras_sample(DIFFUSION, Halving(), shape, 5, sampler=sampler, ts=ts, sigma_max=80.0, **arguments)


def test_without_model_kwargs_the_model_gets_none() -> None:
    assert quick("heun", model_kwargs=None, generator=get_generator("determ", 2, 1)).shape == (2, 3, 4, 4)
    with_labels = quick("onestep", model_kwargs={"y": torch.tensor([5.0, 5.0])}, clip_denoised=False)
    assert with_labels.isfinite().all()


def test_the_result_is_in_range_on_the_device_and_without_gradients() -> None:
    x_0 = quick("euler", clip_denoised=False)
    assert x_0.dtype == torch.float32
    assert x_0.abs().max() <= 1
    assert not x_0.requires_grad


def test_without_a_generator_torchs_own_serves() -> None:
    torch.manual_seed(3)
    first = quick("ancestral")
    torch.manual_seed(3)
    assert torch.equal(first, quick("ancestral", generator=get_generator("dummy")))
    assert not torch.equal(first, quick("ancestral"))


@pytest.mark.parametrize("sampler", ["heun", "dpm", "euler", "ancestral", "progdist"])
def test_the_callback_sees_each_step_once(sampler: str) -> None:
    seen: list[dict[str, Any]] = []
    quick(sampler, callback=seen.append, s_churn=2.0, generator=get_generator("determ", 2, 1))
    sigmas = karras_sigmas(5 + (sampler == "progdist"), 0.002, 80.0)
    assert [state["i"] for state in seen] == list(range(5))
    for i, state in enumerate(seen):
        assert state["sigma"] == sigmas[i]
        assert ("sigma_hat" in state) == (sampler in ("heun", "dpm", "ancestral"))
        level = state.get("sigma_hat", state["sigma"])
        assert level == (sigmas[i] * 1.4 if sampler in ("heun", "dpm") else sigmas[i])
        c_skip, c_out, c_in = edm_scalings(level)
        expected = (c_skip * state["x"] + c_out * (c_in * state["x"] * 0.5)).clamp(-1, 1)
        torch.testing.assert_close(state["denoised"], expected)


def test_solvers_of_few_evaluations_report_no_step() -> None:
    seen: list[dict[str, Any]] = []
    for sampler in ("onestep", "multistep"):
        quick(sampler, callback=seen.append)
    assert seen == []


def test_progress_shows_a_bar_and_is_silent_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    quick("heun")
    assert capsys.readouterr().out == ""
    quick("heun", progress=True)
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sampler": "ddim"}, "it must be one of heun"),
        ({"sampler": "heun", "sigma_min": 90.0}, "sigma_min < sigma_max"),
    ],
)
def test_a_wrong_argument_is_one_sentence(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        quick(**arguments)


@pytest.mark.parametrize("change", [{"learn_sigma": True}, {"image_size": 48, "channel_mult": ""}])
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(change))):
        create_model_and_diffusion(**(model_and_diffusion_defaults() | SMALL | change))


def test_the_preconditioning_is_at_hand() -> None:
    model, diffusion = create_model_and_diffusion(**(model_and_diffusion_defaults() | SMALL), distillation=True)
    assert (diffusion.sigma_data, diffusion.sigma_min, diffusion.sigma_max, diffusion.rho) == (0.5, 0.002, 80.0, 7.0)
    assert diffusion.distillation
    x = torch.randn(2, 3, 16, 16)
    output, denoised = diffusion.denoise(model, x, torch.tensor([0.002, 10.0]))
    assert output.shape == x.shape
    torch.testing.assert_close(denoised[0], x[0], msg="a consistency model leaves x at sigma_min as it is")


@pytest.mark.parametrize("name", ["determ", "determ-indiv"])
@pytest.mark.parametrize(
    ("sampler", "draws"),
    [("heun", 6), ("dpm", 6), ("ancestral", 6), ("euler", 1), ("progdist", 1), ("onestep", 1), ("multistep", 3)],
)
def test_a_solver_leaves_the_streams_where_the_original_does(name: str, sampler: str, draws: int) -> None:
    generator, reference = get_generator(name, 2, 9), get_generator(name, 2, 9)
    quick(sampler, generator=generator)
    for _ in range(draws):
        reference.randn(2, 3, 4, 4)
    assert torch.equal(generator.randn(2, 3, 4, 4), reference.randn(2, 3, 4, 4))


# Arguments


def test_defaults_become_options_of_their_type() -> None:
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, model_and_diffusion_defaults() | {"ts": "", "model_path": None, "steps": 40})
    args = parser.parse_args(shlex.split("--class_cond True --use_fp16 no --steps 3 --sigma_max 1 --model_path a.pt"))
    assert (args.class_cond, args.use_fp16, args.steps, args.sigma_max, args.model_path) == (
        True,
        False,
        3,
        1.0,
        "a.pt",
    )
    assert args_to_dict(args, ["ts", "image_size"]) == {"ts": "", "image_size": 64}
    with pytest.raises(SystemExit):
        parser.parse_args(["--class_cond", "perhaps"])


@pytest.mark.parametrize("ts", [(4, 2, 0), (2, 2), (0, 2)])
def test_multistep_takes_indices_in_any_order_as_the_original_does(ts: tuple[int, ...]) -> None:
    x_0 = karras_sample(DIFFUSION, Halving(), (2, 3, 4, 4), 5, sampler="multistep", ts=ts, sigma_max=80.0)
    assert x_0.isfinite().all()
