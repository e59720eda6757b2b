"""The flags of `ray-sampler sample`, by purpose. Each group is also a heading of its --help.

A flag that a model or preset may set is None until somebody gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ray_sampler.settings import Compile, FragmentFormat, Generator, Precision, Progress, Rounding, Solver, TrainingMode


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
    """Seconds without a sign of progress after which an actor is replaced, at least; where shards take long, a multiple
    of their median."""
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
