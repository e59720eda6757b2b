"""The request: every option of `ray-sampler sample`, typed and flat.

Each component declares its options beside the code that reads them; `RunConfig` inherits them all. An option is None
until somebody sets it; `ray_sampler.resolve` fills in the others and returns the same type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ray_sampler.errors import RequestError, RunError, redact, require
from ray_sampler.networks.families import ArchitectureOptions
from ray_sampler.options import Request, option
from ray_sampler.presets import ModelOptions
from ray_sampler.reporting.options import ReportingOptions
from ray_sampler.sampling.options import (
    ConditionOptions,
    DecoderOptions,
    EngineOptions,
    GuidanceOptions,
    NoiseOptions,
    PlanOptions,
)
from ray_sampler.sampling.schedules import ScheduleOptions
from ray_sampler.sampling.solvers import SolverOptions
from ray_sampler.scoring.options import ScoreOptions
from ray_sampler.storage.connect import OutputOptions, check_output

__all__ = ["RequestError", "RunConfig", "RunError"]

SAMPLING_VERSION = 1
"""Raised whenever a change of the code changes samples."""

LARGEST_SHARD = 512
"""Samples of a shard, at most, where --shard_size does not say more. It is what run.json holds as the shard size then:
the size itself is known only once the fleet is."""


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Numeric precision."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = option(
        "auto", "Numeric precision of the network; auto is fp16 on GPUs and fp32 on CPUs.", common=True
    )
    use_fp16: bool | None = option(None, "The same as --precision fp16.")

    def check(self) -> None:
        """Raises RequestError: the two flags contradict each other."""
        require(
            self.use_fp16 is None or self.precision == "auto" or self.use_fp16 == (self.precision == "fp16"),
            f"--use_fp16 {self.use_fp16} contradicts --precision {self.precision}; give one of the two",
        )


@dataclass(frozen=True, kw_only=True)
class FleetOptions:
    """Which actors compute the run, and where."""

    shard_size: int = option(
        LARGEST_SHARD,
        "Samples per fragment, rounded up to whole batches; by default it suits N and the fleet and is at most this.",
    )
    min_actors: int = option(
        1, "Actors to keep until the last shard is done; other idle ones are released as the queue empties."
    )
    max_actors: int | None = option(
        None,
        "Maximum number of actors, each on one GPU or on CPUs (default: as many as there is work for).",
        common=True,
    )
    gpus_per_actor: float | None = option(None, "GPUs per actor; 0 means CPUs (default: 1 if available).", common=True)
    cpus_per_actor: int | None = option(
        None,
        "CPUs per actor, each computing a batch (default: 1 in a cluster, else an equal share of the cores).",
        recorded=False,
    )
    shard_timeout: float = option(
        600.0, "Replace an actor after this many seconds without progress, or 10 median shard times if longer."
    )
    address: str | None = option(
        None,
        "Ray cluster to join: auto or host:6379 (default: RAY_ADDRESS, else a local Ray is started).",
        common=True,
    )

    def check(self) -> None:
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
        check_address(self.address or "auto")
        require(
            0 < self.shard_timeout < math.inf, f"--shard_timeout is {self.shard_timeout}; it must be above 0 seconds"
        )


def check_address(address: str) -> None:
    """Raises RequestError: it cannot be a cluster's."""
    require(
        address == "auto" or ":" in address,
        f"--address is {address!r}; it must be auto or host:port, where the port of a cluster is 6379 unless it was "
        "started with another",
    )
    require(
        not address.startswith(("http://", "https://")),
        f"--address is {redact(address)!r}, which is a dashboard's; submit the run with `ray job submit`, or give "
        "host:port of the cluster itself, where the port is 6379 unless it was started with another",
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class RunConfig(
    Request,
    ModelOptions,
    NoiseOptions,
    ConditionOptions,
    PlanOptions,
    SolverOptions,
    ScheduleOptions,
    GuidanceOptions,
    DecoderOptions,
    PrecisionOptions,
    EngineOptions,
    ArchitectureOptions,
    OutputOptions,
    ScoreOptions,
    FleetOptions,
    ReportingOptions,
):
    """A run: every flag of `ray-sampler sample`, under its name. Immutable; see `dataclasses.replace`.

    An option that is not given is None; what it becomes then is said by `--dry_run`, and by the run itself.

    Raises:
        RequestError: a value is not of its option's kind, or not one of its choices.
    """


@dataclass(frozen=True, kw_only=True)
class ScoreOutputOptions:
    """Where a score goes."""

    output: str | None = option(
        None,
        "Folder for scores.json and features, or a file .json for the score (default: into the run; beside an archive "
        "or folder).",
    )

    def check(self) -> None:
        """Raises RequestError: nothing can be written there."""
        if self.output is not None:
            check_output(self.output)


@dataclass(frozen=True, kw_only=True, repr=False)
class ScoreRequest(Request, ScoreOptions, ScoreOutputOptions, FleetOptions, ReportingOptions):
    """A score of pictures that are there: every flag of `ray-sampler score`; `score` is its --reference."""


HEADINGS: dict[str, tuple[type, ...]] = {
    "model": (ModelOptions,),
    "samples": (PlanOptions, NoiseOptions, ConditionOptions),
    "solver and noise levels": (SolverOptions, ScheduleOptions),
    "guidance and decoding": (GuidanceOptions, DecoderOptions),
    "computing": (PrecisionOptions, EngineOptions),
    "architecture (of checkpoints that do not say theirs)": (ArchitectureOptions,),
    "output": (OutputOptions,),
    "score": (ScoreOptions,),
    "fleet": (FleetOptions,),
    "reporting": (ReportingOptions,),
}
"""The order of the flags in `--help`."""
