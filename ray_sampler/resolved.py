"""From a request to a resolved run: what every flag is once the network is known, and the plan that follows."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ray_sampler.config import FLAGS, LARGEST_SHARD, SAMPLING_VERSION, PrecisionOptions, RunConfig
from ray_sampler.errors import redact, require, shortened
from ray_sampler.networks import adm
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.family import NetworkSpec, Precision, Script
from ray_sampler.options import flags_of, pick
from ray_sampler.presets import BUNDLED, ModelOptions, settings_for
from ray_sampler.sampling.conditions import LabelRule, listed_labels
from ray_sampler.sampling.consistency_solvers import IndexOptions, indices_of
from ray_sampler.sampling.decoding import DECODERS, Decoder, Pixels
from ray_sampler.sampling.guidance import check_channels
from ray_sampler.sampling.options import DecoderOptions, GuidanceOptions, NoiseOptions
from ray_sampler.sampling.plan import STATE_DTYPES, SamplePlan, parameterisation_of
from ray_sampler.sampling.schedules import name_of
from ray_sampler.sampling.solvers import SOLVERS, Churn, SolverOptions
from ray_sampler.sampling.stepping import check_levels, check_options, schedule_of, settle, still_brought
from ray_sampler.storage.label_file import read_labels
from ray_sampler.storage.level_file import read_levels

FRESH_SEED_BITS = 24
"""Of the seed that --generator dummy draws: small enough for num_samples * seed to fit in 64 bits."""


@dataclass(frozen=True)
class Run:
    """A resolved run: nothing in it is left to a default."""

    model: str
    """A bundled model's name, or the path or URL of a checkpoint."""
    spec: NetworkSpec
    plan: SamplePlan
    precision: Literal["auto"] | Precision
    """auto until the fleet is known."""
    labels: str | None
    """The label rule as requested; None for an unconditional model."""
    shard_size: int
    """Samples, a multiple of the batch size; without --shard_size the most that a shard may have."""
    settings: Mapping[str, Any]
    """Every flag's resolved value."""
    request: RunConfig = field(repr=False)
    """Where the settings that need no resolving are read."""
    chosen_precision: bool = False
    """Whether the precision was left to the moment."""

    def as_json(self) -> dict[str, Any]:
        """Every setting under its flag's name, without a credential, for --dry_run and run.json."""
        result = {
            name: self.settings[name]
            for name, f in FLAGS.items()
            if f.flag.recorded or self.settings[name] not in (None, f.flag.default)
        }
        for gone in ("model_path", "use_fp16", "dry_run"):
            del result[gone]
        for url in ("model", "output", "labels", "address", "guide"):
            if url in result:
                result[url] = redact(result[url])
        return result | {"s_tmax": str(float(result["s_tmax"]))}

    def identity(self, weights_hash: str, guide_hash: str = "null") -> dict[str, Any]:
        """All that decides a sample's content, flat, by effective value."""
        return (
            {"sampling_version": SAMPLING_VERSION, "precision": self.precision}
            | self.spec.identity(weights_hash)
            | self.plan.identity(guide_hash)
        )


def resolve(
    config: RunConfig,
    model: str,
    brought: Mapping[str, Any],
    spec: NetworkSpec,
    guide: NetworkSpec | None = None,
    gpus: float | None = None,
    earlier: Mapping[str, Any] | None = None,
) -> Run:
    """The run that a request means.

    Args:
        config: the request, checked.
        model: a bundled model's name, or a path or URL.
        brought: settings that the named model or preset brings, by flag name.
        spec: of the network.
        guide: of the guide network, where there is one.
        gpus: of an actor. None where no run follows: then labels are not read, and nothing is left to the moment.
        earlier: the identity of the run that was begun in the same place, which decides what was left to its moment.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    settings = settings_of(config, brought, spec)
    settings["model"] = model
    chosen_precision = settings["precision"] == "auto"
    if gpus is not None:
        settings |= settled(settings, gpus, earlier or {})
    guidance = pick(GuidanceOptions, settings)
    check_guide(guidance, spec, guide)
    labels = label_rule(config.labels, spec, read=gpus is not None)
    return Run(
        model=model,
        spec=spec,
        plan=plan_of(settings, spec, guide, labels),
        precision=settings["precision"],
        labels=settings["labels"],
        shard_size=settings["shard_size"],
        settings=settings,
        request=config,
        chosen_precision=chosen_precision,
    )


def settings_of(config: RunConfig, brought: Mapping[str, Any], spec: NetworkSpec) -> dict[str, Any]:
    """Every flag's value: as given, else as brought, else as the family has it, else its default."""
    defaults = {name: f.flag.default for name, f in FLAGS.items()}
    own = {name: getattr(config, name) for name, f in FLAGS.items() if f.unset is not None}
    given = config.given()
    settings = defaults | family_settings(spec) | still_brought(brought, given) | own | given | architecture_of(spec)
    check_options(settings["sampler"], given)
    settings |= settle(settings, given, read_levels)
    settings["labels"] = (config.labels or "random") if spec.num_classes else None
    settings["precision"] = config.of(PrecisionOptions).resolved()
    settings["shard_size"] = -(-(config.shard_size or LARGEST_SHARD) // config.batch_size) * config.batch_size
    settings["ts"] = ",".join(map(str, indices_of(pick(IndexOptions, settings))))
    return settings


def settled(settings: Mapping[str, Any], gpus: float, earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What a request leaves to the moment; what an earlier start in the same place made of it stays so.

    The precision auto is fp16 on a GPU and fp32 on a CPU; the generator dummy draws a fresh seed.
    """
    result: dict[str, Any] = {}
    if settings["precision"] == "auto":
        result["precision"] = earlier.get("precision") or ("fp16" if gpus else "fp32")
    if settings["generator"] == "dummy":
        seed = earlier.get("seed") if earlier.get("generator") == "dummy" else None
        result["seed"] = seed or 1 + secrets.randbits(FRESH_SEED_BITS)
    return result


def label_rule(labels: str | None, spec: NetworkSpec, read: bool = True) -> LabelRule | None:
    """The rule that --labels names; None for an unconditional network.

    Raises:
        RequestError: the network takes no labels, or the list is wrong.
    """
    otherwise = ", or give --class_cond True" if spec.family == "adm" else ""
    require(
        labels is None or spec.num_classes > 0,
        f"--labels is {shortened(str(labels))!r}, but the model is unconditional; leave it out{otherwise}",
    )
    if not spec.num_classes:
        return None
    if labels in (None, "random", "balanced") or not read:
        return LabelRule("balanced" if labels == "balanced" else "random", spec.num_classes)
    return listed_labels(read_labels(str(labels)), spec.num_classes, repr(shortened(labels)))


def check_guide(guidance: GuidanceOptions, spec: NetworkSpec, guide: NetworkSpec | None) -> None:
    """Check that something can guide a network.

    Raises:
        RequestError: it has no null label and no guide, or the guide is of another shape or other classes.
    """
    if guidance.guidance == 1:
        return
    if guide is None:
        require(
            spec.null_label is not None or guidance.guide not in (None, "null"),
            f"--guidance is {guidance.guidance:g}, but the network has no null label to guide it; "
            "give --guide MODEL, a second network",
        )
        return
    require(
        guide.shape == spec.shape and guide.num_classes in (0, spec.num_classes),
        f"--guide is {redact(guidance.guide)!r}, of {described(guide)}; it must have the same shape as --model, which "
        f"is of {described(spec)}, and as many classes or none",
    )


def described(spec: NetworkSpec) -> str:
    """A network's shape and classes, as a message shows them."""
    return f"shape {'x'.join(map(str, spec.shape))} and {spec.num_classes or 'no'} classes"


def architecture_of(spec: NetworkSpec) -> dict[str, Any]:
    """A network's architecture by flag name; None for flags that say nothing of its family."""
    options = getattr(spec.options, "network", spec.options)
    if isinstance(options, AdmOptions):
        return {name: getattr(options, name) for name in flags_of(AdmOptions)}
    told = {"image_size": spec.shape[1], "class_cond": spec.num_classes > 0, "num_classes": spec.num_classes or None}
    return dict.fromkeys((*flags_of(AdmOptions), "training_mode")) | told


def family_settings(spec: NetworkSpec) -> dict[str, Any]:
    """What a network's family or file brings, by flag name."""
    return {"sigma_min": spec.sigma_min, "sigma_max": spec.sigma_max} | dict(spec.defaults)


def plan_of(
    settings: Mapping[str, Any], spec: NetworkSpec, guide: NetworkSpec | None, labels: LabelRule | None
) -> SamplePlan:
    """The sample plan of resolved settings.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    schedule, guidance, sampler = schedule_of(settings), pick(GuidanceOptions, settings), settings["sampler"]
    solver = SOLVERS[sampler]
    solver_options: Any = pick(solver.options, settings)
    schedule.check()
    pick(SolverOptions, settings).check()
    solver.check(schedule, solver_options)
    check_levels(settings, schedule, STATE_DTYPES[settings["state"]])
    guidance.check()
    check_channels(guidance, spec.shape[0])
    return SamplePlan(
        shape=spec.shape,
        parameterisation=parameterisation_of(spec, schedule.sigma_min),
        sampler=sampler,
        solver=solver,
        solver_options=as_script(solver_options, spec.script),
        schedule=schedule,
        decoder=decoder_of(settings, spec),
        noise=pick(NoiseOptions, settings),
        num_samples=settings["num_samples"],
        labels=labels,
        clip_denoised=settings["clip_denoised"],
        state=settings["state"],
        guidance=guidance,
        guide=parameterisation_of(guide, schedule.sigma_min) if guide else None,
        guide_labelled=bool(guide and guide.num_classes),
        null_label=spec.null_label,
        script=spec.script,
    )


def as_script(options: Any, script: Script) -> Any:
    """A solver's options, to be rounded as the script of the network's publication does."""
    return replace(options, as_edm=True) if isinstance(options, Churn) and script != "consistency-models" else options


def decoder_of(settings: Mapping[str, Any], spec: NetworkSpec) -> Decoder:
    """The decoder that the settings and the network ask for.

    Raises:
        RequestError: the network makes latents, and nothing says what to do with them.
    """
    options = pick(DecoderOptions, settings)
    if options.decoder is not None:
        require(
            options.decoder in DECODERS,
            f"--decoder is {options.decoder!r}; it must be one of {', '.join(DECODERS)}; none writes the solver's "
            "result as it is, float32 (N, H, W, C)",
        )
        return DECODERS[options.decoder](options)
    channels = spec.shape[0]
    require(
        spec.latent is None and channels in (1, 3),
        f"--decoder is missing: the network makes latents of {channels} channels, not pictures; give --decoder none, "
        "which writes the solver's result as it is, float32 (N, H, W, C); --decoder DIR, the directory of an "
        "autoencoder, is not in this version yet",
    )
    return Pixels(options.rounding)


UNREAD = ("labels", "training_mode", "clip_denoised", "rounding", "state", "steps", "sigma_min", "sigma_max")
"""Settings beside the architecture whose defaults a checkpoint decides."""


def dry_run(config: RunConfig) -> dict[str, Any]:
    """The resolved run as JSON, without opening anything: what only the checkpoint would tell is None.

    Raises:
        RequestError: a value is wrong.
    """
    config.check()
    model, brought = settings_for(config.of(ModelOptions))
    settings = brought | config.given()
    options = pick(AdmOptions, settings)
    told = flags_of(AdmOptions).keys()
    if settings.keys() & told - {"dropout"}:
        options.validate()
    asked = config
    if model not in BUNDLED:  # the file may have any number of channels, and classes
        options = replace(options, class_cond=settings.get("class_cond", config.labels is not None))
        asked = replace(config, guidance_channels=None)
    spec = adm.spec_of(options, settings)
    if model not in BUNDLED:  # nor is it known whether it has a null label
        spec = replace(spec, null_label=spec.num_classes)
    run = resolve(asked, model, brought, spec)
    result = run.as_json()
    if model not in BUNDLED and not settings.keys() & told:
        result |= dict.fromkeys((*told, *UNREAD))
        result |= {name: settings[name] for name in result if name in settings}
        result["labels"] = config.labels
    if config.guidance_channels is not None:
        result["guidance_channels"] = config.guidance_channels
    plan = run.plan
    levels = {"schedule": name_of(plan.schedule), "nfe": plan.evaluations(), "sigmas": plan.sigmas()}
    return result | (dict.fromkeys(levels) if result["steps"] is None else levels)
