"""From a request to a job: what can be settled before anything is sampled, in one pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ray_sampler.cluster.session import place
from ray_sampler.config import FleetOptions, RunConfig
from ray_sampler.errors import RequestError, RunError, printable, redact, require
from ray_sampler.networks.called import Called
from ray_sampler.networks.family import PREFIX, Network, NetworkSpec, Precision, beside_user
from ray_sampler.networks.opening import open_network
from ray_sampler.options import flags_of, of
from ray_sampler.planning import decoder_notes, differences, identity, open_decoder, plan_of, refuse_other_latents
from ray_sampler.presets import BUNDLED, OBJECT, check_bundled, model_of
from ray_sampler.resolve import check, command_of, given_values, resolve, settings_json, settled
from ray_sampler.sampling.decoding import DECODER
from ray_sampler.sampling.finish import FINISHERS, LATENTS, Product, latents
from ray_sampler.sampling.options import Compile, DecoderOptions, GuidanceOptions, guide_of
from ray_sampler.sampling.parameterisation import LEVELS
from ray_sampler.sampling.plan import GUIDE, MAIN, SamplePlan
from ray_sampler.sampling.trial import TRIAL_S, try_networks, within
from ray_sampler.scoring.features import FEATURES
from ray_sampler.scoring.options import ScoreOptions
from ray_sampler.scoring.scores import Scoring, open_scoring, product_of
from ray_sampler.storage.connect import absolute
from ray_sampler.storage.record import fingerprint
from ray_sampler.storage.run_dir import RunDir

RUN_FORMAT = 1
"""Raised whenever run.json changes its meaning."""

REPAID_CALLS = 1000
"""Calls of the network, a batch each, below which compiling on a GPU takes longer than it saves, about: a minute or two
against some tens of milliseconds a call. benchmarks/gpu.py measures both."""


@dataclass(frozen=True)
class Job:
    """A run with everything that it needs."""

    config: RunConfig
    """The request, resolved: nothing in it is left to a default."""
    plan: SamplePlan
    output: str
    """Absolute path or URL of the run directory, credentials and all: not to be shown."""
    run_dir: RunDir
    there: dict[str, Any] | None
    """The content of its run.json."""
    networks: dict[str, Network]
    """By role."""
    gpus: float
    """GPUs of an actor."""
    local: bool
    """Whether a local Ray, on this machine alone, computes the run."""
    identity: dict[str, Any]
    products: Mapping[str, Product]
    """What is made of the samples beside their fragments, by name."""
    scoring: Scoring | None = None
    """What the samples are compared with, if that is asked for."""

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity)

    @property
    def overwrite(self) -> bool:
        """Whether an older run in the directory is deleted, once an actor has started for this one."""
        return self.config.overwrite

    @property
    def num_samples(self) -> int:
        return self.plan.num_samples

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.plan.image_shape
        return height, width, channels

    @property
    def labelled(self) -> bool:
        return "label" in self.plan.columns()

    @property
    def source(self) -> dict[str, str]:
        """Hashes of the source of the user's modules, by file."""
        return {file: digest for network in self.networks.values() for file, digest in network.source.items()}

    @property
    def compile(self) -> Compile:
        """How the network is compiled: --compile, but not for a run on GPUs that is too short to repay auto.

        What counts is the whole run, neither what is left of it nor the fleet, so that a resumed run computes the
        same bytes as an undisturbed one, and many actors the same as one.
        """
        calls = -(-self.num_samples // self.config.batch_size) * self.plan.evaluations()
        short = self.config.compile == "auto" and self.gpus > 0 and calls < REPAID_CALLS
        return "off" if short or self.latents else self.config.compile

    @property
    def latents(self) -> str | None:
        """Absolute path or URL of the run whose latents are decoded; None where the samples are sampled."""
        return self.config.latents and absolute(self.config.latents)

    @property
    def precision(self) -> Precision:
        assert self.config.precision != "auto", "the fleet is known"
        return self.config.precision

    def loads(self) -> tuple[Any, ...]:
        """What its actors hold and take: jobs in which this is equal share a pool."""
        each = self.networks.items()
        networks = tuple((role, net.spec.family, net.weights, str(net.spec.options)) for role, net in each)
        features = self.scoring and (self.scoring.extractor.name, self.scoring.extractor.sha256)
        computed = self.precision, self.config.decoder_precision, self.config.batch_size, self.compile
        sampled = self.latents is None  # without which nothing is
        return networks, features, computed, sampled, self.gpus, self.local

    @property
    def notes(self) -> list[str]:
        """What the user should know of what a name or `auto` became."""
        notes = []
        for name in flags_of(GuidanceOptions) if self.plan.guidance.guidance == 1 else ():
            if getattr(self.config, name) is not None and name != "guidance":
                notes.append(f"--{name} does nothing at --guidance 1, its default; give a weight, as --guidance 2")
        if self.compile != self.config.compile and not self.latents:
            notes.append(
                "--compile auto does not compile this run: it calls the network too rarely to repay the minutes that "
                "this takes; give --compile on to compile all the same"
            )
        if self.gpus and not self.config.given & {"precision", "use_fp16"} and self.precision == "fp32":
            notes.append(
                "--precision auto stays fp32, which an earlier start without GPUs chose for this run; fp16 is several "
                "times as fast on a GPU: for that give --precision fp16 and another --output"
            )
        if DECODER in self.networks:
            notes += decoder_notes(self.config, self.networks[MAIN].spec, self.networks[DECODER].spec)
        return notes

    def fetched(self) -> dict[str, Any]:
        """Where the networks' weights came from and what they were, by role; empty where no file was fetched."""
        if not any(network.sha256 for network in self.networks.values()):
            return {}
        urls = {MAIN: str(self.config.model), GUIDE: self.config.guide, **self.plan.finisher.networks}
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
        command = command_of(self.config)
        later = {"source": self.source} | {"command": command}
        return {name: value for name, value in later.items() if value} | {
            "format": RUN_FORMAT,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "num_samples": self.num_samples,
            "image_shape": list(self.image_shape),
            "labelled": self.labelled,
            "settings": settings_json(self.config),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def prepare(config: RunConfig, products: Mapping[str, Product] | None = None) -> Job:
    """Read the request, load what it names, resolve defaults against that, and find or choose the run directory.

    Ray matters where one is joined. Nothing is written.

    Raises:
        RequestError: the request is wrong, or the directory belongs to another run.
    """
    check(config)
    model, brought = model_of(config)
    check_bundled(model, given_values(config))
    local, gpus = place(of(FleetOptions, config), config.output)
    run_dir = RunDir(config.output) if config.output else None
    if run_dir and config.overwrite:
        run_dir.deletable()
    there = run_dir.read_run() if run_dir and not config.overwrite else None
    earlier = there.get("identity", {}) if there else {}
    networks = open_networks(model, brought, config)
    spec = networks[MAIN].spec
    name = model if isinstance(model, str) else spec.options.name
    resolved, plan, decided = settle(config, name, brought, networks, gpus, earlier)
    if not (config.output or config.overwrite) and None in (spec.sigma_min, spec.sigma_max):
        first = settle(config, name, brought, networks, gpus, {"sigma_min": LEVELS[0], "sigma_max": LEVELS[1]})
        if os.path.isdir(default_output(name, fingerprint(first[2]))):  # begun before kinds had different ranges
            resolved, plan, decided = first
    output = config.output or default_output(name, fingerprint(decided))
    run_dir = run_dir or RunDir(output)
    output = absolute(output)
    if not (config.output or config.overwrite):
        there = run_dir.read_run()
    scoring = scoring_of(resolved, plan)
    kept = {LATENTS: latents(plan.shape)} if resolved.keep_latents else {}
    made = dict(products or {}) | kept | ({FEATURES: product_of(scoring.extractor)} if scoring else {})
    job = Job(resolved, plan, output, run_dir, there, networks, gpus, local, decided, made, scoring)
    refuse_another(job, there)
    refuse_changed_code(job, there)
    if job.latents:
        refuse_other_latents(RunDir(job.latents), job.identity, job.num_samples)
    return job


def scoring_of(config: RunConfig, plan: SamplePlan) -> Scoring | None:
    """What the samples are to be compared with. Raises RequestError: that cannot be opened, or does not fit them."""
    if config.score is None:
        return None
    require(
        plan.columns()["image"].dtype == "uint8",
        f"--score is {redact(config.score)!r}, but --decoder {config.decoder} writes results of the solver, not "
        "pictures; leave one of the two out",
    )
    scoring = open_scoring(of(ScoreOptions, config), plan.image_shape)
    scoring.check_count(config.num_samples)
    return scoring


def settle(
    config: RunConfig,
    model: str,
    brought: Mapping[str, Any],
    networks: Mapping[str, Network],
    gpus: float,
    earlier: Mapping[str, Any],
) -> tuple[RunConfig, SamplePlan, dict[str, Any]]:
    """The request resolved against its networks, its plan and its identity; `earlier` is that of a run to resume."""
    specs = {role: network.spec for role, network in networks.items()}
    resolved = settled(resolve(config, model, brought, specs[MAIN], earlier), gpus, earlier)
    plan = plan_of(resolved, specs)
    hashes = {role: hash_of(role, network) for role, network in networks.items()}
    return resolved, plan, identity(resolved, plan, specs, hashes)


def open_networks(model: Any, brought: Mapping[str, Any], config: RunConfig) -> dict[str, Network]:
    """The networks of a run, by role: the model, a guide where one is used, and what the finisher asks."""
    settings = {**brought, **given_values(config)}
    networks = {MAIN: open_network(model, settings, config.given)}
    spec = networks[MAIN].spec
    if (name := guide_of(of(GuidanceOptions, settings))) is not None:
        networks[GUIDE] = open_guide(name, settings, spec)
    decoder = settings.get("decoder")
    if (finisher := FINISHERS.get(decoder or "")) is not None:
        asked = finisher(of(DecoderOptions, settings)).networks.items()
        networks |= {role: open_network(name, {}, flag="--decoder") for role, name in asked}
    elif decoder is not None:
        networks[DECODER] = open_decoder(decoder, spec, config.image_size)
    return networks


def open_guide(name: str, settings: Mapping[str, Any], guided: NetworkSpec) -> Network:
    """The second network by which a first, `guided`, is guided. A bundled one brings its settings.

    Of another, what its file does not say is expected to be as in the first.
    """
    require(name != "", "--guide is empty; it must be null or a model, as for --model")
    expected = {"image_size": guided.shape[1]} | ({"num_classes": guided.num_classes} if guided.num_classes else {})
    expected = dict(BUNDLED[name].settings) if name in BUNDLED else {**settings, **expected}
    weights = settings.get("guide_weights")
    return open_network(name, expected | {"weights": weights, "weights_key": None, "preset": None}, flag="--guide")


def hash_of(role: str, network: Network) -> str:
    """What identifies a network in the fingerprint: the main one's architecture is there beside its weights."""
    return network.weights if role == MAIN else fingerprint(network.spec.identity(network.weights))


def default_output(model: str, print_: str) -> str:
    """runs/<model>-<start of the fingerprint>."""
    if model.startswith((PREFIX, OBJECT)):
        return os.path.join("runs", f"{model.removeprefix(PREFIX).replace(':', '-')}-{print_[:8]}")
    name = Path(model.partition("?")[0].rstrip("/")).stem or "model"
    return os.path.join("runs", f"{name}-{print_[:8]}")


def tried(job: Job) -> list[str] | None:
    """Call the user's networks once, before Ray starts; returns warnings, or None where an actor is to do it.

    Raises:
        WrongNetworkError: one cannot be sampled.
    """
    device = torch.device("cuda" if job.gpus else "cpu")
    networks = {role: network.build(job.precision) for role, network in job.networks.items() if network.own}
    if not networks:
        return []
    if job.gpus and not torch.cuda.is_available():
        return None
    copies = {role: network.another(device) for role, network in networks.items() if isinstance(network, Called)}
    with beside_user():
        return within(TRIAL_S, lambda: try_networks(copies, job.plan, job.config.batch_size))


def refuse_another(job: Job, there: dict[str, Any] | None) -> None:
    """Refuse a directory of a run with other settings, naming each setting that differs.

    Raises:
        RequestError: it does.
    """
    if there is None or there.get("fingerprint") == job.fingerprint:
        return
    earlier = there.get("identity", {})
    known = bundled_name(earlier.get("weights")) if earlier.get("weights") != job.identity.get("weights") else None
    begun = f", among them --model {known}, whose weights it was begun with" if known else ""
    raise RequestError(
        f"{job.run_dir.url} belongs to a run with other settings "
        f"({differences(earlier, job.identity) or 'its fingerprint differs'}); "
        f"give another --output, the same settings{begun}, or --overwrite"
    )


def bundled_name(weights: object) -> str | None:
    """The bundled model whose weights have a hash, None if none has: `digits` once meant those of `digits-v1`."""
    known = (name for name, bundled in BUNDLED.items() if open_network(name, bundled.settings).weights == weights)
    return next(known, None)


def changed_code(job: Job, there: Mapping[str, Any] | None) -> list[str]:
    """The user's files whose code is another than that of the run that was begun, as far as it was recorded."""
    before = (there or {}).get("source", {})
    return sorted(file for file, digest in job.source.items() if before.get(file, digest) != digest)


def refuse_changed_code(job: Job, there: Mapping[str, Any] | None) -> None:
    """Raises RequestError: samples would be of two networks, the code of which differs, and that was not accepted."""
    changed = ", ".join(map(printable, changed_code(job, there)))
    require(
        not changed or job.config.accept_code_change,
        f"the code of --model has changed since {job.run_dir.url} was begun, in {changed}; give another --output, the "
        "code as it was, or --accept_code_change, after which the samples are of both",
    )


def record_code(job: Job) -> list[str]:
    """Record what run.json does not say yet of the user's code; returns what the user should know of it."""
    there = job.run_dir.read_run() if job.source and not job.overwrite else None
    before: dict[str, str] = (there or {}).get("source", {})
    if there is None or before | job.source == before:
        return []
    changed = changed_code(job, there)
    earlier = {"earlier_source": [*there.get("earlier_source", ()), before]} if changed else {}
    job.run_dir.replace_run(there | {"source": before | job.source} | earlier)
    if changed:
        return [f"the code has changed in {', '.join(changed)}: the samples are of both, as `verify` says"]
    return [] if before else ["the code of this run was not recorded when it was begun; from now on a change is seen"]


def claim(job: Job) -> None:
    """Make the run directory this run's, or continue with it as it is.

    Raises:
        RequestError: another run was quicker.
        RunError: it cannot be written.
    """
    if job.overwrite:
        job.run_dir.delete()
    # An existing run is only read: a finished one may be where nothing can be written.
    there = job.there
    if there is None:
        there = job.run_dir.create_run(job.record())
        refuse_another(job, there)
        refuse_changed_code(job, there)
    if there["num_samples"] != job.num_samples:
        command = command_of(job.config)
        job.run_dir.replace_run(there | {"num_samples": job.num_samples} | ({"command": command} if command else {}))


def still_ours(job: Job) -> None:
    """Check before the merge that no other run has taken the directory meanwhile."""
    there = job.run_dir.read_run()
    if there is None:
        raise RunError(f"run.json vanished from {job.run_dir.url} during the run; run the same command again")
    refuse_another(job, there)
