"""What others call something, and what is not there, is answered with what is meant here: fast, and in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ray_sampler.cli import main

MEANT = [
    # arguments of `sample`, and what the sentence must name
    ("--sampler ddim", ["ddim", "euler"]),
    ("--sampler euler_a", ["euler_a", "ancestral"]),
    ("--sampler dpm++", ["dpm++", "dpmpp_2m"]),
    ("--sampler k_euler_ancestral", ["k_euler_ancestral", "--sampler ancestral"]),
    ("--scheduler ddim", ["--scheduler", "--sampler", "--schedule"]),
    ("--preset edm-imagenet64 --model digits", ["--preset", "edm-imagenet64", "--model digits"]),
    ("--model stabilityai/stable-diffusion-2", ["--model", "stabilityai/stable-diffusion-2", "hub", "path"]),
    ("--model DiT-XL/2", ["--model", "DiT-XL/2", "path"]),
    ("--score digits --features_weights org/name", ["--features_weights", "org/name", "hub", "path"]),
    ("--weights org/name", ["--weights", "org/name", "hub", "path"]),
    ("--score org/name", ["--score", "org/name", "hub", "path"]),
    ("--guide nowhere.pt --guidance 2", ["--guide", "nowhere.pt", "no such file"]),
    ("--weights nowhere.pt", ["--weights", "nowhere.pt"]),
    ("--score nowhere.npz", ["--score", "nowhere.npz", "no such file"]),
    ("--address head", ["--address", "'head'", "host:port", "6379"]),
    ("--address http://head:8265", ["--address", "http://head:8265", "ray job submit", "6379"]),
    ("--bf16", ["--bf16", "--precision bf16"]),
    ("--device cuda", ["--device", "--gpus_per_actor"]),
    ("--gpus 2", ["--gpus", "--max_actors"]),
    ("--num_workers 2", ["--num_workers", "--max_actors"]),
    ("--resume", ["--resume", "same command", "ray-sampler resume"]),
    ("--force", ["--force", "--overwrite"]),
    ("--quiet", ["--quiet", "--progress none"]),
    ("--ema", ["--ema", "--weights_key"]),
    ("--config a.yaml", ["--config", "flags"]),
    ("--cfg-scale 4", ["--cfg-scale", "--guidance"]),
    ("--num-sampling-steps 50", ["--num-sampling-steps", "--steps"]),
    ("--ckpt a.pt", ["--ckpt", "--model"]),
    ("--num-fid-samples 10", ["--num-fid-samples", "--num_samples"]),
    ("--seeds 0-9", ["--seeds", "--seed", "--num_samples"]),
    ("--outdir out", ["--outdir", "--output"]),
    ("--network a.pkl", ["--network", "--model"]),
    ("--batch 64", ["--batch", "--batch_size"]),
    ("--guidance_scale 4", ["--guidance_scale", "--guidance"]),
    ("--num_inference_steps 4", ["--num_inference_steps", "--steps"]),
    ("--prompt cat", ["--prompt", "--labels"]),
    ("--output hdfs://host/run", ["hdfs://host/run", "HADOOP_HOME"]),
]


@pytest.mark.parametrize(("arguments", "named"), MEANT, ids=[arguments for arguments, _ in MEANT])
def test_what_is_meant_here_is_said(arguments: str, named: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(text in line for text in named), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", ["--nonsense", "--sampler ddim", "--model nowhere.pt", "--labels nowhere.txt"])
def test_a_typo_is_refused_before_torch_and_ray_are_imported(arguments: str, tmp_path: Path):
    script = (
        "import sys; from ray_sampler.cli import main\n"
        "print(main(['sample', *sys.argv[1:]]), {'torch', 'ray'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout == "2 set()\n", done.stderr
