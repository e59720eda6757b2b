"""From a request to a job: what can be settled before anything is sampled, in one pass."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ray_sampler.cluster.session import gpus_per_actor, in_submitted_job, joins_cluster
from ray_sampler.cluster.worker import Product
from ray_sampler.config import FleetOptions, PrecisionOptions, Run, RunConfig, resolve
from ray_sampler.errors import RequestError, RunError, printable, redact, require
from ray_sampler.networks.custom import PREFIX
from ray_sampler.networks.family import Network, NetworkSpec, Precision
from ray_sampler.networks.opening import open_network
from ray_sampler.options import pick
from ray_sampler.presets import ModelOptions, settings_for
from ray_sampler.sampling.conditions import LabelRule, listed_labels
from ray_sampler.sampling.guidance import Guidance
from ray_sampler.sampling.plan import GUIDE, MAIN
from ray_sampler.storage.label_file import read_labels
from ray_sampler.storage.record import fingerprint
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
    networks: dict[str, Network]
    """By role."""
    gpus: float
    """GPUs of an actor."""
    local: bool
    """Whether a Ray of our own, on this machine alone, computes the run."""
    identity: dict[str, Any]
    products: dict[str, Product]
    """What is made of the pictures beside them, by name."""

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def num_samples(self) -> int:
        return self.run.plan.num_samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.run.plan.image_shape

    @property
    def labelled(self) -> bool:
        return self.run.plan.labels is not None

    @property
    def precision(self) -> Precision:
        assert self.run.precision != "auto", "the fleet is known"
        return self.run.precision

    def loads(self) -> tuple[Any, ...]:
        """What its actors hold and take: jobs in which this is equal share a pool."""
        request = self.run.request
        networks = tuple(
            (role, net.spec.family, net.weights, str(net.spec.options)) for role, net in self.networks.items()
        )
        return networks, self.precision, request.batch_size, request.compile, self.gpus, self.local

    def fetched(self) -> dict[str, Any]:
        """Where the networks' weights came from and what they were, by role; empty where no file was fetched."""
        if not any(network.sha256 for network in self.networks.values()):
            return {}
        urls = {MAIN: self.run.model, GUIDE: self.run.settings["guide"]}
        return {
            role: {
                "url": redact(urls[role]),
                "sha256": network.sha256,
                "hash": network.weights,
                "key": network.key,
            }
            for role, network in self.networks.items()
        }

    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "format": RUN_FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "num_samples": self.num_samples,
            "image_shape": list(self.image_shape),
            "labelled": self.labelled,
            "settings": self.run.as_json(),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def prepare(config: RunConfig, products: dict[str, Product] | None = None) -> Job:
    """Read the request, load what it names, resolve defaults against that, and find or choose the run directory.

    Ray matters where one is joined. Nothing is written.

    Raises:
        RequestError: the request is wrong, or the directory belongs to another run.
    """
    config.check()
    check_submitted(config.output)
    model, brought = settings_for(config.of(ModelOptions))
    given = config.given()
    settings = brought | given
    network = open_network(model, settings, frozenset(settings))
    guide = open_guide(network, settings)
    labels = label_rule(config.labels, network.spec)
    gpus = gpus_per_actor(config.of(FleetOptions))
    run_dir = RunDir(config.output) if config.output else None
    there = run_dir.read_run() if run_dir and not config.overwrite else None
    earlier = there.get("identity", {}) if there else {}
    run = resolve(
        config,
        model,
        brought,
        network.spec,
        guide=guide.spec if guide else None,
        labels=labels,
        precision=settled_precision(config, gpus, earlier),
        seed=settled_seed(config, earlier),
    )
    identity = run.identity(network.weights, fingerprint(guide.spec.identity(guide.weights)) if guide else "null")
    output = config.output or default_output(model, fingerprint(identity))
    run_dir = run_dir or RunDir(output)
    output = run_dir.url if run_dir.is_local else output  # actors have working directories of their own
    networks = {MAIN: network} | ({GUIDE: guide} if guide else {})
    job = Job(run, output, run_dir, networks, gpus, not joins_cluster(config.address), identity, products or {})
    if not config.overwrite:
        refuse_another(job, there if config.output else run_dir.read_run())
    return job


def check_submitted(output: str | None) -> None:
    """Raises RequestError: the output of a submitted job would lie in its working directory, which is temporary."""
    if not in_submitted_job():
        return
    require(
        output is not None,
        "--output is missing; a submitted job's working directory is temporary, so give a bucket or a shared path",
    )
    require(
        "://" in str(output) or Path(str(output)).is_absolute(),
        f"--output is {output!r}, relative to a submitted job's working directory, which is temporary; "
        "give an absolute path that every node shares, or a bucket",
    )


def open_guide(network: Network, settings: Mapping[str, Any]) -> Network | None:
    """The second network by which the first is guided; None where none is asked for, or its own null label guides.

    Raises:
        RequestError: it cannot be a guide, or nothing says what guides.
    """
    guidance, name = pick(Guidance, settings), settings.get("guide")
    if not guidance.active:
        return None
    spec = network.spec
    if name in (None, "null"):
        require(
            spec.null_label is not None,
            f"--guidance is {guidance.guidance:g}, but the network has no null label, so nothing can guide it; give --guide "
            "MODEL, a second network",
        )
        return None
    _, brought = settings_for(ModelOptions(model=name))
    guide = open_network(str(name), (brought or settings) | {"weights": None, "weights_key": None}, flag="--guide")
    theirs = guide.spec
    require(
        theirs.shape == spec.shape and theirs.num_classes in (0, spec.num_classes),
        f"--guide is {redact(name)!r}, of {described(theirs)}; it must have the same shape as --model, which is of "
        f"{described(spec)}, and as many classes or none",
    )
    return guide


def described(spec: NetworkSpec) -> str:
    """A network's shape and classes, as a message shows them."""
    return f"shape {'x'.join(map(str, spec.shape))} and {spec.num_classes or 'no'} classes"


def label_rule(labels: str | None, spec: NetworkSpec) -> LabelRule | None:
    """The rule that --labels names, read; None for an unconditional network, of which `resolve` speaks."""
    if not spec.num_classes:
        return None
    if labels in (None, "random", "balanced"):
        return LabelRule("balanced" if labels == "balanced" else "random", spec.num_classes)
    return listed_labels(read_labels(str(labels)), spec.num_classes, repr(labels))


def settled_precision(config: RunConfig, gpus: float, earlier: dict[str, Any]) -> Precision:
    """The precision; auto is what an earlier start there made of it, else fp16 on a GPU and fp32 on a CPU."""
    asked = config.of(PrecisionOptions).resolved()
    if asked != "auto":
        return asked
    there: Precision | None = earlier.get("precision")
    return there or ("fp16" if gpus else "fp32")


def settled_seed(config: RunConfig, earlier: dict[str, Any]) -> int | None:
    """The seed of --generator dummy: fresh, or what an earlier start there drew."""
    if config.generator != "dummy":
        return None
    seed = earlier.get("seed") if earlier.get("generator") == "dummy" else None
    return seed or 1 + secrets.randbits(FRESH_SEED_BITS)


def default_output(model: str, print_: str) -> str:
    """runs/<model>-<start of the fingerprint>."""
    if model.startswith(PREFIX):
        return os.path.join("runs", f"{model.removeprefix(PREFIX).replace(':', '-')}-{print_[:8]}")
    name = Path(model.partition("?")[0].rstrip("/")).stem or "model"
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
        f"{printable(key)} {short(earlier.get(key))} there and {short(job.identity.get(key))} here" for key in keys
    )
    raise RequestError(
        f"{job.run_dir.url} holds another run: {differences or 'its fingerprint differs'}; "
        "give another --output, the same settings, or --overwrite"
    )


def short(value: Any) -> str:
    """A setting's value as a message shows it."""
    text = "none" if value is None else printable(value)
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
    if there["num_samples"] != job.num_samples:
        job.run_dir.replace_run(there | {"num_samples": job.num_samples})


def still_ours(job: Job) -> None:
    """Check before the merge that no other run has taken the directory meanwhile."""
    there = job.run_dir.read_run()
    if there is None:
        raise RunError(f"run.json vanished from {job.run_dir.url} during the run; run the same command again")
    refuse_another(job, there)
