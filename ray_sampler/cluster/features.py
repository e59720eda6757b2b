"""Features of pictures that are stored somewhere, made by actors and kept as ranges that resume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ray_sampler.cluster.actors import actors
from ray_sampler.cluster.dispatch import Dispatch, Tally, tasks_of
from ray_sampler.cluster.inventory import without
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.session import Fleet, Place, plan_fleet
from ray_sampler.cluster.shards import expected_actors, suitable_size
from ray_sampler.cluster.shipping import ship
from ray_sampler.cluster.worker import Loaded, RunSpec, TaskResult
from ray_sampler.config import FleetOptions
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import Reporter
from ray_sampler.sampling.products import Product
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.features import FEATURES, StoredFeatures
from ray_sampler.scoring.scores import network_of, product_of
from ray_sampler.storage.pictures import Pictures
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.run_dir import RunDir


@dataclass(frozen=True)
class Extraction:
    """An extractor, and the fleet on which it makes features."""

    extractor: Extractor
    fleet: FleetOptions
    place: Place
    report: Reporter

    def features_of(self, pictures: Pictures, output: str, folder: str) -> StoredFeatures:
        """Features of pictures, those that are missing made now. Ray must be connected.

        Args:
            output: absolute path or URL of the directory in which they are kept.
            folder: in it.

        Raises:
            RunError: they cannot be made.
        """
        product = product_of(self.extractor, folder)
        ranges, fingerprint = RunDir(output).ranges(folder, product.columns), pictures.fingerprint()
        notes, stop = ranges.noted(), pictures.ranges[-1][1]
        names = [name for name in ranges.list().fragments if name not in notes]
        gaps = without(pictures.ranges, [(piece.start, piece.stop) for piece in cover(names, stop)])
        if gaps:
            spec = RunSpec(output, fingerprint, None, products={FEATURES: product}, pictures=pictures)
            made = self._make(spec, gaps, pictures.num_samples)
            for name in made:
                if name.name in notes:
                    ranges.clear(notes[name.name])
            names += [result.name for result in made]
        return StoredFeatures(output, folder, fingerprint, self.extractor.dims, tuple(cover(names, stop)))

    def _make(self, spec: RunSpec, gaps: Sequence[tuple[int, int]], count: int) -> list[TaskResult]:
        made: list[TaskResult] = []
        missing = sum(stop - start for start, stop in gaps)
        self.report.message(f"making {self.extractor.name} features of {missing:,} pictures")
        most = expected_actors(self.fleet, self.place.gpus, self.place.local)
        size = min(suitable_size(missing, Product.block, most), self.fleet.shard_size)
        tasks = list(tasks_of(gaps, size, product=FEATURES))
        fleet = plan_fleet(self.fleet, self.place.gpus, len(tasks), self.place.local)
        with actors(fleet, lambda: self._loaded(fleet), [spec], self.fleet.shard_timeout) as pool:
            given_up = Dispatch(
                pool,
                tasks,
                [Tally(count, reused=count - missing)],
                self.report,
                lambda task, result: made.append(result),
                lambda: None,
                self.fleet.min_actors,
                DriverMetrics(spec.fingerprint[:8]),
                counted=FEATURES,
            ).run()
        for task, reason in given_up.items():
            raise RunError(
                f"features of the pictures {task.start} to {task.stop - 1} could not be computed: {reason}; the rest "
                "is kept: run the same command again to retry"
            )
        return made

    def _loaded(self, fleet: Fleet) -> Loaded:
        networks = {FEATURES: ship(network_of(self.extractor), "fp32")}
        return Loaded(networks, "fp32", Product.block, "off", fleet.cpus, fleet.gpus)
