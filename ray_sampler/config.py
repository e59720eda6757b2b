"""What a run is: the request as its flags state it, and the resolved run that follows from it.

`RunConfig` has one field for each flag, under the flag's name. A field that a model or preset
may bring is None until somebody sets it; `RunConfig.resolve` fills those fields, in the order
explicit value, then preset, then bundled model, then default, and checks everything that can be
checked without opening a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from ray_sampler.flags import (
    ArchitectureFlags,
    FleetFlags,
    ModelFlags,
    OutputFlags,
    ReportingFlags,
    SampleSetFlags,
    SamplingFlags,
    TrainingFlags,
)
from ray_sampler.settings import (
    SAMPLING_VERSION,
    Architecture,
    Compile,
    FragmentFormat,
    Generator,
    Precision,
    Progress,
    RequestError,
    Rounding,
    RunError,
    Sampling,
    Solver,
    TrainingMode,
    require,
)

__all__ = [
    "Architecture",
    "Compile",
    "FragmentFormat",
    "Generator",
    "Precision",
    "RequestError",
    "Rounding",
    "Run",
    "RunConfig",
    "RunError",
    "Sampling",
    "Solver",
    "TrainingMode",
    "fingerprint",
    "parse_ts",
    "redact",
    "require",
]


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    TrainingFlags, ReportingFlags, FleetFlags, OutputFlags, SampleSetFlags, SamplingFlags, ArchitectureFlags, ModelFlags
):
    """A request for a run: every flag of `ray-sampler sample`, under its name."""

    def resolve(self, brought: Mapping[str, Any], weights: str) -> Run:
        """The run that this request means.

        Args:
            brought: settings that the named model or preset brings, by flag name.
            weights: a bundled model's name, or a path or URL.

        Raises:
            RequestError: a value is wrong, by itself or beside another.
        """
        self._check_choices()
        settings = dict(brought) | {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}
        require(
            not settings.get("learn_sigma"),
            "--learn_sigma is True, which is not supported, as no Karras sampler uses a learned variance; give False",
        )
        settings["ts"] = parse_ts(settings.get("ts", ""))
        architecture = Architecture(**{f.name: settings[f.name] for f in fields(Architecture) if f.name in settings})
        sampling = Sampling(**{f.name: settings[f.name] for f in fields(Sampling) if f.name in settings})
        architecture.validate()
        sampling.validate()
        self._check_numbers(architecture)
        require(
            sampling.generator != "determ-indiv" or self.num_samples * (sampling.seed + 1) <= 2**64,
            f"--seed is {sampling.seed}; --generator determ-indiv seeds sample i with i + num_samples * seed, so with "
            f"--num_samples {self.num_samples} it must be below {2**64 // self.num_samples}",
        )
        shard_size = -(-(self.shard_size or 512) // self.batch_size) * self.batch_size
        return Run(
            weights=weights,
            architecture=architecture,
            sampling=sampling,
            precision=self._precision(),
            labels=(self.labels or "random") if architecture.class_cond else None,
            shard_size=shard_size,
            request=self,
        )

    def _precision(self) -> Literal["auto"] | Precision:
        if self.use_fp16 is None:
            return self.precision
        if self.precision == "auto":
            return "fp16" if self.use_fp16 else "fp32"
        require(
            self.use_fp16 == (self.precision == "fp16"),
            f"--use_fp16 {self.use_fp16} contradicts --precision {self.precision}; give one of the two",
        )
        return self.precision

    def _check_choices(self) -> None:
        """The command line checks its choices by itself; a caller in Python may have written anything."""
        for name, choices in (
            ("training_mode", get_args(TrainingMode)),
            ("sampler", get_args(Solver)),
            ("generator", get_args(Generator)),
            ("rounding", get_args(Rounding)),
            ("precision", ("auto", *get_args(Precision))),
            ("fragment_format", get_args(FragmentFormat)),
            ("compile", get_args(Compile)),
            ("progress", get_args(Progress)),
        ):
            value = getattr(self, name)
            require(value is None or value in choices, f"--{name} is {value!r}; it must be one of {', '.join(choices)}")

    def _check_numbers(self, architecture: Architecture) -> None:
        for name in ("num_samples", "batch_size", "shard_size", "max_actors"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name} is {value}; it must be at least 1")
        require(self.num_samples <= 10**12, f"--num_samples is {self.num_samples}; it must be at most 10^12")
        require(self.min_actors >= 0, f"--min_actors is {self.min_actors}; it must be at least 0")
        require(
            self.max_actors is None or self.min_actors <= self.max_actors,
            f"--min_actors is {self.min_actors}; it must not exceed --max_actors {self.max_actors}",
        )
        gpus = self.gpus_per_actor
        require(
            gpus is None or (0 <= gpus < math.inf and (gpus <= 1 or gpus == int(gpus))),
            f"--gpus_per_actor is {gpus}; it must be 0, a fraction of 1, or a whole number",
        )
        require(
            0 < self.shard_timeout < math.inf, f"--shard_timeout is {self.shard_timeout}; it must be above 0 seconds"
        )
        require(
            self.labels is None or architecture.class_cond,
            f"--labels is {self.labels!r}, but the model is unconditional; leave it out or give --class_cond True",
        )


def parse_ts(text: str | tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the multistep solver: "0,22,39" -> (0, 22, 39)."""
    if not isinstance(text, str):
        return tuple(text)
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise RequestError(f"--ts is {text!r}; it must be whole numbers with commas, as in 0,22,39") from None


@dataclass(frozen=True)
class Run:
    """A resolved run: nothing in it is left to a default."""

    weights: str
    """A bundled model's name, or the path or URL of a checkpoint."""
    architecture: Architecture
    sampling: Sampling
    precision: Literal["auto"] | Precision
    """auto until the fleet is known."""
    labels: str | None
    """The label rule as requested; None for an unconditional model."""
    shard_size: int
    """Samples, a multiple of the batch size."""
    request: RunConfig = field(repr=False)
    """Where the settings that need no resolving are read."""

    def as_json(self) -> dict[str, Any]:
        """Every setting under its flag's name, without a credential, for --dry_run and run.json."""
        settings = asdict(self.request) | asdict(self.architecture) | asdict(self.sampling)
        settings |= {
            "model": self.weights,
            "precision": self.precision,
            "labels": self.labels,
            "shard_size": self.shard_size,
        }
        settings |= {"ts": ",".join(map(str, self.sampling.ts)), "s_tmax": str(self.sampling.s_tmax)}
        for gone in ("model_path", "use_fp16", "dry_run"):
            del settings[gone]
        for url in ("model", "output", "labels", "address"):
            settings[url] = redact(settings[url])
        return settings

    def identity(self, weights_hash: str, labels: dict[str, Any] | None) -> dict[str, Any]:
        """All that decides a sample's content, flat, by effective value."""
        return (
            {"sampling_version": SAMPLING_VERSION, "weights": weights_hash, "precision": self.precision}
            | self.architecture.effective()
            | self.sampling.effective(self.request.num_samples)
            | ({f"labels_{key}": value for key, value in labels.items()} if labels else {})
        )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """SHA-256 of a run's identity, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def redact(url: str | None) -> str | None:
    """`url` without user names, passwords and query strings, any of which may hold a credential."""
    if url is None or "://" not in url:
        return url
    return "::".join(_redact_link(link) for link in re.split(r"::(?=[\w+.-]+://)", url))


def _redact_link(link: str) -> str:
    """One URL of a chain. A password that was not escaped may hold slashes, as S3 keys do, and more."""
    scheme, separator, rest = link.partition("://")
    # What follows a colon is a port, or else a password up to the last "@".
    rest = re.sub(r"^[^/@?#:]*:(?!\d*(?:[/?#]|$)).*@", "", rest, flags=re.DOTALL)
    if scheme not in ("abfs", "abfss"):  # where the container stands before the "@"
        rest = re.sub(r"^[^/?#]*@", "", rest)
    return scheme + separator + re.split(r"[?#]", rest, maxsplit=1)[0]
