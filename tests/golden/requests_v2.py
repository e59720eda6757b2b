"""The requests of which version 2's results are pinned. To change one is to throw its golden file away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.golden.requests import CHURN, CONSISTENCY, ONE_ACTOR, SMALL

HERE = Path(__file__).resolve().parent / "v2"
INPUTS = HERE.parent / "inputs"
REFERENCE = HERE.parent / "reference"

COUNT = 4
"""Samples of each picture request, one batch."""

FOUR: dict[str, Any] = {"num_samples": COUNT, "batch_size": COUNT, "gpus_per_actor": 0.0, "progress": "none"}
ADM: dict[str, Any] = {k: v for k, v in SMALL.items() if k not in ("shard_size", "output", "max_actors")} | FOUR
EDM: dict[str, Any] = FOUR | {"model": "edm_ddpmpp16/net.pkl", "steps": 4}
NCSN: dict[str, Any] = FOUR | {"model": "edm_ncsnpp8/net.pkl", "steps": 4}
EDM2: dict[str, Any] = FOUR | {"model": "edm2_16/net.pkl", "steps": 4}
GUIDED: dict[str, Any] = EDM2 | {"guide": "edm2_16/gnet.pkl", "guidance": 1.7}
DIGITS: dict[str, Any] = FOUR | {"model": "digits"}


def own(name: str, **flags: Any) -> dict[str, Any]:
    """A request for a network of inputs/own.py."""
    return FOUR | {"model": f"python:own:{name}", "steps": 4} | flags


PICTURES: dict[str, dict[str, Any]] = {
    # Every solver.
    "heun": ADM,
    "heun churn": ADM | CHURN,
    "euler": ADM | {"sampler": "euler"},
    "dpm churn": ADM | CHURN | {"sampler": "dpm"},
    "ancestral": ADM | {"sampler": "ancestral", "labels": "balanced"},
    "onestep": ADM | CONSISTENCY | {"sampler": "onestep"},
    "progdist": ADM | {"sampler": "progdist", "training_mode": "progdist"},
    "multistep": ADM | CONSISTENCY | {"sampler": "multistep", "steps": 40, "ts": "0,17,30,39"},
    "dpmpp_2m": ADM | {"sampler": "dpmpp_2m"},
    "dpmpp_3m": ADM | {"sampler": "dpmpp_3m"},
    "dpmpp_3m karras": ADM | {"sampler": "dpmpp_3m", "schedule": "karras", "rho": 5.0},
    "dpmpp_2m_sde": ADM | {"sampler": "dpmpp_2m_sde", "eta": 0.7, "s_noise": 1.01},
    "dpmpp_3m_sde": ADM | {"sampler": "dpmpp_3m_sde"},
    "unipc": ADM | {"sampler": "unipc"},
    "unipc second order": ADM | {"sampler": "unipc", "order": 2, "schedule": "karras"},
    "ipndm": ADM | {"sampler": "ipndm"},
    "ipndm second order": ADM | {"sampler": "ipndm", "order": 2},
    "deis": ADM | {"sampler": "deis"},
    "deis second order": ADM | {"sampler": "deis", "order": 2},
    "restart": ADM | {"sampler": "restart", "restarts": "3,2,0.06,0.30;2,1,1,4", "s_noise": 1.003},
    # Levels.
    "logsnr": ADM | {"schedule": "logsnr", "sampler": "euler"},
    "linear": ADM | {"schedule": "linear", "sampler": "dpmpp_2m"},
    "cosine": ADM | {"schedule": "cosine"},
    "shifted": own("velocity", schedule="shifted", shift=3.0, sampler="euler"),
    "sigmas": ADM | {"sigmas": "20,3,0.5", "steps": None, "sigma_max": None},
    "sigmas of a file": own("edm", sigmas="levels.txt", sampler="dpmpp_2m", steps=None),
    "nfe": ADM | {"nfe": 8, "steps": None},
    "nfe of restart": own("edm", nfe=12, steps=None, sampler="restart", restarts="2,1,0.1,2"),
    # Generators, labels, the state and what is written.
    "edm seeds": ADM | CHURN | {"generator": "edm", "seed": 7},
    "determ": ADM | CHURN | {"generator": "determ", "num_samples": 10},
    "determ-indiv": own("eps", generator="determ-indiv", sampler="dpmpp_2m_sde", labels="4,0,2", clip_denoised=True),
    "labels of a file": own("eps", labels="labels.txt", clip_denoised=True),
    "fp64": ADM | {"state": "fp64", "sampler": "dpmpp_3m"},
    "no decoder": ADM | {"decoder": "none", "clip_denoised": False},
    "nearest": ADM | {"rounding": "nearest"},
    # EDM.
    "edm ddpmpp": EDM,
    "edm ddpmpp guided by its null label": EDM | {"guidance": 2.0, "guide": "null", "guidance_interval": "0.1,30"},
    "edm ddpmpp seeds and churn": EDM | CHURN | {"generator": "edm"},
    "edm ncsnpp": NCSN,
    "edm ncsnpp churn": NCSN | CHURN | {"generator": "edm", "state": "fp32"},
    "edm ncsnpp dpmpp_2m": NCSN | {"sampler": "dpmpp_2m", "rounding": "truncate"},
    # EDM2.
    "edm2": EDM2,
    "edm2 guided": GUIDED,
    "edm2 guided in an interval": GUIDED | {"guidance_interval": "0.3,12", "labels": "balanced"},
    "edm2 guided by its null label": EDM2 | {"guidance": 2.0, "guidance_channels": 2},
    "edm2 seeds and churn": GUIDED | CHURN | {"generator": "edm", "state": "fp64"},
    "edm2 half": FOUR | {"model": "edm2_half16/net.pkl", "steps": 4, "decoder": "none"},
    # Networks of a user's own.
    "own edm": own("edm"),
    "own edm with a time of its own": own("edm_time"),
    "own denoiser": own("denoiser", clip_denoised=True),
    "own consistency": own("consistency", sampler="multistep", steps=20, ts="0,9,19"),
    "own eps guided by its null label": own("eps", guidance=1.5, sampler="ipndm", clip_denoised=True),
    "own v": own("v", sampler="deis", tag="second"),
    "own x0": own("x0", clip_denoised=True),
    "own x0 of a path": own("x0_of_a_path", clip_denoised=True),
    "own velocity": own("velocity", sampler="unipc"),
    "own velocity from noise": own("velocity_from_noise", generator="determ"),
    "own object": own("object_of_its_own", clip_denoised=True),
    "own one-hot labels": own("one_hot", guidance=2.0, guide="null"),
    "own guided by another": own(
        "eps", guidance=0.5, guide="python:own:guide", guidance_interval="0.5,20", sigma_max=20.0
    ),
    "grey": own("grey", rounding="nearest"),
    "latent": own("latent", decoder="none"),
    # In the package.
    "digits": DIGITS | {"nfe": 3},
    "digits-v1": DIGITS | {"model": "digits-v1", "steps": 3},
    "digits-cd": DIGITS | {"model": "digits-cd"},
    "digits-cd multistep": DIGITS | {"model": "digits-cd", "sampler": "multistep", "ts": "0,9,17"},
}
"""Flags by name. Models are relative to a directory that `place` made."""

FRAGMENTS: dict[str, str] = {
    "heun": "npz",
    "no decoder": "parquet",
    "own x0": "parquet",
    "own denoiser": "npz",
    "grey": "parquet",
    "latent": "npz",
}
"""Formats of fragments made of pictures: with and without labels, of 1, 3 and 4 channels, of both dtypes."""

RUN_JSONS = (
    "digits",
    "restart",
    "edm ddpmpp seeds and churn",
    "edm2 guided in an interval",
    "sigmas of a file",
    "grey",
)
"""Pictures whose run.json is pinned too."""

RUN: dict[str, Any] = ONE_ACTOR | {"num_samples": 16, "shard_size": 4}
RUNS: dict[str, dict[str, Any]] = {
    "half-done-parquet": GUIDED | RUN | {"guidance_interval": "0.3,12"},
    "half-done-npz": own("grey", guidance=2.0, decoder="none", fragment_format="npz", generator="edm") | RUN,
}
"""Flags by the name of the directory in v2/."""

KEPT: dict[str, list[int]] = {"half-done-parquet": [0, 2], "half-done-npz": [1]}
"""Which shards of each run were done when it was left."""

COMMAND_LINES: dict[str, list[str]] = {
    name: line.split()
    for name, line in {
        "the defaults": "",
        "digits-cd": "--model digits-cd --sampler multistep --ts 0,9,17 --num_samples 100",
        "digits with another solver": "--model digits --sampler unipc --nfe 9 --seed 3 --labels balanced",
        "digits restart": "--sampler restart --steps 18 --restarts 3,2,0.06,0.30 --generator edm --state fp64",
        "a preset": "--preset edm-imagenet64 --output gs://bucket/run --num_samples 50000 --s_churn 40",
        "a preset of EDM": "--preset edm-imagenet-64x64-cond-adm --max_actors 8",
        "a preset of EDM2": "--preset edm2-img64-s-fid --labels 3,1,4 --generator edm --precision fp16",
        "a preset with guidance": "--preset edm2-img512-s-fid --decoder none --guidance 1.4 --guidance_interval 0.2,2",
        "a checkpoint": "--model net.pkl --steps 7 --guidance 2 --guide null --address auto",
        "a network of one's own": "--model python:own:eps --sampler dpmpp_2m_sde --eta 0.5 --schedule linear",
        "levels": "--model digits --sigmas 80,10,1 --rounding nearest --fragment_format npz --compile off",
    }.items()
}
