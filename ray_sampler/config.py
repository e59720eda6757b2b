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

SAMPLING_VERSION = 1
"""Raised whenever a change of the code changes samples."""

Solver = Literal["heun", "euler", "dpm", "ancestral", "onestep", "progdist", "multistep"]
TrainingMode = Literal["edm", "consistency_distillation", "consistency_training", "progdist"]
Generator = Literal["philox", "determ", "determ-indiv", "dummy"]
Precision = Literal["fp32", "fp16", "bf16"]
Rounding = Literal["truncate", "nearest"]
FragmentFormat = Literal["parquet", "npz"]
Compile = Literal["auto", "on", "off"]
Progress = Literal["auto", "bar", "log", "none"]

GENERATORS_OF_N = ("determ", "determ-indiv", "dummy")
"""Generators whose noise depends on num_samples."""

CHANNEL_MULTIPLIERS = {512: (0.5, 1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}
"""What an empty channel_mult means, by image size."""


class RequestError(ValueError):
    """The request is wrong: one sentence that names the setting, its value and what would be right."""


class RunError(RuntimeError):
    """The run failed or is incomplete: one sentence that says why and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `RequestError` with `message` unless `condition` holds."""
    if not condition:
        raise RequestError(message)


@dataclass(frozen=True)
class Architecture:
    """The shape of a UNet. The defaults are the original's."""

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: str = "32,16,8"
    channel_mult: str = ""
    class_cond: bool = False
    num_classes: int = 1000
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    learn_sigma: bool = False
    dropout: float = 0.0

    in_channels = 3

    @property
    def out_channels(self) -> int:
        return 6 if self.learn_sigma else 3

    @property
    def embedding_channels(self) -> int:
        return 4 * self.num_channels

    @property
    def channel_multipliers(self) -> tuple[float, ...]:
        if not self.channel_mult:
            return CHANNEL_MULTIPLIERS[self.image_size]
        return tuple(float(m) for m in self.channel_mult.split(","))

    @property
    def attention_factors(self) -> tuple[int, ...]:
        """Downsampling factors at which attention sits."""
        return tuple(self.image_size // int(r) for r in self.attention_resolutions.split(",") if r)

    def attends_at(self, level: int) -> bool:
        return 2**level in self.attention_factors

    @property
    def heads_upsample(self) -> int:
        return self.num_heads if self.num_heads_upsample == -1 else self.num_heads_upsample

    def heads_at(self, channels: int, num_heads: int) -> int:
        """Attention heads of a block with so many channels, where `num_heads` is asked for."""
        return num_heads if self.num_head_channels == -1 else channels // self.num_head_channels

    def validate(self) -> None:
        for name in ("image_size", "num_channels", "num_res_blocks", "num_heads", "num_classes"):
            require(getattr(self, name) >= 1, f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, f"--{name} is {value}; it must be -1 or at least 1")
        require(0 <= self.dropout < 1, f"--dropout is {self.dropout}; it must be in [0, 1)")
        if not self.channel_mult:
            require(
                self.image_size in CHANNEL_MULTIPLIERS,
                f"--channel_mult is needed for --image_size {self.image_size}; "
                f"only {', '.join(map(str, sorted(CHANNEL_MULTIPLIERS)))} have one by default",
            )
        for name, kind in (("channel_mult", float), ("attention_resolutions", int)):
            text = getattr(self, name)
            try:
                positive = all(0 < kind(part) < math.inf for part in text.split(",") if text)
            except ValueError:
                positive = False
            require(positive, f"--{name} is {text!r}; it must be positive numbers with commas, as in 1,2,2")
        multipliers = self.channel_multipliers
        factor = 2 ** (len(multipliers) - 1)
        require(
            self.image_size % factor == 0,
            f"--image_size is {self.image_size}; with {len(multipliers)} channel multipliers it must be a "
            f"multiple of {factor}",
        )
        for level, multiplier in enumerate(multipliers):
            channels = int(multiplier * self.num_channels)
            require(
                channels > 0 and channels % 32 == 0,
                f"--num_channels {self.num_channels} with --channel_mult {multiplier:g} gives {channels} "
                "channels; they must be a multiple of 32, the groups of each normalisation",
            )
            if self.attends_at(level) or level == len(multipliers) - 1:
                for flag, asked in (("num_heads", self.num_heads), ("num_heads_upsample", self.heads_upsample)):
                    heads = self.heads_at(channels, asked)
                    whole = heads > 0 and channels % heads == 0
                    require(
                        whole and self.num_head_channels in (-1, channels // heads),
                        f"{channels} channels cannot be split into attention heads with --{flag} "
                        f"{asked} and --num_head_channels {self.num_head_channels}; "
                        "the channels must be a multiple of the head size",
                    )

    def effective(self) -> dict[str, Any]:
        """What decides the network's function, by effective value."""
        result: dict[str, Any] = {
            "image_size": self.image_size,
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "channel_mult": ",".join(f"{m:g}" for m in self.channel_multipliers),
            "attention_resolutions": ",".join(
                str(self.image_size // 2**level)
                for level in range(len(self.channel_multipliers))
                if self.attends_at(level)
            ),
            "class_cond": self.class_cond,
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": self.resblock_updown,
            "learn_sigma": self.learn_sigma,
        }
        if self.num_head_channels == -1:
            result |= {"num_heads": self.num_heads, "num_heads_upsample": self.heads_upsample}
        else:
            result |= {"num_head_channels": self.num_head_channels}
        if self.class_cond:
            result |= {"num_classes": self.num_classes}
        return result


@dataclass(frozen=True)
class Sampling:
    """How a sample comes from a network and noise. The defaults are the original's, philox apart."""

    training_mode: TrainingMode = "edm"
    sampler: Solver = "heun"
    steps: int = 40
    ts: tuple[int, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0
    clip_denoised: bool = True
    rounding: Rounding = "truncate"
    generator: Generator = "philox"
    seed: int = 42

    @property
    def consistency(self) -> bool:
        """Whether the consistency models' preconditioning applies."""
        return "consistency" in self.training_mode

    def validate(self) -> None:
        require(self.steps >= 1, f"--steps is {self.steps}; it must be at least 1")
        require(
            0 < self.sigma_min < self.sigma_max < math.inf,
            f"--sigma_min is {self.sigma_min:g} and --sigma_max {self.sigma_max:g}; "
            "they must satisfy 0 < sigma_min < sigma_max",
        )
        for name in ("s_churn", "s_tmin", "s_noise"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"--{name} is {value:g}; it must be a finite number of at least 0")
        require(self.s_tmax >= self.s_tmin, f"--s_tmax is {self.s_tmax:g}; it must be at least s_tmin, {self.s_tmin:g}")
        require(0 <= self.seed < 2**64, f"--seed is {self.seed}; it must be in [0, 2^64)")
        if self.sampler == "multistep":
            require(self.steps >= 2, f"--steps is {self.steps}; --sampler multistep needs at least 2")
            require(
                len(self.ts) >= 2,
                f"--ts is {','.join(map(str, self.ts))!r}; --sampler multistep needs two or more, as in 0,22,39",
            )
            for t in self.ts:
                require(
                    0 <= t < self.steps,
                    f"--ts has {t}; with --steps {self.steps} its indices must be from 0 to {self.steps - 1}",
                )

    def effective(self, num_samples: int) -> dict[str, Any]:
        """What decides a sample, by effective value: settings that the solver does not use are left out."""
        result: dict[str, Any] = {
            "preconditioning": "consistency" if self.consistency else "edm",
            "sampler": self.sampler,
            "sigma_max": float(self.sigma_max),
            "clip_denoised": self.clip_denoised,
            "rounding": self.rounding,
            "generator": self.generator,
            "seed": self.seed,
        }
        if self.sampler != "onestep" or self.consistency:
            result["sigma_min"] = float(self.sigma_min)
        if self.sampler != "onestep":
            result["steps"] = self.steps
        if self.sampler == "multistep":
            result["ts"] = ",".join(map(str, self.ts))
        if self.sampler in ("heun", "dpm"):
            result["s_churn"] = float(self.s_churn)
            if self.s_churn > 0:
                result |= {
                    "s_tmin": float(self.s_tmin),
                    "s_tmax": str(float(self.s_tmax)),
                    "s_noise": float(self.s_noise),
                }
        if self.generator in GENERATORS_OF_N:
            result["num_samples"] = num_samples
        return result


# The flags, by purpose. Each group is also a heading of `ray-sampler sample --help`.


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    model: str | None = None
    """Weights: a bundled model's name (digits, digits-cd), which brings its settings, or a .pt, .pth or
    .safetensors file: a local path or any fsspec URL. Without one the bundled digits model runs."""
    model_path: str = ""
    """The same as --model."""
    preset: str | None = None
    """Settings alone, for weights that you have: architecture, preconditioning, solver and ts. Explicit flags
    win. `ray-sampler presets` lists them."""


@dataclass(frozen=True, kw_only=True)
class ArchitectureFlags:
    image_size: int | None = None
    """Width and height in pixels (64)."""
    num_channels: int | None = None
    """Base width of the network (128)."""
    num_res_blocks: int | None = None
    """Residual blocks at each level (2)."""
    num_heads: int | None = None
    """Attention heads, where num_head_channels is -1 (4)."""
    num_heads_upsample: int | None = None
    """The same on the way up; -1 means num_heads (-1)."""
    num_head_channels: int | None = None
    """Channels of an attention head; -1 means num_heads decides (-1)."""
    attention_resolutions: str | None = None
    """Resolutions with attention (32,16,8)."""
    channel_mult: str | None = None
    """Width multiplier of each level, as 1,2,3,4; empty means by image size ("")."""
    class_cond: bool | None = None
    """Whether the model takes class labels (False)."""
    num_classes: int | None = None
    """Classes of a class-conditional model (1000)."""
    use_scale_shift_norm: bool | None = None
    """Whether the embedding scales as well as shifts (True)."""
    resblock_updown: bool | None = None
    """Whether residual blocks change the resolution (False)."""
    learn_sigma: bool | None = None
    """Accepted for old command lines; True is refused, as no Karras sampler uses a learned variance (False)."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    training_mode: TrainingMode | None = None
    """How the model was trained: any with "consistency" takes that preconditioning (edm)."""
    sampler: Solver | None = None
    """The solver (heun)."""
    steps: int | None = None
    """Points of the noise schedule (40)."""
    ts: str | None = None
    """Indices into the schedule for --sampler multistep, as 0,22,39 ("")."""
    sigma_min: float | None = None
    """Smallest noise level (0.002)."""
    sigma_max: float | None = None
    """Largest noise level (80)."""
    s_churn: float | None = None
    """Stochasticity of heun and dpm (0)."""
    s_tmin: float | None = None
    """Smallest noise level with churn (0)."""
    s_tmax: float | None = None
    """Largest noise level with churn (inf)."""
    s_noise: float | None = None
    """Deviation of the churn noise (1)."""
    clip_denoised: bool | None = None
    """Whether every denoiser output is clamped to [-1, 1] (True)."""
    rounding: Rounding = "truncate"
    """Pixel conversion: truncate, as guided-diffusion does, or nearest, as EDM2 and DiT do."""
    precision: Literal["auto"] | Precision = "auto"
    """Of the network's torso; auto is fp16 on a GPU and fp32 on a CPU."""
    use_fp16: bool | None = None
    """True means --precision fp16."""


@dataclass(frozen=True, kw_only=True)
class SampleSetFlags:
    num_samples: int = 10000
    """How many samples the archive holds."""
    seed: int = 42
    """Decides the noise and the random labels, together with each sample's index."""
    generator: Generator = "philox"
    """Where noise comes from: philox (counter-based), or the original's determ, determ-indiv and dummy."""
    labels: str | None = None
    """Labels of a class-conditional model: random (the default), balanced, a list as 0,3,999, or a file
    (.npz with arr_1, .npy, text); a list shorter than N is repeated."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    output: str | None = None
    """The run directory: a local path or any fsspec URL, s3:// and gs:// among them
    (runs/<model>-<start of the fingerprint>)."""
    fragment_format: FragmentFormat = "parquet"
    """Of the fragments."""
    overwrite: bool = False
    """Delete an earlier run there first; no other driver may be writing to it."""


@dataclass(frozen=True, kw_only=True)
class FleetFlags:
    batch_size: int = 16
    """Images that one actor computes at once."""
    shard_size: int | None = None
    """Samples of a fragment, rounded up to whole batches (512)."""
    min_actors: int = 1
    """Actors kept until the last shard is done; idle ones above it are released as the queue empties."""
    max_actors: int | None = None
    """Actors at most (as many as the queue can use)."""
    gpus_per_actor: float | None = None
    """GPUs of an actor; 0 means CPUs (1 where there are GPUs, else 0)."""
    compile: Compile = "auto"
    """torch.compile: off, on (kernels chosen by timing), or auto (on a GPU, without timing)."""
    shard_timeout: float = 600.0
    """Seconds without a result after which an actor is replaced, at least; where shards take long, a multiple of
    their median."""
    address: str | None = None
    """Ray cluster to join, as auto or host:6379; without it, and without RAY_ADDRESS, a local Ray is started."""


@dataclass(frozen=True, kw_only=True)
class ReportingFlags:
    progress: Progress = "auto"
    """A live bar, a line every 10 seconds, or nothing; auto is a bar on a terminal."""
    json_log: bool = False
    """Progress lines as JSON."""
    dry_run: bool = False
    """Print the resolved run as JSON; open no checkpoint, touch nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """Accepted so that published command lines run; they are recorded and change no sample."""

    dropout: float | None = None
    """Inert in sampling (0)."""
    use_checkpoint: bool = False
    """Gradient checkpointing; inert in sampling."""
    use_new_attention_order: bool = False
    """Inert in the original too: its attention has one order of channels."""
    weight_schedule: str = "karras"
    """Weighting of the training loss; inert in sampling."""


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
