"""From a request to a job: what can be settled before anything is sampled."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ray_sampler.cluster.session import gpus_per_actor, in_submitted_job, joins_cluster
from ray_sampler.config import (
    RequestError,
    Run,
    RunConfig,
    RunError,
    fingerprint,
    redact,
    require,
)
from ray_sampler.models.checkpoint import fit, open_weights, weights_hash
from ray_sampler.models.presets import settings_for
from ray_sampler.sampling.labels import LabelRule, listed_labels
from ray_sampler.storage.label_file import read_labels
from ray_sampler.storage.run_dir import RunDir

RUN_FORMAT = 1
"""Raised whenever run.json changes its meaning."""

FRESH_SEED_BITS = 24
"""Of the seed that --generator dummy draws: small enough for num_samples * seed to fit in 64 bits."""


@dataclass(frozen=True)
class Job:
    """A run with everything that it needs."""

    run: Run
    output: str
    """Absolute path or URL of the run directory, credentials and all: not to be shown."""
    run_dir: RunDir
    weights: dict[str, Tensor]
    """In the precision of the run."""
    labels: LabelRule | None
    gpus: float
    """GPUs of an actor."""
    local: bool
    """Whether a Ray of our own, on this machine alone, computes the run."""
    identity: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.run.architecture.image_size
        return (size, size, 3)

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "format": RUN_FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "num_samples": self.run.request.num_samples,
            "image_shape": list(self.image_shape),
            "labelled": self.labels is not None,
            "settings": self.run.as_json(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def resolve(config: RunConfig) -> Run:
    """The run that a request means. Opens no file.

    Raises:
        RequestError: a setting is wrong.
    """
    weights, brought = settings_for(config)
    run = config.resolve(brought, weights)
    if config.output is not None:
        check_output(config.output)
    return run


def check_output(output: str) -> None:
    require(output != "", "--output is empty; it must be a directory or an fsspec URL")
    require(
        not output.startswith("memory://"),
        f"--output is {output!r}, the memory of one process, which no actor shares; give a directory or a bucket",
    )
    protocol, _, path = output.partition("://") if "://" in output else ("", "", output)
    require(
        path.strip("/") != "" or not protocol, f"--output is {output!r}; a bucket or directory must follow the protocol"
    )
    require(
        protocol not in ("http", "https"),
        f"--output is {redact(output)!r}, a web address, where nothing can be written; give a directory or a bucket",
    )
    require(
        protocol in ("", "file", "local") or "?" not in path,
        f"--output is {redact(output)!r} with a query, which no bucket has; credentials come from the environment",
    )
    relative = not protocol and not Path(output).is_absolute()
    require(
        not (relative and in_submitted_job()),
        f"--output is {output!r}, relative to a submitted job's working directory, which is temporary; "
        "give an absolute path that every node shares, or a bucket",
    )


def prepare(config: RunConfig) -> Job:
    """Read the checkpoint and the labels, and find or choose the run directory. Ray matters where one is joined.

    Raises:
        RequestError: the request is wrong, or the directory belongs to another run.
    """
    run = resolve(config)
    require(
        config.output is not None or not in_submitted_job(),
        "--output is missing; a submitted job's working directory is temporary, so give a bucket or a shared path",
    )
    state = open_weights(run.weights)
    labels = label_rule(run)
    gpus = gpus_per_actor(config)
    run_dir = RunDir(config.output) if config.output else None
    there = run_dir.read_run() if run_dir and not config.overwrite else None
    run = settle(run, gpus, there)
    weights = fit(state, run.architecture, run.precision if run.precision != "auto" else "fp32")
    identity = run.identity(weights_hash(state), labels.identity() if labels else None)
    output = config.output or default_output(run, fingerprint(identity))
    run_dir = run_dir or RunDir(output)
    output = run_dir.url if run_dir.is_local else output  # actors have working directories of their own
    local = not joins_cluster(config)
    job = Job(run, output, run_dir, weights, labels, gpus, local, identity)
    if not config.overwrite:
        refuse_another(job, job.run_dir.read_run())
    return job


def label_rule(run: Run) -> LabelRule | None:
    classes = run.architecture.num_classes
    if run.labels is None:
        return None
    if run.labels in ("random", "balanced"):
        return LabelRule("random" if run.labels == "random" else "balanced", classes)
    return listed_labels(read_labels(run.labels), classes, repr(run.labels))


def settle(run: Run, gpus: float, there: dict[str, Any] | None) -> Run:
    """Decide what the request leaves to the moment: what an earlier run decided there stays so.

    The precision auto is fp16 on a GPU and fp32 on a CPU; the generator dummy draws a fresh seed.
    """
    earlier = there.get("identity", {}) if there else {}
    if run.precision == "auto":
        run = replace(run, precision=earlier.get("precision") or ("fp16" if gpus else "fp32"))
    sampling = run.sampling
    if sampling.generator == "dummy":
        seed = earlier.get("seed") if earlier.get("generator") == "dummy" else None
        run = replace(run, sampling=replace(sampling, seed=seed or 1 + secrets.randbits(FRESH_SEED_BITS)))
    return run


def default_output(run: Run, print_: str) -> str:
    name = Path(run.weights.partition("?")[0].rstrip("/")).stem or "model"
    return os.path.join("runs", f"{name}-{print_[:8]}")


def refuse_another(job: Job, there: dict[str, Any] | None) -> None:
    """Refuse a directory that holds another run, naming each setting that differs.

    Raises:
        RequestError: it does.
    """
    if there is None or there.get("fingerprint") == job.fingerprint:
        return
    earlier = there.get("identity", {})
    keys = sorted(key for key in earlier.keys() | job.identity.keys() if earlier.get(key) != job.identity.get(key))
    differences = ", ".join(
        f"{key} {short(earlier.get(key))} there and {short(job.identity.get(key))} here" for key in keys
    )
    raise RequestError(
        f"{job.run_dir.url} holds another run: {differences or 'its fingerprint differs'}; "
        "give another --output, the same settings, or --overwrite"
    )


def short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "…"


def claim(job: Job) -> None:
    """Make the run directory this run's, or go on with it as it is.

    Raises:
        RequestError: another run was quicker.
        RunError: it cannot be written.
    """
    if job.run.request.overwrite:
        job.run_dir.delete()
    there = job.run_dir.create_run(job.record())
    refuse_another(job, there)
    if there["num_samples"] != job.run.request.num_samples:
        job.run_dir.replace_run(there | {"num_samples": job.run.request.num_samples})


def still_ours(job: Job) -> None:
    """Check before the merge that no other run has taken the directory meanwhile."""
    there = job.run_dir.read_run()
    if there is None:
        raise RunError(f"run.json vanished from {job.run_dir.url} during the run; run the same command again")
    refuse_another(job, there)
