"""Scores: features made by actors, kept as ranges that resume, and reduced to metrics by tasks.

For a run, or for whatever pictures `ray-sampler score` is given.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from ray_sampler.cluster.actors import actors, own_ray
from ray_sampler.cluster.calls import reason_of
from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.inventory import without
from ray_sampler.cluster.job import Job
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.session import Place, beside_driver, joined, place, plan_fleet
from ray_sampler.cluster.shards import expected_actors, suitable_size, tasks_of
from ray_sampler.cluster.shipping import ship
from ray_sampler.cluster.worker import Loaded, RunSpec, TaskResult
from ray_sampler.config import FleetOptions, ScoreRequest
from ray_sampler.errors import RunError, redact, require, show_traceback
from ray_sampler.options import of
from ray_sampler.reporting.options import ReportingOptions
from ray_sampler.reporting.progress import Reporter, reporter
from ray_sampler.reporting.scores import described, read_scores, show_in_run, write_scores
from ray_sampler.sampling.finish import Product
from ray_sampler.scoring.extractor import Extractor
from ray_sampler.scoring.features import FEATURES, DamagedFeaturesError, Features, Held, StoredFeatures
from ray_sampler.scoring.metrics import ROWS, Moments, Pair, compare, kid_part, kid_subsets, radii, reduce, within
from ray_sampler.scoring.options import ScoreOptions
from ray_sampler.scoring.scores import KEYS, Scoring, folder_of, network_of, open_scoring, product_of
from ray_sampler.storage.connect import absolute, path_text
from ray_sampler.storage.pictures import Pictures, check_channels, open_pictures
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.run_dir import REFERENCES, SCORES, RunDir

ATTEMPTS = 5
"""Times that damaged features are made anew."""

SUBSETS_AT_ONCE = 10
"""Of KID, in one task: this bounds its memory."""


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

        def load() -> Loaded:
            networks = {FEATURES: ship(network_of(self.extractor), "fp32")}
            return Loaded(networks, "fp32", Product.block, "off", fleet.cpus, fleet.gpus)

        with actors(fleet, load, [spec], self.fleet.shard_timeout) as pool:
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


def scored_run(job: Job, report: Reporter) -> dict[str, Any]:
    """Score a run whose samples are all there; returns the content of scores.json. Ray must be connected.

    Raises:
        RunError: it cannot be scored.
    """
    assert job.scoring is not None
    where = Place(job.local, job.gpus)
    extraction = Extraction(job.scoring.extractor, of(FleetOptions, job.config), where, report)
    scores = scored(extraction, job.scoring, open_pictures(job.output), job.output)
    write_scores(job.run_dir, scores)
    show_in_run(job.run_dir, scores)
    return scores


def standing_scores(job: Job) -> dict[str, Any] | None:
    """The content of the scores.json in a run's directory, if it is what the run asks for."""
    scores = read_scores(job.run_dir)
    return scores if scores and job.scoring and job.scoring.answered_by(scores, job.num_samples) else None


def score(source: str | os.PathLike[str], request: ScoreRequest) -> dict[str, Any]:
    """Score the pictures of a run directory, an archive or a folder; returns the content of scores.json.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: it failed; features that were made are kept.
    """
    require(bool(request.score), "--reference is missing; give what the pictures are to be compared with")
    request.check()
    source = absolute(path_text(source, "pictures"))
    options, shown, fleet = of(ScoreOptions, request), of(ReportingOptions, request), of(FleetOptions, request)
    with reporter(shown.progress, shown.json_log) as report, joined(request.address):
        where, pictures = place(fleet, source), open_pictures(source)
        require(
            pictures.dtype == "uint8", f"{redact(source)} holds results of a solver, not pictures; decode them first"
        )
        check_channels(pictures, f"what is scored is {redact(source)}")
        scoring = open_scoring(options, pictures.shape, "--reference")
        scoring.check_count(pictures.num_samples)
        folder, name = parted(request.output)
        kept = source if pictures.is_run else folder or f"{source.rstrip('/').removesuffix('.npz')}.scores"
        target = RunDir(folder or kept)
        target.prove_rights()
        target.probes_clear(f"score-{secrets.token_hex(8)}")  # none: those of others are theirs
        with own_ray(report, where.local):
            scores = scored(Extraction(scoring.extractor, fleet, where, report), scoring, pictures, kept)
        write_scores(target, scores, name)
        if pictures.is_run and request.output is None:
            show_in_run(target, scores)
    return scores


def parted(output: str | None) -> tuple[str | None, str]:
    """The folder of an output, and the name of the file for the scores in it; the output may be either."""
    if output is None:
        return None, SCORES
    whole = absolute(output)
    folder, _, name = whole.rpartition("/")
    return (folder or "/", name) if whole.endswith(".json") else (whole, SCORES)


def scored(extraction: Extraction, scoring: Scoring, pictures: Pictures, output: str) -> dict[str, Any]:
    """Make the features that are missing, and measure; says the score.

    Raises:
        RunError: that failed.
    """
    report, folder = extraction.report, folder_of(scoring.extractor)
    for note in scoring.notes(pictures.num_samples):
        report.message(note, "warning")
    for _ in range(ATTEMPTS):
        features = extraction.features_of(pictures, output, folder)
        try:
            reference = reference_features(extraction, scoring, output, folder)
            spatial = spatial_features(extraction, scoring, pictures, output)
            metrics = measured(scoring, features, reference, spatial)
        except DamagedFeaturesError as damage:
            report.message(f"rejected {damage.name.filename}: {damage.reason}", "warning")
            damage.ranges.reject(damage.name.filename, damage.reason)
            continue
        scores = scoring.result(features.count, reference.count if reference else 0, metrics)
        report.message(described(scores))
        return scores
    raise RunError(
        f"features in {RunDir(output).url} kept failing their checks; check the storage, then run the same command "
        "again"
    )


def reference_features(extraction: Extraction, scoring: Scoring, output: str, folder: str) -> Features | None:
    """What the metrics need of a reference beside mu and sigma; those of its pictures are made and kept in `output`."""
    reference = scoring.reference
    if reference.features is not None:
        return Held(reference.features)
    if reference.images is None or set(scoring.asked) <= {"is", "sfid"}:
        return None
    kept = f"{REFERENCES}/{os.path.basename(folder)}-{reference.sha256[:8]}"
    return extraction.features_of(reference.images, output, kept)


def spatial_features(extraction: Extraction, scoring: Scoring, pictures: Pictures, output: str) -> Features | None:
    """The features of sFID, where that is asked for."""
    if scoring.spatial is None:
        return None
    return replace(extraction, extractor=scoring.spatial).features_of(pictures, output, folder_of(scoring.spatial))


def measured(
    scoring: Scoring, features: Features, reference: Features | None, spatial: Features | None = None
) -> dict[str, Any]:
    """The metrics by their names in scores.json.

    Raises:
        DamagedFeaturesError: a file is damaged.
        RunError: a value is not finite, or a task failed.
    """
    asked, given, metrics = scoring.asked, scoring.reference, {}
    held, other = ray.put(features), ray.put(reference)
    here = {"scheduling_strategy": beside_driver()}
    if {"fid", "is"} & set(asked):
        reduced = reduce_task.options(**here).remote(held, scoring.extractor.head if "is" in asked else None)
        moments: Any = None
        if given.mu is not None and given.sigma is not None:
            moments = Moments(given.mu, given.sigma)
        elif "fid" in asked:
            moments = reduce_task.options(**here).remote(other, None)
        fid, inception_score = collected([compare_task.options(**here).remote(reduced, moments)])[0]
        metrics = {"fid": fid, "is": inception_score and list(inception_score)}
    if spatial and given.spatial:
        sums = reduce_task.options(**here).remote(spatial, None)
        metrics["sfid"] = collected([compare_task.options(**here).remote(sums, Moments(*given.spatial))])[0][0]
    if "kid" in asked and reference:
        metrics["kid"] = kid(held, other, kid_subsets(features.count, reference.count))
    if "pr" in asked and reference:
        metrics["precision"], metrics["recall"] = precision_and_recall(features, reference, held, other)
    order = [name for metric in asked for name in KEYS[metric]]
    return {name: metrics[name] for name in order}


def kid(features: Any, reference: Any, subsets: Sequence[Pair]) -> list[float]:
    """Mean and standard deviation over the subsets, of references to features."""
    parts = [subsets[at : at + SUBSETS_AT_ONCE] for at in range(0, len(subsets), SUBSETS_AT_ONCE)]
    values = np.concatenate(collected([kid_task.remote(features, reference, part) for part in parts]))
    return [float(values.mean()), float(values.std())]


def precision_and_recall(features: Features, reference: Features, held: Any, other: Any) -> list[float]:
    """The share of samples in a ball of the reference, and of the reference in a ball of the samples."""
    sides = [(held, range(0, features.count, ROWS)), (other, range(0, reference.count, ROWS))]
    balls = [[radii_task.remote(side, start) for start in starts] for side, starts in sides]
    joined = [ray.put(np.concatenate(collected(parts))) for parts in balls]
    (of, starts), (among, others) = sides
    found = [
        [within_task.remote(of, start, among, joined[1]) for start in starts],
        [within_task.remote(among, start, of, joined[0]) for start in others],
    ]
    return [float(np.concatenate(collected(parts)).mean()) for parts in found]


def collected(tasks: Sequence[Any]) -> list[Any]:
    """What tasks return.

    Raises:
        DamagedFeaturesError, RunError: as `measured`.
    """
    try:
        return ray.get(list(tasks))
    except ray.exceptions.RayError as error:
        show_traceback(error)
        cause = getattr(error, "cause", None)
        if isinstance(cause, DamagedFeaturesError | RunError):
            raise cause from None
        raise RunError(f"the score could not be computed: {reason_of(error)}") from error


reduce_task = ray.remote(num_cpus=0, max_retries=3)(reduce)
compare_task = ray.remote(num_cpus=0, max_retries=3)(compare)
kid_task = ray.remote(num_cpus=1, max_retries=3)(kid_part)
radii_task = ray.remote(num_cpus=1, max_retries=3)(radii)
within_task = ray.remote(num_cpus=1, max_retries=3)(within)
