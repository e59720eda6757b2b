"""A request resolves to one run, or is refused in one sentence."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from typing import Any

import pytest

from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.options import flags_of
from tests.resolving import NO_HEADS, SMALL, resolve, resolved

# Wrong requests.

MULTISTEP: dict[str, Any] = {"sampler": "multistep"}

WRONG: list[tuple[dict[str, Any], str, str]] = [
    # flags, the flag that the sentence names, the value that it names
    ({"image_size": 0}, "--image_size", "0"),
    ({"image_size": 33}, "--image_size", "33"),
    ({"image_size": 48, "channel_mult": ""}, "--image_size", "48"),
    ({"num_channels": 0}, "--num_channels", "0"),
    ({"num_channels": 48}, "--num_channels", "48"),
    ({"num_res_blocks": 0}, "--num_res_blocks", "0"),
    ({"num_classes": 0}, "--num_classes", "0"),
    ({"num_heads": 0}, "--num_heads", "0"),
    ({"num_heads_upsample": 0}, "--num_heads_upsample", "0"),
    ({"num_head_channels": 0}, "--num_head_channels", "0"),
    ({"num_head_channels": -2}, "--num_head_channels", "-2"),
    ({"num_head_channels": 48}, "--num_head_channels", "48"),
    ({"num_head_channels": 128}, "--num_head_channels", "128"),
    (NO_HEADS | {"num_heads": 3}, "--num_heads", "3"),
    (NO_HEADS | {"num_heads": 4, "num_heads_upsample": 3}, "--num_heads_upsample", "3"),
    ({"channel_mult": "1,x"}, "--channel_mult", "1,x"),
    ({"channel_mult": "1,,2"}, "--channel_mult", "1,,2"),
    ({"channel_mult": "1,-1"}, "--channel_mult", "1,-1"),
    ({"channel_mult": "1,0.01"}, "--channel_mult", "0.01"),
    ({"channel_mult": "1,inf"}, "--channel_mult", "inf"),
    ({"channel_mult": "1,nan"}, "--channel_mult", "nan"),
    ({"attention_resolutions": "16,a"}, "--attention_resolutions", "16,a"),
    ({"attention_resolutions": "16,0"}, "--attention_resolutions", "16,0"),
    ({"attention_resolutions": "8.5"}, "--attention_resolutions", "8.5"),
    ({"dropout": 1.0}, "--dropout", "1.0"),
    ({"dropout": -0.1}, "--dropout", "-0.1"),
    ({"steps": 0}, "--steps", "0"),
    ({"sigma_min": 0.0}, "--sigma_min", "0"),
    ({"sigma_min": -1.0}, "--sigma_min", "-1"),
    ({"sigma_min": 90.0}, "--sigma_min", "90"),
    ({"sigma_min": math.nan}, "--sigma_min", "nan"),
    ({"sigma_max": 0.001}, "--sigma_max", "0.001"),
    ({"sigma_max": math.inf}, "--sigma_max", "inf"),
    ({"s_churn": -1.0}, "--s_churn", "-1"),
    ({"s_churn": math.nan}, "--s_churn", "nan"),
    ({"s_churn": math.inf}, "--s_churn", "inf"),
    ({"s_tmin": -0.5}, "--s_tmin", "-0.5"),
    ({"s_noise": -1.0}, "--s_noise", "-1"),
    ({"s_tmin": 2.0, "s_tmax": 1.0}, "--s_tmax", "1"),
    ({"s_tmax": math.nan}, "--s_tmax", "nan"),
    ({"seed": -1}, "--seed", "-1"),
    ({"seed": 2**64}, "--seed", str(2**64)),
    ({"seed": 2**60, "generator": "determ-indiv", "num_samples": 100}, "--seed", str(2**60)),
    (MULTISTEP, "--ts", "''"),
    (MULTISTEP | {"ts": "0"}, "--ts", "'0'"),
    (MULTISTEP | {"ts": "0,40"}, "--ts", "40"),
    (MULTISTEP | {"ts": "-1,39"}, "--ts", "-1"),
    (MULTISTEP | {"ts": "0,22,39", "steps": 30}, "--ts", "39"),
    (MULTISTEP | {"ts": "0,0", "steps": 1}, "--steps", "1"),
    (MULTISTEP | {"ts": "0,0,39"}, "--ts", "0 follows 0"),
    (MULTISTEP | {"ts": "0,22,17"}, "--ts", "17 follows 22"),
    (MULTISTEP | {"ts": "39,0"}, "--ts", "0 follows 39"),
    ({"ts": "0,x"}, "--ts", "0,x"),
    ({"ts": "0,1.5"}, "--ts", "0,1.5"),
    ({"ts": "0,,1"}, "--ts", "0,,1"),
    ({"num_samples": 0}, "--num_samples", "0"),
    ({"num_samples": 10**12 + 1}, "--num_samples", str(10**12 + 1)),
    ({"batch_size": 0}, "--batch_size", "0"),
    ({"shard_size": 0}, "--shard_size", "0"),
    ({"min_actors": -1}, "--min_actors", "-1"),
    ({"max_actors": 0}, "--max_actors", "0"),
    ({"min_actors": 3, "max_actors": 2}, "--min_actors", "3"),
    ({"gpus_per_actor": -0.5}, "--gpus_per_actor", "-0.5"),
    ({"gpus_per_actor": 1.5}, "--gpus_per_actor", "1.5"),
    ({"gpus_per_actor": math.inf}, "--gpus_per_actor", "inf"),
    ({"gpus_per_actor": math.nan}, "--gpus_per_actor", "nan"),
    ({"shard_timeout": 0.0}, "--shard_timeout", "0"),
    ({"shard_timeout": math.inf}, "--shard_timeout", "inf"),
    ({"labels": "balanced"}, "--labels", "balanced"),
    ({"labels": "0,3,999", "class_cond": False}, "--labels", "0,3,999"),
    ({"use_fp16": True, "precision": "fp32"}, "--use_fp16", "True"),
    ({"use_fp16": True, "precision": "bf16"}, "--precision", "bf16"),
    ({"use_fp16": False, "precision": "fp16"}, "--use_fp16", "False"),
    ({"training_mode": "ddpm"}, "--training_mode", "ddpm"),
    ({"sampler": "ddim"}, "--sampler", "ddim"),
    ({"generator": "mersenne"}, "--generator", "mersenne"),
    ({"rounding": "up"}, "--rounding", "up"),
    ({"precision": "fp8"}, "--precision", "fp8"),
    ({"fragment_format": "zarr"}, "--fragment_format", "zarr"),
    ({"compile": "maybe"}, "--compile", "maybe"),
    ({"progress": "dots"}, "--progress", "dots"),
]


@pytest.mark.parametrize(("flags", "flag", "value"), WRONG, ids=[str(flags) for flags, _, _ in WRONG])
def test_a_wrong_request_gets_one_sentence_with_the_flag_and_the_value(
    flags: dict[str, Any], flag: str, value: str
) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(**flags)
    sentence = str(refused.value)
    assert re.search(rf"{flag}\b", sentence)
    assert value in sentence.replace(flag, "")
    assert "\n" not in sentence
    assert ". " not in sentence
    assert not sentence.endswith(".")
    assert len(sentence) < 250


def test_a_wrong_value_is_refused_whoever_brought_it() -> None:
    with pytest.raises(RequestError, match=r"--steps is 0; it must be at least 1"):
        resolve(SMALL | {"steps": 0})
    with pytest.raises(RequestError, match=r"--num_channels 48 with"):
        resolve(SMALL | {"num_channels": 48})


@pytest.mark.parametrize(
    "flags",
    [
        {"seed": 0},
        {"seed": 2**64 - 1},
        {"seed": 2**64 - 1, "generator": "determ"},
        {"generator": "determ-indiv", "num_samples": 2**30, "seed": 2**34 - 1},
        {"steps": 1},
        {"sampler": "onestep", "steps": 1},
        {"sampler": "multistep", "ts": "0,39"},
        {"sampler": "multistep", "ts": "0,1", "steps": 2},
        {"s_tmax": math.inf},
        {"s_tmin": 1.0, "s_tmax": 1.0},
        {"num_samples": 1},
        {"num_samples": 10**12},
        {"min_actors": 0},
        {"min_actors": 2, "max_actors": 2},
        {"gpus_per_actor": 0.0},
        {"gpus_per_actor": 0.25},
        {"gpus_per_actor": 1.0},
        {"attention_resolutions": ""},
        {"attention_resolutions": "64,16"},
        {"learn_sigma": True},
        {"use_fp16": True, "precision": "fp16"},
        {"use_fp16": False, "precision": "bf16"},
        {"labels": "random", "class_cond": True},
        {"use_checkpoint": True, "use_new_attention_order": True, "weight_schedule": "uniform", "dropout": 0.1},
    ],
)
def test_an_unusual_request_is_not_wrong(flags: dict[str, Any]) -> None:
    resolve(**flags).identity("hash")


@pytest.mark.parametrize("size", [64, 128, 256, 512])
def test_the_published_sizes_need_no_channel_mult(size: int) -> None:
    run = resolve({}, image_size=size)
    levels = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}[size]
    assert run.spec.options.channel_multipliers == levels


# Right ones.


def test_without_anything_said_the_originals_defaults_apply() -> None:
    run = resolve({})
    assert run.spec.options == AdmOptions()
    expected = {"training_mode": "edm", "sampler": "heun", "steps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "ts": ""}
    expected |= {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0, "seed": 42}
    expected |= {"clip_denoised": True, "rounding": "truncate", "generator": "philox"}
    assert {name: run.settings[name] for name in expected} == expected
    assert run.config.precision == "auto"
    assert run.config.labels is None


@pytest.mark.parametrize(
    ("name", "brought", "explicit"),
    [
        ("steps", 18, 40),
        ("sampler", "multistep", "heun"),
        ("sigma_max", 50.0, 80.0),
        ("s_churn", 10.0, 0.0),
        ("clip_denoised", True, False),
        ("training_mode", "consistency_training", "edm"),
        ("class_cond", True, False),
        ("num_channels", 64, 32),
        ("num_res_blocks", 3, 2),
        ("attention_resolutions", "16,8", ""),
    ],
)
def test_an_explicit_setting_wins_over_a_brought_one_even_where_it_is_the_default(
    name: str, brought: Any, explicit: Any
) -> None:
    settings = SMALL | {"ts": "0,9"} | {name: brought}
    for run, expected in ((resolve(settings), brought), (resolve(settings, **{name: explicit}), explicit)):
        assert run.settings[name] == expected
        assert run.as_json()[name] == expected


def test_explicit_ts_win_and_reach_the_solver() -> None:
    preset = SMALL | {"sampler": "multistep", "ts": "0,22,39"}
    assert resolve(preset).plan.identity({})["ts"] == "0,22,39"
    assert resolve(preset, ts="0, 17,39").plan.identity({})["ts"] == "0,17,39"
    assert resolve(ts="").settings["ts"] == ""


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({}, "auto"),
        ({"use_fp16": True}, "fp16"),
        ({"use_fp16": False}, "fp32"),
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "fp16", "use_fp16": True}, "fp16"),
        ({"precision": "bf16", "use_fp16": False}, "bf16"),
    ],
)
def test_use_fp16_means_a_precision(flags: dict[str, Any], precision: str) -> None:
    assert resolve(**flags).config.precision == precision


@pytest.mark.parametrize(
    ("flags", "shard_size"),
    [
        ({}, 512),
        ({"batch_size": 100}, 600),
        ({"batch_size": 16, "shard_size": 17}, 32),
        ({"batch_size": 16, "shard_size": 32}, 32),
        ({"batch_size": 1000}, 1000),
        ({"batch_size": 1, "shard_size": 1}, 1),
    ],
)
def test_shards_are_whole_batches(flags: dict[str, Any], shard_size: int) -> None:
    assert resolve(**flags).config.shard_size == shard_size


def test_a_conditional_model_has_random_labels_unless_told() -> None:
    assert resolve(class_cond=True).config.labels == "random"
    assert resolve(class_cond=True, labels="balanced").config.labels == "balanced"
    assert resolve(class_cond=False).config.labels is None


# What is shown and stored.


def test_every_setting_is_shown_as_json_under_its_flag() -> None:
    shown = resolve(use_fp16=True, model_path="digits", dry_run=True).as_json()
    unsaid = {"model_path", "use_fp16", "dry_run"}
    new = {name for name, flag in flags_of(RunConfig).items() if not flag.recorded}
    assert set(shown) == {field.name for field in fields(RunConfig)} - unsaid - new
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert (shown["model"], shown["precision"], shown["steps"], shown["num_channels"]) == ("digits", "fp16", 40, 32)


def test_settings_that_the_first_version_did_not_have_are_shown_where_they_are_given() -> None:
    shown = resolve(guidance=1.5, guide="s3://key:hidden@bucket/guide.pt", rho=5.0).as_json()
    assert (shown["guidance"], shown["guide"], shown["rho"]) == (1.5, "s3://bucket/guide.pt", 5.0)


def test_no_credential_is_shown() -> None:
    config = RunConfig(
        output="s3://key:hidden@bucket/run",
        labels="https://host/labels.npy?sig=hidden",
        address="ray://user:hidden@head:10001",
        class_cond=True,
    )
    run = resolved(config, "https://user:hidden@host/model.pt?sig=hidden", SMALL)
    text = json.dumps(run.as_json())
    assert "hidden" not in text
    for kept in ("bucket/run", "host/labels.npy", "head:10001", "host/model.pt"):
        assert kept in text
