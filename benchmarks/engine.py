"""How many images a second does the engine make on a CPU, against the textbook loop on the same cores?

float32, equal weights, solver and batch. Ours computes a batch on each core; the textbook loop has torch's threads.
Each side has a separate process, as ours changes how its process keeps memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal

import torch

from ray_sampler.networks.adm import ADM, spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.family import Network, Precision
from ray_sampler.networks.opening import built, open_network
from ray_sampler.options import of
from ray_sampler.published import BUNDLED, IMAGENET64
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.options import Compile
from ray_sampler.sampling.plan import MAIN
from table import Goal, Row, Values, in_turn, parser, report
from tests.loading import loaded
from tests.sampling.plans import plan
from textbook import Textbook, sample

GOAL = Goal("at least", 1.5)
REPEATS = 7


def architecture(flags: dict[str, Any]) -> AdmOptions:
    return of(AdmOptions, flags)


def network_of(arch: AdmOptions, weights: dict[str, torch.Tensor]) -> Network:
    """A network with weights that are in no file."""
    spec = spec_of(arch, {})
    return Network(spec, partial(built, ADM, spec), ADM.prepare, dict(weights), "", 0)


def random_weights(arch: AdmOptions) -> dict[str, torch.Tensor]:
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

    arch: AdmOptions
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

    def network(self) -> UNet:
        network = loaded(network_of(self.arch, self.weights), self.precision, self.device_type)
        assert isinstance(network, UNet)
        return network

    def ours(self, cores: int) -> Callable[[], float]:
        """A function that gives images a second."""
        engine = Engine(
            {MAIN: self.network()},
            batch_size=self.batch,
            device=self.device,
            compile=self.compile,
            cores=cores,
        )
        planned = plan(
            LabelRule("random", self.arch.num_classes),
            image_size=self.arch.image_size,
            num_samples=self.batch * self.batches,
            sampler="heun" if self.steps > 1 else "onestep",
            steps=self.steps if self.steps > 1 else 40,
        )
        return self.rate(lambda: engine.sample(planned, 0, self.batch * self.batches)())

    def theirs(self) -> Callable[[], float]:
        network = Textbook(self.network())
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
    """The first bundled model with its own solver: the newer one guides itself, which the other loop does not."""
    settings = dict(BUNDLED["digits-v1"].settings)
    return Case(architecture(settings), open_network("digits-v1", settings).tensors, 18, batch, batches)


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
