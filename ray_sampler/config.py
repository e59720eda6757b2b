"""What a run is: the request as its flags state it, and the resolved run that follows from it.

Each component declares its options beside the code that reads them; here they are composed. `RunConfig` has one field
for each flag, under the flag's name. A flag that a model, a preset or a family may bring is None until somebody sets
it; `resolve` fills those, in the order explicit value, then preset, then bundled model, then family, then default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import Any, Literal, NamedTuple

from ray_sampler.errors import RequestError, RunError, redact, require
from ray_sampler.networks import adm
from ray_sampler.networks.adm_options import AdmOptions, TrainingOptions
from ray_sampler.networks.family import NetworkSpec, Precision, Script
from ray_sampler.options import Flag, check_choices, flags_of, option, pick
from ray_sampler.presets import BUNDLED, ModelOptions, settings_for
from ray_sampler.reporting.progress import ReportingOptions
from ray_sampler.sampling.conditions import ConditionOptions, LabelRule
from ray_sampler.sampling.decoding import DECODERS, Decoder, DecoderOptions, Pixels
from ray_sampler.sampling.engine import EngineOptions
from ray_sampler.sampling.guidance import Guidance
from ray_sampler.sampling.noise import NoiseOptions
from ray_sampler.sampling.plan import STATE_DTYPES, PlanOptions, SamplePlan, parameterisation_of
from ray_sampler.sampling.schedules import Schedule
from ray_sampler.sampling.solver_options import Order, Plain, Restarts, Sde
from ray_sampler.sampling.solvers import SOLVERS, Churn, Indices, SolverChoice
from ray_sampler.sampling.stepping import check_counts, check_levels, check_options, schedule_of, settle, still_brought
from ray_sampler.storage.level_file import read_levels
from ray_sampler.storage.record import fingerprint
from ray_sampler.storage.run_dir import OutputOptions
from ray_sampler.values import check_kinds, taken

__all__ = ["Precision", "RequestError", "Run", "RunConfig", "RunError", "fingerprint", "redact", "require", "resolve"]

SAMPLING_VERSION = 1
"""Raised whenever a change of the code changes samples."""

LARGEST_SHARD = 512
"""Samples of a shard, at most, where --shard_size does not say more. It is what run.json holds as the shard size then:
the size itself is known only once the fleet is."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """In what numbers the network computes."""

    precision: Literal["auto"] | Precision = option(
        "auto", "Of the network's torso; auto is fp16 on a GPU and fp32 on a CPU."
    )
    use_fp16: bool | None = option(None, "True means --precision fp16.")

    def resolved(self) -> Literal["auto"] | Precision:
        """The precision asked for. Raises RequestError: two were."""
        if self.use_fp16 is None:
            return self.precision
        if self.precision == "auto":
            return "fp16" if self.use_fp16 else "fp32"
        require(
            self.use_fp16 == (self.precision == "fp16"),
            f"--use_fp16 {self.use_fp16} contradicts --precision {self.precision}; give one of the two",
        )
        return self.precision


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Which actors compute the run, and where."""

    shard_size: int | None = option(
        None, "Samples of a fragment, rounded up to whole batches (suits N and the fleet; at most 512)."
    )
    min_actors: int = option(
        1, "Actors kept until the last shard is done; idle ones above it are released as the queue empties."
    )
    max_actors: int | None = option(None, "Actors at most (as many as the queue can use).")
    gpus_per_actor: float | None = option(None, "GPUs of an actor; 0 means CPUs (1 where there are GPUs, else 0).")
    cpus_per_actor: int | None = option(
        None,
        "CPUs of an actor, on which it computes several batches at a time (in a cluster 1; on this machine alone, its "
        "cores are shared out).",
        recorded=False,
    )
    shard_timeout: float = option(
        600.0,
        "Seconds without a sign of progress after which an actor is replaced, at least; where shards take long, a "
        "multiple of their median.",
    )
    address: str | None = option(
        None,
        "Ray cluster to join, as auto or host:6379; without it, and without RAY_ADDRESS, a local Ray is started.",
    )

    def validate(self) -> None:
        """Raises RequestError: a value is wrong, by itself or beside another."""
        for name in ("shard_size", "max_actors", "cpus_per_actor"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} is {value}; it must be at least 1")
        require(self.min_actors >= 0, f"--min_actors is {self.min_actors}; it must be at least 0")
        require(
            self.max_actors is None or self.min_actors <= self.max_actors,
            f"--min_actors is {self.min_actors}; it must not exceed --max_actors {self.max_actors}",
        )
        gpus = self.gpus_per_actor
        require(
            gpus is None or 0 <= gpus <= 1,
            f"--gpus_per_actor is {gpus}; it must be 0, a fraction of 1, or 1: an actor computes on one GPU",
        )
        require(
            0 < self.shard_timeout < math.inf, f"--shard_timeout is {self.shard_timeout}; it must be above 0 seconds"
        )


class Group(NamedTuple):
    """Options under one heading of --help."""

    title: str
    components: tuple[type, ...]
    brought: bool = False
    """Whether a model, a preset or a family may bring them: then they are None until somebody sets them."""


GROUPS = (
    Group("model", (ModelOptions,)),
    Group("sample set", (NoiseOptions, ConditionOptions)),
    Group(
        "sampling",
        (TrainingOptions, SolverChoice, Schedule, Churn, Indices, Order, Sde, Restarts, PlanOptions),
        brought=True,
    ),
    Group("guidance and decoding", (Guidance, DecoderOptions), brought=True),
    Group("precision", (PrecisionOptions, EngineOptions)),
    Group("architecture", (AdmOptions,), brought=True),
    Group("output", (OutputOptions,)),
    Group("fleet", (FleetOptions,)),
    Group("reporting", (ReportingOptions,)),
)
"""All options there are, by component."""

OWN = ("num_samples", "use_checkpoint", "use_new_attention_order", "weight_schedule")
"""Options of `brought` groups that nothing but the request sets."""


class Composed(NamedTuple):
    """A flag in the request."""

    group: Group
    flag: Flag
    unset: Any
    """Its value in a request that does not name it."""


FLAGS: dict[str, Composed] = {
    name: Composed(group, flag, None if group.brought and name not in OWN else flag.default)
    for group in GROUPS
    for component in group.components
    for name, flag in flags_of(component).items()
}
"""Every flag of `ray-sampler sample`, by name."""


class _Taking:
    """Takes values as Python has them: numpy's numbers, paths, sequences."""

    def __post_init__(self) -> None:
        for name, composed in FLAGS.items():
            object.__setattr__(self, name, taken(composed.flag, getattr(self, name)))


_Request = make_dataclass(
    "_Request",
    [(name, Any, field(default=f.unset)) for name, f in FLAGS.items()],
    bases=(_Taking,),
    frozen=True,
    kw_only=True,
)


class RunConfig(_Request):  # type: ignore[misc, valid-type]  # made of the components' options
    """A request for a run: every flag of `ray-sampler sample`, under its name. Immutable; see `dataclasses.replace`."""

    def given(self) -> dict[str, Any]:
        """The settings that were given, by flag name, of those that a model may bring too."""
        return {name: getattr(self, name) for name, f in FLAGS.items() if f.unset is None and self.has(name)}

    def has(self, name: str) -> bool:
        """Whether a flag that has no default in a request was given."""
        return getattr(self, name) is not None

    def of(self, component: type) -> Any:
        """The options of a component, as the request has them."""
        return pick(component, {f.name: getattr(self, f.name) for f in fields(component)})

    def check(self) -> None:
        """Check what can be checked before anything is opened.

        Raises:
            RequestError: a value is wrong.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        flags = {name: f.flag for name, f in FLAGS.items()}
        check_kinds(flags, values)
        check_choices(flags, values)
        self.of(SolverChoice).validate()
        plan = self.of(PlanOptions)
        plan.validate()
        self.of(NoiseOptions).validate(plan.num_samples)
        for component in (EngineOptions, FleetOptions, OutputOptions):
            self.of(component).validate()
        self.of(PrecisionOptions).resolved()
        both = {"sigma_min", "sigma_max"} <= self.given().keys()
        known = {name: value for name, value in self.given().items() if both or name not in ("sigma_min", "sigma_max")}
        check_counts(self.given())
        pick(Schedule, known).validate()
        pick(Indices, known).indices  # noqa: B018  # raises where they are no numbers
        pick(Restarts, known).intervals  # noqa: B018  # the same


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
    labels: LabelRule | None = None,
    precision: Precision | None = None,
    seed: int | None = None,
) -> Run:
    """The run that a request means.

    Args:
        model: a bundled model's name, or a path or URL.
        brought: settings that the named model or preset brings, by flag name.
        spec: of the network.
        guide: of the guide network, where there is one.
        labels: the label rule, where it was read; else what the request says, unread.
        precision: where an earlier start or the fleet decides it.
        seed: where an earlier start decides it, as for --generator dummy.

    Raises:
        RequestError: a value is wrong, by itself or beside another.
    """
    config.check()
    defaults = {name: f.flag.default for name, f in FLAGS.items()}
    own = {name: getattr(config, name) for name, f in FLAGS.items() if f.unset is not None}
    given = config.given()
    settings = defaults | family_settings(spec) | still_brought(brought, given) | own | given | architecture_of(spec)
    check_options(settings["sampler"], given)
    settings |= settle(settings, given, read_levels)
    if seed is not None:
        settings["seed"] = seed
    conditional = spec.num_classes > 0
    require(
        config.labels is None or conditional,
        f"--labels is {config.labels!r}, but the model is unconditional; leave it out or give --class_cond True",
    )
    settings["labels"] = (config.labels or "random") if conditional else None
    if labels is None and conditional:
        labels = LabelRule("balanced" if config.labels == "balanced" else "random", spec.num_classes)
    settings["precision"] = precision or config.of(PrecisionOptions).resolved()
    batch_size = config.batch_size
    settings["shard_size"] = -(-(config.shard_size or LARGEST_SHARD) // batch_size) * batch_size
    settings["model"] = model
    settings["ts"] = ",".join(map(str, pick(Indices, settings).indices))
    return Run(
        model=model,
        spec=spec,
        plan=plan_of(settings, spec, guide, labels),
        precision=settings["precision"],
        labels=settings["labels"],
        shard_size=settings["shard_size"],
        settings=settings,
        request=config,
    )


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
    schedule, guidance, sampler = schedule_of(settings), pick(Guidance, settings), settings["sampler"]
    solver = SOLVERS[sampler]
    solver_options = pick(solver.options, settings)
    schedule.validate()
    pick(Churn, settings).validate(schedule)  # which must be right even where no solver uses it
    solver_options.validate(schedule)
    check_levels(settings, schedule, STATE_DTYPES[settings["state"]])
    guidance.validate(spec.shape[0])
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


def as_script(options: Plain, script: Script) -> Plain:
    """A solver's options, to be rounded as the script of the network's publication does."""
    return replace(options, adds=True) if isinstance(options, Churn) and script != "consistency-models" else options


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
        f"--decoder is missing: the network makes latents of {channels} channels, no pictures; give --decoder DIR, "
        "the directory of an autoencoder, or --decoder none, which writes the solver's result as it is, "
        "float32 (N, H, W, C)",
    )
    return Pixels(options.rounding)


UNREAD = ("labels", "training_mode", "clip_denoised", "rounding", "state", "steps", "sigma_min", "sigma_max")
"""Settings beside the architecture whose defaults a checkpoint decides."""


def dry_run(config: RunConfig) -> dict[str, Any]:
    """The resolved run as JSON, without opening anything: what only the checkpoint would tell is None.

    Raises:
        RequestError: a value is wrong.
    """
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
    run = resolve(asked, model, brought, adm.spec_of(options, settings))
    result = run.as_json()
    if model not in BUNDLED and not settings.keys() & told:
        result |= dict.fromkeys((*told, *UNREAD))
        result |= {name: settings[name] for name in result if name in settings}
        result["labels"] = config.labels
    if config.guidance_channels is not None:
        result["guidance_channels"] = config.guidance_channels
    plan = run.plan
    return result | {"schedule": plan.schedule.used, "nfe": plan.evaluations(), "sigmas": plan.sigmas()}
