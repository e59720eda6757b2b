"""How fast is the engine on a GPU, against the textbook loop in fp16, and against the GPU's own matmul?

The 296M-parameter network of imagenet64 with random weights, each side with the best batch of several. Without a GPU
nothing is measured; --rehearse runs the same code on the CPU with a small network, to prove that it works.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import Case, architecture, random_weights
from ray_sampler.networks.family import Precision
from ray_sampler.presets import IMAGENET64
from ray_sampler.sampling.engine import Compile
from table import Goal, Row, Values, in_turn, parser, report
from textbook import Textbook

HEUN_STEPS = 40
BATCHES = (32, 64, 128, 256, 512)
IMAGES = 1024
"""Computed in one repeat of one step, at least; of 79 evaluations, an eighth."""
MODES: tuple[Compile, ...] = ("auto", "on")
REPEATS = 5
GOAL = Goal("at least", 3)


def case_of(steps: int, batch: int, compile: Compile, rehearse: bool) -> Case:
    flags: dict[str, Any] = dict(IMAGENET64)
    if rehearse:
        flags |= {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 32}
    arch = architecture(flags)
    device: Literal["cpu", "cuda"] = "cpu" if rehearse else "cuda"
    precision: Precision = "fp32" if rehearse else "fp16"
    images = 2 * batch if rehearse else max(batch, IMAGES // (8 if steps > 1 else 1))
    weights = random_weights(arch)
    return Case(arch, weights, steps, batch, -(-images // batch), precision, compile, device)


def best(cases: list[Case], side: Literal["ours", "theirs"]) -> Case:
    """The case whose second repeat is the fastest; one that does not fit is left out."""
    rates: dict[int, float] = {}
    for i, case in enumerate(cases):
        try:
            measure = case.ours(1) if side == "ours" else case.theirs()
            rates[i] = measure()
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
    return cases[max(rates, key=lambda i: rates[i])]


def flops(case: Case) -> int:
    """Floating-point operations of one evaluation for one image, counted as its matmuls and convolutions."""
    network = Textbook(case.network())
    size = case.arch.image_size
    x, times = torch.zeros(1, 3, size, size, device=case.device), torch.ones(1, device=case.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(x, times, torch.zeros(1, dtype=torch.long, device=case.device))
    return int(counter.get_total_flops())


def matmul_rate(case: Case, size: int) -> float:
    """Floating-point operations a second of one large square matmul."""
    dtype = torch.float16 if case.precision == "fp16" else torch.float32
    a, b = (torch.randn(size, size, device=case.device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(10):
            c = a @ b
        c[0, 0].item()
        return (time.perf_counter() - began) / 10

    seconds()
    return 2 * size**3 / median(seconds() for _ in range(5))


def compare(steps: int, rehearse: bool) -> tuple[list[Row], list[str]]:
    batches = (2, 4) if rehearse else BATCHES
    modes: tuple[Compile, ...] = ("off",) if rehearse else MODES
    cases = [case_of(steps, batch, "off", rehearse) for batch in batches]
    their_case = best(cases, "theirs")
    rows, notes = [], []
    evaluations = 2 * steps - 1
    ceiling = matmul_rate(their_case, 512 if rehearse else 8192)
    for mode in modes:
        our_case = best([replace(case, compile=mode) for case in cases], "ours")
        ours, theirs = in_turn(REPEATS, our_case.ours(1), their_case.theirs())
        name = f"GPU engine: {'heun ' + str(steps) + ' steps' if steps > 1 else 'one step'}, compile {mode}"
        rows.append(Row(name, ours, theirs, "images/s", GOAL))
        share: Values = tuple(100 * rate * flops(our_case) * evaluations / ceiling for rate in ours)
        rows.append(Row(f"{name}: share of the matmul ceiling", share, (), "%"))
        notes.append(
            f"{name}: batch {our_case.batch}, theirs {their_case.batch}; the ceiling is {ceiling / 1e12:.3g} TFLOP/s."
        )
    return rows, notes


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--rehearse", action="store_true", help="run on the CPU with a small network")
    arguments = made.parse_args()
    if not (arguments.rehearse or torch.cuda.is_available()):
        rows = [Row(f"GPU engine: {what}", (), (), "images/s", GOAL) for what in ("heun 40 steps", "one step")]
        report(rows, ["This machine has no GPU: these rows are unmeasured."], arguments.json)
        return
    found = [compare(steps, arguments.rehearse) for steps in ((3, 1) if arguments.rehearse else (HEUN_STEPS, 1))]
    notes = [note for _, of_case in found for note in of_case]
    if not arguments.rehearse:
        notes.append(f"On one {torch.cuda.get_device_name()}, torch {torch.__version__}.")
    report([row for of_case, _ in found for row in of_case], notes, arguments.json)


if __name__ == "__main__":
    main()
