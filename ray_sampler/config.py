"""What is asked for: the request, as its flags state it.

Each component declares its options beside the code that reads them; here they are composed. `RunConfig` has one field
for each flag, under the flag's name. A flag that a model, a preset or a family may bring is None until somebody sets
it; `ray_sampler.resolved` fills those, in the order explicit value, preset, bundled model, family, default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, NamedTuple

from ray_sampler.errors import RequestError, RunError, require
from ray_sampler.networks.adm_options import AdmOptions, TrainingOptions
from ray_sampler.networks.family import Precision
from ray_sampler.options import Flag, check_choices, flags_of, option, pick
from ray_sampler.presets import ModelOptions
from ray_sampler.reporting.progress import ReportingOptions
from ray_sampler.sampling.options import (
    ConditionOptions,
    DecoderOptions,
    EngineOptions,
    GuidanceOptions,
    NoiseOptions,
    PlanOptions,
    check_seeds,
)
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SolverOptions
from ray_sampler.sampling.stepping import check_counts
from ray_sampler.storage.output import OutputOptions
from ray_sampler.values import check_kinds, taken

__all__ = ["Precision", "RequestError", "RunConfig", "RunError"]

SAMPLING_VERSION = 1
"""Raised whenever a change of the code changes samples."""

LARGEST_SHARD = 512
"""Samples of a shard, at most, where --shard_size does not say more. It is what run.json holds as the shard size then:
the size itself is known only once the fleet is."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """In what numbers the network computes."""

    precision: Literal["auto"] | Precision = option(
        "auto", "Precision of the network; auto is fp16 on a GPU and fp32 on a CPU."
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
        (TrainingOptions, SolverOptions, ScheduleOptions, PlanOptions),
        brought=True,
    ),
    Group("guidance and decoding", (GuidanceOptions, DecoderOptions), brought=True),
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
            value = taken(composed.flag, getattr(self, name))
            object.__setattr__(self, name, composed.unset if value is None else value)


_Request = make_dataclass(
    "RunConfig",
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
        return component(**{f.name: value for f in fields(component) if (value := getattr(self, f.name)) is not None})

    def check(self) -> None:
        """Check what can be checked before anything is opened.

        Raises:
            RequestError: a value is wrong.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        flags = {name: f.flag for name, f in FLAGS.items()}
        check_kinds(flags, values)
        check_choices(flags, values)
        for component in (SolverOptions, PlanOptions, NoiseOptions, EngineOptions):
            self.of(component).check()
        check_seeds(self.of(NoiseOptions), self.num_samples)
        for other in (FleetOptions, OutputOptions):
            self.of(other).validate()
        self.of(PrecisionOptions).resolved()
        both = {"sigma_min", "sigma_max"} <= self.given().keys()
        known = {name: value for name, value in self.given().items() if both or name not in ("sigma_min", "sigma_max")}
        check_counts(self.given())
        pick(ScheduleOptions, known).check()
