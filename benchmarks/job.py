"""How long does a whole job take, against Ray Data with the same engine in its actors?

From the first batch to the archive, two actors on two cores, the bundled one-step model. Theirs is what people
write: `ray.data.range(N).map_batches(Actor)`, `write_parquet`, then a merge of the files in the order of the index.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from ray_sampler import RunConfig, run
from ray_sampler.cluster.shipping import Shipped, load, ship
from ray_sampler.networks.opening import open_network
from ray_sampler.presets import BUNDLED
from ray_sampler.sampling.conditions import LabelRule
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.plan import MAIN, SamplePlan
from table import Goal, Row, in_turn, parser, report
from tests.sampling.plans import plan

ACTORS, SAMPLES, BATCH, SHARD = 2, 8_000, 50, 500
REPEATS = 3
SETTINGS = BUNDLED["digits-cd"].settings


def ours(folder: Path) -> float:
    """Seconds from the first shard to the archive."""
    with tempfile.TemporaryDirectory(dir=folder) as output:
        config = RunConfig(
            model="digits-cd", output=output, num_samples=SAMPLES, batch_size=BATCH, shard_size=SHARD,
            max_actors=ACTORS, min_actors=ACTORS, gpus_per_actor=0, progress="none",
        )  # fmt: skip
        seconds = run(config).summary["seconds"]
    return float(seconds["sampling"] + seconds["merge"])


class Mapper:
    """An engine that maps batches of indices to batches of images."""

    def __init__(self, plan: SamplePlan, shipped: Shipped) -> None:
        self.plan = plan
        network = load(shipped, torch.device("cpu"))
        self.engine = Engine({MAIN: network}, batch_size=BATCH, device=torch.device("cpu"), compile="off")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        began = time.time()
        indices = batch["id"]
        assert (indices[0] % BATCH, len(indices)) == (0, BATCH)  # or the engine would compute more than it is asked for
        pictures = self.engine.sample(self.plan, int(indices[0]), int(indices[-1]) + 1)()
        return {"index": indices, "began": [began] * len(indices), **pictures.columns}


def theirs(folder: Path, plan: SamplePlan, shipped: Shipped) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as output:
        parts, side = Path(output) / "parts", plan.shape[1]
        (
            ray.data.range(SAMPLES, override_num_blocks=SAMPLES // SHARD)
            .map_batches(
                Mapper, batch_size=BATCH, fn_constructor_args=(plan, shipped),
                num_cpus=0.5,  # its tasks that read and write need a whole one
                compute=ray.data.ActorPoolStrategy(size=ACTORS),
            )
            .write_parquet(str(parts))
        )  # fmt: skip
        table = pq.read_table(parts)
        order = np.argsort(table["index"].to_numpy())
        images = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in table["image"].chunks])[order]
        assert images.dtype == np.uint8
        assert images.shape == (SAMPLES, side, side, 3)
        with (Path(output) / "archive.npz").open("wb") as file:
            np.savez(file, images, table["label"].to_numpy()[order].astype(np.int64))
        return time.time() - float(table["began"].to_numpy().min())


class Alone:
    """An engine that keeps its images to itself."""

    def __init__(self, plan: SamplePlan, shipped: Shipped) -> None:
        self.mapper = Mapper(plan, shipped)

    def sample(self, start: int, stop: int) -> None:
        for first in range(start, stop, BATCH):
            self.mapper({"id": np.arange(first, first + BATCH)})


def engine_alone(plan: SamplePlan, shipped: Shipped) -> float:
    """Seconds that two actors take for the same batches, whose images they keep to themselves."""
    actors: list[Any] = [ray.remote(Alone).remote(plan, shipped) for _ in range(ACTORS)]
    ray.get([actor.sample.remote(0, BATCH) for actor in actors])  # the first call takes memory
    began, share = time.time(), SAMPLES // ACTORS
    ray.get([actor.sample.remote(i * share, (i + 1) * share) for i, actor in enumerate(actors)])
    return time.time() - began


def main() -> None:
    arguments = parser(__doc__).parse_args()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init("local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    known = {name: SETTINGS[name] for name in ("training_mode", "sampler", "steps")}
    planned = plan(LabelRule("random", 10), image_size=32, num_samples=SAMPLES, **known)
    shipped = ship(open_network("digits-cd", SETTINGS), "fp32")
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        theirs(folder, planned, shipped)  # the first run of each starts Ray's workers
        ours(folder)
        mine, data, least = in_turn(
            REPEATS,
            lambda: ours(folder),
            lambda: theirs(folder, planned, shipped),
            lambda: engine_alone(planned, shipped),
        )
    ray.shutdown()
    rows = [
        Row(f"job: {SAMPLES:,} digits in one step, against Ray Data", mine, data, "s", Goal("at most", 0.9)),
        Row("the same, against the engine alone: nothing stored, no archive", mine, least, "s"),
    ]
    report(rows, [], arguments.json)


if __name__ == "__main__":
    main()
