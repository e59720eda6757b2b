"""The requests whose results are pinned. To change one is to throw its golden file away."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent / "v1"

TINY: dict[str, Any] = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "8",
    "class_cond": True,
    "num_classes": 5,
}
"""The architecture of tiny.safetensors."""

ONE_ACTOR: dict[str, Any] = {"gpus_per_actor": 0.0, "max_actors": 1, "progress": "none", "output": "run"}
SMALL: dict[str, Any] = (
    TINY
    | ONE_ACTOR
    | {"model": "tiny.safetensors", "num_samples": 24, "batch_size": 4, "shard_size": 8, "steps": 6, "sigma_max": 20.0}
)

RUNS: dict[str, dict[str, Any]] = {
    "finished": SMALL,
    "half-done-parquet": SMALL | {"s_churn": 2.0, "s_noise": 1.003, "labels": "balanced", "seed": 7},
    "half-done-npz": SMALL
    | {
        "sampler": "ancestral",
        "training_mode": "consistency_distillation",
        "generator": "determ-indiv",
        "rounding": "nearest",
        "labels": "4,0,2",
        "fragment_format": "npz",
    },
    "half-done-dummy": SMALL | {"sampler": "euler", "generator": "dummy", "num_samples": 16},
    "half-done-digits": ONE_ACTOR
    | {"model": "digits", "num_samples": 16, "batch_size": 4, "shard_size": 4, "steps": 4},
}
"""Flags by the name of the directory in v1/. Model and output are relative to the directory that a run starts in."""

KEPT: dict[str, list[int]] = {
    "finished": [0, 1, 2],
    "half-done-parquet": [0, 2],
    "half-done-npz": [1],
    "half-done-dummy": [1],
    "half-done-digits": [0, 1, 3],
}
"""Which shards of each run were done when it was left."""

CHURN: dict[str, Any] = {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
CONSISTENCY: dict[str, Any] = {"training_mode": "consistency_training"}

FLOATS: dict[str, dict[str, Any]] = {
    "heun": SMALL,
    "heun churn": SMALL | CHURN,
    "heun unclipped": SMALL | {"clip_denoised": False, "generator": "determ"},
    "euler": SMALL | {"sampler": "euler"},
    "dpm": SMALL | {"sampler": "dpm"},
    "dpm churn": SMALL | CHURN | {"sampler": "dpm", "generator": "determ-indiv"},
    "ancestral": SMALL | {"sampler": "ancestral", "generator": "determ"},
    "progdist": SMALL | {"sampler": "progdist"},
    "onestep": SMALL | {"sampler": "onestep"},
    "onestep consistency": SMALL | CONSISTENCY | {"sampler": "onestep"},
    "multistep consistency": SMALL | CONSISTENCY | {"sampler": "multistep", "steps": 40, "ts": "0,17,30,39"},
    "heun consistency": SMALL | CONSISTENCY,
}
"""Requests whose first samples are pinned before rounding: a byte hides most changes of the last bits."""

FLOAT_SAMPLES = 2


class Configuration(NamedTuple):
    """A request of which only the fingerprint is pinned."""

    flags: dict[str, Any]
    weights_hash: str | None = "0123456789abcdef" * 4
    """None means the hash of the real weights."""
    gpus: float = 0.0
    dummy_seed: int | None = None


UNCONDITIONAL: dict[str, Any] = {"model": "u.pt", "image_size": 32, "num_channels": 64, "channel_mult": "1,2,2"}
CONDITIONAL: dict[str, Any] = UNCONDITIONAL | {"class_cond": True, "num_classes": 10}
HEADS: dict[str, Any] = {"num_heads": 2, "num_heads_upsample": 8}

CONFIGURATIONS: dict[str, Configuration] = {
    "the defaults": Configuration({}, None),
    "digits": Configuration({"model": "digits", "num_samples": 1000}, None),
    "digits on a GPU": Configuration({"model": "digits"}, None, gpus=1.0),
    "digits-cd": Configuration({"model": "digits-cd"}, None),
    "digits-cd multistep": Configuration({"model": "digits-cd", "sampler": "multistep"}, None),
    "digits balanced": Configuration({"labels": "balanced"}, None),
    "digits listed": Configuration({"labels": "3,1,4,1,5"}, None),
    "preset edm": Configuration({"preset": "edm-imagenet64", "model_path": "edm.pt"}),
    "preset cd": Configuration({"preset": "cd-imagenet64-l2", "model_path": "cd.pt", "use_fp16": True}),
    "preset ct": Configuration({"preset": "ct-bedroom256", "model_path": "ct.pt"}, gpus=1.0),
    "preset with explicit flags": Configuration({"preset": "cd-cat256-l2", "model_path": "c.pt", "sigma_max": 70.0}),
    "unconditional": Configuration(UNCONDITIONAL),
    "conditional": Configuration(CONDITIONAL),
    "conditional balanced": Configuration(CONDITIONAL | {"labels": "balanced"}),
    "conditional listed": Configuration(CONDITIONAL | {"labels": "0,9"}),
    "heads": Configuration(UNCONDITIONAL | HEADS),
    "head channels": Configuration(UNCONDITIONAL | {"num_head_channels": 32, "resblock_updown": True}),
    "no attention, no scale": Configuration(
        UNCONDITIONAL | {"attention_resolutions": "", "use_scale_shift_norm": False, "learn_sigma": False}
    ),
    "multipliers by size": Configuration({"model": "u.pt", "image_size": 256, "num_channels": 128}),
    "half a multiplier": Configuration({"model": "u.pt", "image_size": 512, "num_channels": 128}),
    "euler": Configuration(UNCONDITIONAL | {"sampler": "euler", "s_churn": 3.0}),
    "dpm": Configuration(UNCONDITIONAL | {"sampler": "dpm", "steps": 18}),
    "ancestral": Configuration(UNCONDITIONAL | {"sampler": "ancestral"}),
    "onestep": Configuration(UNCONDITIONAL | {"sampler": "onestep"}),
    "onestep consistency": Configuration(UNCONDITIONAL | CONSISTENCY | {"sampler": "onestep"}),
    "progdist": Configuration(UNCONDITIONAL | {"sampler": "progdist", "training_mode": "progdist", "steps": 8}),
    "multistep": Configuration(UNCONDITIONAL | CONSISTENCY | {"sampler": "multistep", "ts": "0,22,39"}),
    "heun consistency": Configuration(UNCONDITIONAL | CONSISTENCY),
    "churn": Configuration(UNCONDITIONAL | {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}),
    "churn without end": Configuration(UNCONDITIONAL | {"s_churn": 40, "sampler": "dpm"}),
    "levels": Configuration(UNCONDITIONAL | {"sigma_min": 0.01, "sigma_max": 160}),
    "no clipping": Configuration(UNCONDITIONAL | {"clip_denoised": False}),
    "nearest": Configuration(UNCONDITIONAL | {"rounding": "nearest"}),
    "fp16": Configuration(UNCONDITIONAL | {"precision": "fp16"}),
    "bf16": Configuration(UNCONDITIONAL | {"precision": "bf16"}),
    "determ": Configuration(UNCONDITIONAL | {"generator": "determ", "num_samples": 50000}),
    "determ-indiv": Configuration(UNCONDITIONAL | {"generator": "determ-indiv", "num_samples": 500}),
    "dummy": Configuration(UNCONDITIONAL | {"generator": "dummy", "num_samples": 64}, dummy_seed=5),
    "seed": Configuration(UNCONDITIONAL | {"seed": 2**64 - 1}),
    "what changes nothing": Configuration(
        UNCONDITIONAL | {"dropout": 0.1, "weight_schedule": "uniform", "batch_size": 7, "fragment_format": "npz"}
    ),
}

PUBLISHED = (
    "--batch_size 8 --training_mode consistency_distillation --sampler multistep --ts 0,22,39 --steps 40 "
    "--model_path /path/to/checkpoint.pt --attention_resolutions 32,16,8 --class_cond True --use_scale_shift_norm True "
    "--dropout 0.0 --image_size 64 --num_channels 192 --num_head_channels 64 --num_res_blocks 3 --num_samples 500 "
    "--resblock_updown True --use_fp16 True --weight_schedule uniform --generator determ-indiv"
)

BUCKETS = (
    "--preset edm-bedroom256 --model s3://key:secret@bucket/edm.pt?signature=1 --output gs://bucket/run "
    "--num_samples 50000 --s_churn 40 --shard_size 100 --max_actors 64 --compile off --fragment_format npz"
)

COMMAND_LINES: dict[str, list[str]] = {
    "the defaults": [],
    "a published command line": PUBLISHED.split(),
    "a preset and buckets": BUCKETS.split(),
}
