"""How the samples that are missing are cut into shards, each of which one actor computes and writes as one fragment.

The bytes of the archive do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import ray

from ray_sampler.cluster.job import Job
from ray_sampler.cluster.session import plan_fleet
from ray_sampler.cluster.worker import IMAGES, Task
from ray_sampler.config import LARGEST_SHARD, FleetOptions

SHARDS_PER_ACTOR = 4
"""Shards for each actor, at least, where there are as many batches: so that no actor waits long for another's last."""

LAST_PARTS = 4
"""Parts into which each of the last shards is cut."""

ELASTIC_ACTORS = 8
"""Minimum number of actors that an autoscaling cluster counts for."""

MANY = 10**9

PADDING_SHARE = 0.25
"""Share of the samples that may be computed in excess before the run warns."""


def tasks_of(
    missing: Iterable[tuple[int, int]],
    shard_size: int,
    run: int = 0,
    product: str = IMAGES,
    early: int = 0,
    early_size: int = 1,
) -> Iterator[Task]:
    """Cut missing ranges at the multiples of `shard_size`; the `early` first tasks at those of `early_size`.

    As many more are at most twice as large, and so on, so that a run soon shows whether it works and how fast it is,
    and never goes silent for much longer than before.
    """
    size, made = early_size if early else shard_size, 0
    for start, stop in missing:
        while start < stop:
            end = min(stop, *((start // each + 1) * each for each in (size, shard_size)))
            yield Task(run, start, end, product)
            start, made = end, made + 1
            if size < shard_size and made % early == 0:
                size = min(shard_size, 2 * size)


def cut(job: Job, gaps: Sequence[tuple[int, int]], run: int, product: str = IMAGES) -> list[Task]:
    """The tasks of a job's missing ranges: as large as --shard_size says, else as suits their number and the fleet.

    Ray must be connected, unless --shard_size is given or nothing is missing.
    """
    if "shard_size" in job.config.given:
        return list(tasks_of(gaps, job.config.shard_size, run, product))
    if not gaps:
        return []
    actors = expected_actors(job.config, job.gpus, job.local)
    batch_size = job.config.batch_size
    size = suitable_size(sum(stop - start for start, stop in gaps), batch_size, actors)
    tasks = list(tasks_of(gaps, size, run, product, early=actors, early_size=batch_size))
    return tapered(tasks, actors, batch_size * max(1, size // batch_size // LAST_PARTS))


def tapered(tasks: Sequence[Task], actors: int, size: int) -> list[Task]:
    """The tasks, the last of which, one for each actor, are cut smaller: so that no actor ends long before others."""
    first = max(0, len(tasks) - actors)
    parts = (tasks_of([(task.start, task.stop)], size, task.run, task.product) for task in tasks[first:])
    return [*tasks[:first], *chain.from_iterable(parts)]


def suitable_size(num_samples: int, batch_size: int, actors: int) -> int:
    """Samples of a shard, whole batches: so few that each actor has four shards, and 512 or one batch at most."""
    batches = -(-num_samples // batch_size)
    most = max(1, LARGEST_SHARD // batch_size)
    return batch_size * max(1, min(most, batches // (SHARDS_PER_ACTOR * actors)))


def expected_actors(options: FleetOptions, gpus: float, local: bool) -> int:
    """Actors that a run will have, as far as a connected Ray shows now."""
    fleet = plan_fleet(options, gpus, MANY, local)
    if local:
        return fleet.max_actors
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kind, each = ("GPU", fleet.gpus) if fleet.gpus else ("CPU", fleet.cpus)
    room = sum(int(resources.get(kind, 0) / each) for resources in nodes)
    return min(fleet.max_actors, max(room, ELASTIC_ACTORS))


def padding(num_samples: int, batch_size: int) -> str | None:
    """What it costs that the last batch is filled up, where that is much."""
    batches = -(-num_samples // batch_size)
    thrown_away, better = batches * batch_size - num_samples, -(-num_samples // batches)
    if thrown_away <= PADDING_SHARE * num_samples or better == batch_size:
        return None
    return (
        f"--batch_size {batch_size} computes {batches * batch_size:,} images, of which {thrown_away:,} only fill up "
        f"the last batch and are thrown away; --batch_size {better} avoids that (pixels may differ "
        "by rounding from those of another batch size)"
    )
