"""Does a sample cost more in a longer run? Wall time per sample at 1,000, 10,000 and 100,000 samples.

From the first shard to the archive, with a network of one block at 16x16 pixels, sampled in one step by one actor: what
is left is what a run does around the network. Ours is a run of ten times as many samples as theirs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from ray_sampler import RunConfig, run
from ray_sampler.cluster.session import connect
from stub import one_block, save_random, settings
from table import Goal, Row, in_turn, parser, report

NUMBERS = (1_000, 10_000, 100_000)
GOAL = Goal("at most", 1.05)
ARCHITECTURE = one_block(16)


def request(num_samples: int, checkpoint: Path, output: str) -> RunConfig:
    return RunConfig(
        model=str(checkpoint), output=output, num_samples=num_samples, **settings(ARCHITECTURE), sampler="onestep",
        batch_size=50, shard_size=100, max_actors=1, gpus_per_actor=0, progress="none",
    )  # fmt: skip


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        checkpoint = save_random(ARCHITECTURE, Path(folder) / "stub.safetensors")

        def cost(num_samples: int) -> Callable[[], float]:
            """Milliseconds for each sample."""

            def measured() -> float:
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    seconds = run(request(num_samples, checkpoint, output)).summary["seconds"]
                return 1000 * (seconds["sampling"] + seconds["merge"]) / num_samples

            return measured

        with connect(None):
            cost(1_000)()  # the first run starts Ray's workers
            costs = in_turn(3, *(cost(num_samples) for num_samples in NUMBERS))
    rows = [
        Row(f"a sample's wall time: {large:,} samples against {small:,}", ours, theirs, "ms", GOAL)
        for small, large, theirs, ours in zip(NUMBERS, NUMBERS[1:], costs, costs[1:], strict=False)
    ]
    report(rows, [], arguments.json)


if __name__ == "__main__":
    main()
