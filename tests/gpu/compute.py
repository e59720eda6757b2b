"""A process that computes a few pictures and prints the SHA-256 of their bytes, by precision, as JSON."""

from __future__ import annotations

import argparse
import hashlib
import json

import torch

from ray_sampler.networks.family import DTYPES, Precision
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.numerics import compiles, pin
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.plan import MAIN
from tests.gpu.networks import options_of, plan_of, random_network


def digest(name: str, precision: Precision, compile: Compile, device: torch.device, batch: int) -> str:
    """Of two batches and a padded one."""
    options = options_of(name)
    network = random_network(options, precision, device, contiguous=not compiles(compile, device.type == "cuda"))
    if compile == "auto" and device.type == "cpu":  # where auto compiles nothing: a rehearsal, which need not be fast
        network = torch.compile(network, backend="aot_eager", dynamic=False)  # type: ignore[assignment]
    engine = Engine(
        {MAIN: network},
        batch_size=batch,
        device=device,
        compile=compile,
    )
    plan = plan_of(options, num_samples=3 * batch)
    engine.warm_up(plan)
    pictures = engine.sample(plan, 0, 2 * batch + 1)()
    return hashlib.sha256(pictures.columns["image"].tobytes()).hexdigest()


def main() -> None:
    made = argparse.ArgumentParser()
    made.add_argument("--network", default="tiny")
    made.add_argument("--precisions", default="fp32,fp16,bf16")
    made.add_argument("--compile", default="off")
    made.add_argument("--device", default="cuda")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--memory", type=float, default=1.0, help="fraction of the GPU that this process may take")
    arguments = made.parse_args()
    device = torch.device(arguments.device)
    pin(device, arguments.compile)
    if device.type == "cuda" and arguments.memory < 1:
        torch.cuda.set_per_process_memory_fraction(arguments.memory)
    precisions = [name for name in DTYPES if name in arguments.precisions.split(",")]
    found = {
        name: digest(arguments.network, name, arguments.compile, device, arguments.batch)  # type: ignore[arg-type]
        for name in precisions
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
