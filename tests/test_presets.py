"""What the published checkpoints need is known by name, and their published command lines run as they are."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ray_sampler.cli import main
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks import opening
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.opening import open_network
from ray_sampler.networks.weights import weights_hash
from ray_sampler.options import of
from ray_sampler.presets import BUNDLED, PRESETS, ModelOptions, check_bundled, model_of
from tests import resolving
from tests.resolving import Run

ROOT = Path(__file__).resolve().parents[1]

PUBLISHED = {
    "edm-imagenet64": ("edm_imagenet64_ema.pt", "edm", "heun", 40, ""),
    "cd-imagenet64-l2": ("cd_imagenet64_l2.pt", "consistency_distillation", "multistep", 40, "0,22,39"),
    "cd-imagenet64-lpips": ("cd_imagenet64_lpips.pt", "consistency_distillation", "multistep", 40, "0,22,39"),
    "ct-imagenet64": ("ct_imagenet64.pt", "consistency_training", "multistep", 201, "0,106,200"),
    "edm-bedroom256": ("edm_bedroom256_ema.pt", "edm", "heun", 40, ""),
    "cd-bedroom256-l2": ("cd_bedroom256_l2.pt", "consistency_distillation", "multistep", 40, "0,18,39"),
    "cd-bedroom256-lpips": ("cd_bedroom256_lpips.pt", "consistency_distillation", "multistep", 40, "0,17,39"),
    "ct-bedroom256": ("ct_bedroom256.pt", "consistency_training", "multistep", 151, "0,67,150"),
    "edm-cat256": ("edm_cat256_ema.pt", "edm", "heun", 40, ""),
    "cd-cat256-l2": ("cd_cat256_l2.pt", "consistency_distillation", "onestep", 40, ""),
    "cd-cat256-lpips": ("cd_cat256_lpips.pt", "consistency_distillation", "onestep", 40, ""),
    "ct-cat256": ("ct_cat256.pt", "consistency_training", "multistep", 151, "0,62,150"),
}
"""File, training_mode, sampler, steps and ts."""

IMAGENET = (
    "--attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True --dropout 0.0 --image_size 64 "
    "--num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 500 --resblock_updown True "
    "--use_fp16 True --weight_schedule uniform"
)
LSUN = (
    "--attention_resolutions 32,16,8 --class_cond False --use_scale_shift_norm False --dropout 0.0 --image_size 256 "
    "--num_channels 256 --num_head_channels 64 --num_res_blocks 2 --num_samples 500 --resblock_updown True "
    "--use_fp16 True --weight_schedule uniform"
)
CD = "--training_mode consistency_distillation"
CT = "--training_mode consistency_training"
COMMAND_LINES = {
    "edm-imagenet64": (
        "--training_mode edm --batch_size 64 --sigma_max 80 --sigma_min 0.002 --s_churn 0 --steps 40 --sampler heun "
        "--model_path edm_imagenet64_ema.pt --attention_resolutions 32,16,8  --class_cond True --dropout 0.1 "
        "--image_size 64 --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 50000 "
        "--resblock_updown True --use_fp16 True --use_scale_shift_norm True --weight_schedule karras"
    ),
    "edm-bedroom256": (
        "--training_mode edm --generator determ-indiv --batch_size 8 --sigma_max 80 --sigma_min 0.002 --s_churn 0 "
        "--steps 40 --sampler heun --model_path /path/to/edm_bedroom256_ema.pt --attention_resolutions 32,16,8  "
        "--class_cond False --dropout 0.1 --image_size 256 --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --num_samples 50000 --resblock_updown True --use_fp16 True --use_scale_shift_norm False "
        "--weight_schedule karras"
    ),
    "cd-imagenet64 onestep": f"--batch_size 256 {CD} --sampler onestep --model_path /path/to/checkpoint {IMAGENET}",
    "ct-bedroom256 onestep": (
        f"--batch_size 32 --generator determ-indiv {CD} --sampler onestep "
        "--model_path /path/to/ct_bedroom256.pt " + LSUN.replace("500", "100")
    ),
    "cd-imagenet64-lpips": (
        f"--batch_size 256 {CD} --sampler multistep --ts 0,22,39 --steps 40 "
        f"--model_path /path/to/cd_imagenet64_lpips.pt {IMAGENET}"
    ),
    "cd-imagenet64-l2": (
        f"--batch_size 256 {CD} --sampler multistep --ts 0,22,39 --steps 40 "
        f"--model_path /path/to/cd_imagenet64_l2.pt {IMAGENET}"
    ),
    "ct-imagenet64": (
        f"--batch_size 256 {CT} --sampler multistep --ts 0,106,200 --steps 201 "
        f"--model_path /path/to/ct_imagenet64.pt {IMAGENET}"
    ),
    "cd-bedroom256-lpips": (
        f"--batch_size 32 {CD} --sampler multistep --ts 0,17,39 --steps 40 "
        f"--model_path /path/to/cd_bedroom256_lpips.pt {LSUN}"
    ),
    "cd-bedroom256-l2": (
        f"--batch_size 32 {CD} --sampler multistep --ts 0,18,39 --steps 40 "
        f"--model_path /path/to/cd_bedroom256_l2.pt {LSUN}"
    ),
    "ct-bedroom256": (
        f"--batch_size 32 {CD} --sampler multistep --ts 0,67,150 --steps 151 "
        f"--model_path /path/to/ct_bedroom256.pt {LSUN}"
    ),
    "ct-cat256": (
        f"--batch_size 32 {CD} --sampler multistep --ts 0,62,150 --steps 151 --model_path /path/to/ct_cat256.pt {LSUN}"
    ),
}
"""The published sampling command lines, from image_sample.py on, by the model that each is for."""


def resolved(**flags: Any) -> Run:
    request = RunConfig(**flags)
    model, brought = model_of(request)
    return resolving.resolved(request, model, brought)


def test_the_twelve_published_checkpoints_have_a_preset() -> None:
    assert PRESETS.keys() >= PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_fills_what_was_published(name: str) -> None:
    file, training_mode, sampler, steps, ts = PUBLISHED[name]
    run = resolved(preset=name, model_path=file)
    assert run.config.model == PRESETS[name].file == file
    expected = {"training_mode": training_mode, "sampler": sampler, "steps": steps, "ts": ts}
    expected |= {"sigma_min": 0.002, "sigma_max": 80.0, "s_churn": 0.0}
    assert run.settings.items() >= expected.items()
    imagenet = "imagenet64" in name
    architecture = AdmOptions(
        image_size=64 if imagenet else 256,
        num_channels=192 if imagenet else 256,
        num_res_blocks=3 if imagenet else 2,
        num_head_channels=64,
        attention_resolutions="32,16,8",
        resblock_updown=True,
        use_scale_shift_norm=imagenet,
        class_cond=imagenet,
    )
    assert run.spec.options == architecture
    assert PRESETS[name].settings["class_cond"] == imagenet


def test_the_size_of_a_bundled_model_cannot_be_contradicted() -> None:
    check_bundled("digits", {"image_size": 32})
    check_bundled("w.pt", {"image_size": 64})
    with pytest.raises(RequestError, match="--image_size is 64, but the bundled model digits has 32"):
        prepare(RunConfig(image_size=64))


def test_an_explicit_flag_wins_over_a_preset() -> None:
    run = resolved(preset="cd-imagenet64-lpips", model="w.pt", sampler="onestep", num_channels=64, class_cond=False)
    assert (run.plan.sampler, run.spec.options.num_channels, run.spec.num_classes) == ("onestep", 64, 0)
    assert run.spec.options.num_res_blocks == 3, "the rest stays the preset's"
    assert resolved(preset="ct-cat256", model="w.pt", ts="0,75,150").settings["ts"] == "0,75,150"


def test_a_preset_beside_a_bundled_model_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^--preset is 'edm-imagenet64' beside --model digits"):
        resolved(model="digits", preset="edm-imagenet64")


def test_without_a_model_the_bundled_digits_run_with_their_own_settings() -> None:
    run = resolved()
    assert run.config.model == "digits"
    assert (run.plan.sampler, run.plan.schedule.steps, run.settings["training_mode"]) == ("dpmpp_2m_sde", 12, "edm")
    assert (run.spec.shape, run.spec.num_classes, run.spec.null_label) == ((3, 32, 32), 10, 10)
    assert resolved(model_path="digits").spec == run.spec


def test_the_consistency_digits_take_one_step_or_two() -> None:
    assert resolved(model="digits-cd").plan.sampler == "onestep"
    two = resolved(model="digits-cd", sampler="multistep")
    assert (two.settings["steps"], two.settings["ts"], two.spec.kind) == (18, "0,9,17", "consistency")
    assert two.spec.options == resolved(model="digits-v1").spec.options


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"model": "a.pt", "model_path": "b.pt"}, "--model a.pt and --model_path b.pt name two models"),
        ({"model": "digits", "model_path": "b.pt"}, "give one of the two"),
        ({"preset": "cd-imagenet-lpips", "model": "a.pt"}, "cd-imagenet64-lpips"),
        ({"preset": "something", "model": "a.pt"}, "unknown --preset 'something'; `ray-sampler presets` lists them"),
        ({"preset": "digits"}, "'digits', a bundled model; give --model digits"),
        ({"model": "digit"}, "neither a file nor a bundled model; did you mean digits or "),
        ({"model": "imagenet"}, "the bundled models are digits, digits-latent, digits-v1, digits-cd"),
        ({"model": "ct-cat256"}, "a preset; give --preset ct-cat256"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_wrong_model_is_refused_with_the_right_one(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as refused:
        model_of(ModelOptions(**flags))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["w.pt", "./digits", "/path/to/checkpoint", "s3://bucket/w.safetensors", "folder/w"])
def test_a_path_or_url_is_not_a_name(path: str) -> None:
    assert model_of(ModelOptions(model=path)) == (path, {})
    assert model_of(ModelOptions(model=path, model_path=path)) == (path, {})


@pytest.mark.parametrize("name", [name for name, model in BUNDLED.items() if "num_channels" in model.settings])
def test_a_bundled_name_opens_the_file_in_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights in place of the package's."""
    settings = BUNDLED[name].settings
    state = UNet(of(AdmOptions, settings)).state_dict()
    (tmp_path / "digits").mkdir()
    save_file(state, tmp_path / "digits" / f"{name}.safetensors")
    monkeypatch.setattr(opening, "files", lambda package: tmp_path)
    assert open_network(name, settings).weights == weights_hash(state)
    torch.save(state, tmp_path / "w.pt")
    assert open_network(str(tmp_path / "w.pt"), settings).weights == weights_hash(state)


# The published command lines


def flags_of(command_line: str) -> dict[str, str]:
    words = shlex.split(command_line)
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


@pytest.mark.parametrize("model", COMMAND_LINES)
def test_a_published_command_line_is_accepted_as_it_is(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *shlex.split(COMMAND_LINES[model]), "--dry_run"]) == 0
    run = json.loads(capsys.readouterr().out)
    given = flags_of(COMMAND_LINES[model])
    assert run["model"] == given.pop("model_path")
    assert run["precision"] == ("fp16" if given.pop("use_fp16") == "True" else "auto")
    for flag, value in given.items():
        kind = type(run[flag])
        assert run[flag] == (value == "True" if kind is bool else kind(value)), flag
    assert list(tmp_path.iterdir()) == [], "a dry run touches nothing"


def test_only_the_launcher_of_a_published_command_line_is_replaced(tmp_path: Path) -> None:
    command = f"{sys.executable} {ROOT / 'jobs' / 'sample.py'} {COMMAND_LINES['cd-imagenet64-lpips']} --dry_run"
    ran = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["ts"] == "0,22,39"


@pytest.mark.parametrize("model", [name for name in COMMAND_LINES if name in PRESETS])
def test_a_preset_means_what_its_published_command_line_does(model: str) -> None:
    given = flags_of(COMMAND_LINES[model])
    run = resolved(preset=model, model_path=given["model_path"])
    stated = run.as_json()
    for flag in ("attention_resolutions", "image_size", "num_channels", "num_head_channels", "num_res_blocks"):
        assert str(stated[flag]) == given[flag], flag
    for flag in ("class_cond", "use_scale_shift_norm", "resblock_updown", "sampler", "steps", "ts"):
        assert str(stated[flag]) == given.get(flag, ""), flag
    assert (run.spec.kind == "consistency") == ("consistency" in given["training_mode"])
