"""What does a normal cost, of each generator, and what share of a run is that? On one core, for one batch.

The share is of the bundled digits model's own sampler, heun with 18 steps, which uses x_T alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from engine import digits
from ray_sampler.sampling.noise import make_draws
from ray_sampler.sampling.options import Generator, NoiseOptions
from table import Goal, Row, in_turn, parser, report

REPEATS = 9
BATCH, SHAPE = 50, (3, 32, 32)
DETERM_SAMPLES = 1_000
"""`determ` draws for all samples of a run, so its cost a normal is in proportion to this."""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    indices = torch.arange(BATCH)
    normals = BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2]

    def cost(generator: Generator) -> Callable[[], float]:
        """Nanoseconds for each normal of x_T that a batch gets."""
        options = NoiseOptions(generator=generator)
        return lambda: seconds(lambda: make_draws(options, DETERM_SAMPLES, indices, SHAPE).noise(0)) / normals * 1e9

    def plain() -> float:
        return seconds(lambda: torch.randn(BATCH, *SHAPE)) / normals * 1e9

    sides = [cost("philox"), cost("determ-indiv"), cost("determ"), plain]
    in_turn(1, *sides)  # the first calls take memory
    philox, individual, joint, randn = in_turn(REPEATS, *sides)
    rate = digits(BATCH, 1).ours(cores=1)
    image_s = 1 / median(in_turn(3, rate)[0])
    per_image = SHAPE[0] * SHAPE[1] * SHAPE[2] * 1e-9

    def percent(cost_ns: tuple[float, ...], draws: int) -> tuple[float, ...]:
        return tuple(100 * ns * draws * per_image / image_s for ns in cost_ns)

    of_n = f"determ, {DETERM_SAMPLES:,} samples"
    rows = [
        Row("noise: philox, against torch.randn", philox, randn, "ns a normal", Goal("at most", 30, "ours")),
        Row("noise: determ-indiv, against torch.randn", individual, randn, "ns a normal"),
        Row(f"noise: {of_n}, against torch.randn", joint, randn, "ns a normal"),
        Row("noise: philox, share of a run, one core", percent(philox, 1), (), "%", Goal("at most", 1, "ours")),
        Row("noise: determ-indiv, against the rest of a run", percent(individual, 1), (), "%"),
        Row(f"noise: {of_n}, against the rest of a run", percent(joint, 1), (), "%"),
    ]
    notes = [
        f"determ draws all {DETERM_SAMPLES:,} samples for each batch of {BATCH}, so its cost grows with the number of "
        "samples, and that of a whole run with its square.",
        "A run without churn asks for x_T alone; with churn, every step that is noised costs the same again.",
    ]
    report(rows, notes, arguments.json)


if __name__ == "__main__":
    main()
