"""How many images a second does the engine make on a CPU, against the textbook loop on the same cores?

float32, equal weights, solver and batch. Ours computes a batch on each core; the textbook loop has torch's threads.
Each side has a process of its own, as ours changes how its process keeps memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from typing import Any, Literal

import torch

from ray_sampler.config import Architecture, Compile, Precision, Sampling
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.weights import build, fit, open_weights
from ray_sampler.presets import BUNDLED, IMAGENET64
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.engine import Engine
from table import Goal, Row, Values, in_turn, parser, report
from textbook import Textbook, sample

GOAL = Goal("at least", 1.5)
REPEATS = 7


def architecture(flags: dict[str, Any]) -> Architecture:
    return Architecture(**{f.name: flags[f.name] for f in fields(Architecture) if f.name in flags})


def random_weights(arch: Architecture) -> dict[str, torch.Tensor]:
    """Random weights that keep activations of about one, as trained ones do."""
    random = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in UNet(arch).state_dict().items()}
    return {
        name: torch.randn(shape, generator=random) * (0.5 if len(shape) == 1 else shape[1:].numel() ** -0.5)
        for name, shape in shapes.items()
    }


@dataclass(frozen=True)
class Case:
    """One model, solver and batch on one device."""

    arch: Architecture
    weights: dict[str, torch.Tensor]
    steps: int
    """Of Heun's method; 1: one evaluation."""
    batch: int
    batches: int
    """Computed in one repeat."""
    precision: Precision = "fp32"
    compile: Compile = "auto"
    device_type: Literal["cpu", "cuda"] = "cpu"

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_type)

    def ours(self, cores: int) -> Callable[[], float]:
        """A function that gives images a second."""
        engine = Engine(
            build(self.arch, fit(self.weights, self.arch, self.precision), self.precision, self.device),
            self.arch,
            Sampling(sampler="heun" if self.steps > 1 else "onestep", steps=self.steps if self.steps > 1 else 40),
            LabelRule("random", self.arch.num_classes),
            num_samples=self.batch * self.batches,
            batch_size=self.batch,
            device=self.device,
            compile=self.compile,
            cores=cores,
        )
        return self.rate(lambda: engine.sample(0, self.batch * self.batches)())

    def theirs(self) -> Callable[[], float]:
        network = Textbook(build(self.arch, fit(self.weights, self.arch, self.precision), self.precision, self.device))
        labels = torch.arange(self.batch, device=self.device) % self.arch.num_classes

        def run() -> None:
            for first in range(0, self.batch * self.batches, self.batch):
                seeds = range(first, first + self.batch)
                sample(network, labels, seeds, self.arch.image_size, self.steps, self.device)

        return self.rate(run)

    def rate(self, run: Callable[[], object]) -> Callable[[], float]:
        def images_per_second() -> float:
            began = time.perf_counter()
            run()
            return self.batch * self.batches / (time.perf_counter() - began)

        images_per_second()  # the first call chooses kernels, compiles and takes memory
        return images_per_second


def digits(batch: int, batches: int) -> Case:
    """The bundled model with its own solver."""
    return Case(architecture(dict(BUNDLED["digits"].settings)), open_weights("digits"), 18, batch, batches)


rate: Callable[[], float]
"""Of this process's side."""


def prepare(case: Case, side: Literal["ours", "theirs"], cores: int) -> None:
    global rate
    torch.set_num_threads(cores)
    rate = case.ours(cores) if side == "ours" else case.theirs()


def measure() -> float:
    return rate()


def compare(case: Case, repeats: int, cores: int) -> tuple[Values, Values]:
    """Images a second of ours and theirs, each side in its own process."""
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn, prepare, (case, "ours", cores)) as ours,
        ProcessPoolExecutor(1, spawn, prepare, (case, "theirs", cores)) as theirs,
    ):
        reached, other = in_turn(
            repeats, lambda: ours.submit(measure).result(), lambda: theirs.submit(measure).result()
        )
    return reached, other


def main() -> None:
    arguments = parser(__doc__).parse_args()
    cores = os.cpu_count() or 1
    wide = architecture(IMAGENET64 | {"num_channels": 64, "num_res_blocks": 1, "num_head_channels": 32})
    cases = {
        "digits, 32 x 32 pixels, heun 18 steps, batch 16": digits(16, cores),
        "a 64 x 64 network of 64 channels, heun 2 steps, batch 8": Case(wide, random_weights(wide), 2, 8, cores),
    }
    rows = [
        Row(f"engine on {cores} cores: {name}", *compare(case, REPEATS, cores), "images/s", GOAL)
        for name, case in cases.items()
    ]
    report(rows, [], arguments.json)


if __name__ == "__main__":
    main()
