"""The names that code for the consistency-models repository imports, over this package's network and solvers.

Signatures, defaults and results are the original's, in one process: such code changes its import lines only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from ray_sampler.errors import require
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.noise import in_order
from ray_sampler.sampling.parameterisation import SIGMA_DATA, TIMES, Denoiser, consistency_scalings, edm_scalings
from ray_sampler.sampling.schedules import RHO, Schedule
from ray_sampler.sampling.solvers import SOLVERS, Churn, Indices

NUM_CLASSES = 1000

Device = torch.device | str

EVALUATIONS = {"heun": 2, "dpm": 2, "euler": 1, "ancestral": 1, "progdist": 1}
"""Network evaluations of a step, for the solvers that report their steps; the others report none."""

ORIGINAL = ("heun", "euler", "dpm", "ancestral", "onestep", "progdist", "multistep")
"""The solvers of the consistency-models repository."""

RAISES_SIGMA = ("heun", "dpm", "ancestral")
"""Solvers that report sigma_hat, the level of the step's first evaluation."""


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The arguments of `create_model_and_diffusion`, by name, at their defaults."""
    return {
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "32,16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        "learn_sigma": False,
        "weight_schedule": "karras",
    }


@dataclass
class KarrasDenoiser:
    """Preconditioning of a network: EDM's, or with `distillation` that of consistency models."""

    sigma_data: float = SIGMA_DATA
    sigma_max: float = 80.0
    sigma_min: float = 0.002
    rho: float = RHO
    weight_schedule: str = "karras"
    """Of the training loss; inert in sampling."""
    distillation: bool = False

    def __post_init__(self) -> None:
        require(self.sigma_data == SIGMA_DATA, f"sigma_data is {self.sigma_data}; only {SIGMA_DATA} is supported")

    def denoise(
        self, model: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, **model_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """F(c_in x, 250 ln sigma, **model_kwargs) and D(x, sigma), unclamped, of x_t (B, C, H, W) at sigmas (B,)."""
        scalings = consistency_scalings(sigmas, self.sigma_min) if self.distillation else edm_scalings(sigmas)
        c_skip, c_out, c_in = (s[:, None, None, None] for s in scalings)
        model_output = model(c_in * x_t, TIMES["250log"](sigmas), **model_kwargs)
        return model_output, c_out * model_output + c_skip * x_t


def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    weight_schedule: str,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    distillation: bool = False,
) -> tuple[UNet, KarrasDenoiser]:
    """A network with random weights, float32 on the CPU, and its preconditioning.

    use_fp16 changes nothing until `convert_to_fp16` is called; use_checkpoint, use_new_attention_order
    and weight_schedule are inert in sampling.

    Raises:
        RequestError: an argument is wrong, or learn_sigma, which no Karras sampler uses.
    """
    require(not learn_sigma, "learn_sigma=True is not supported: a Karras sampler uses no learned variance")
    arch = AdmOptions(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=num_res_blocks,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        num_head_channels=num_head_channels,
        attention_resolutions=attention_resolutions,
        channel_mult=channel_mult,
        class_cond=class_cond,
        num_classes=NUM_CLASSES,
        use_scale_shift_norm=use_scale_shift_norm,
        resblock_updown=resblock_updown,
        dropout=dropout,
    )
    arch.validate()
    diffusion = KarrasDenoiser(
        sigma_max=sigma_max, sigma_min=sigma_min, weight_schedule=weight_schedule, distillation=distillation
    )
    return UNet(arch), diffusion


class NoiseSource(Protocol):
    """Where `karras_sample` draws its normals, one call for each draw."""

    def randn(self, *size: int, device: Device) -> Tensor: ...

    def randn_like(self, tensor: Tensor) -> Tensor: ...


def karras_sample(
    diffusion: KarrasDenoiser,
    model: nn.Module,
    shape: tuple[int, ...],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callable[[dict[str, Any]], object] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: Device | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7.0,
    sampler: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = inf,
    s_noise: float = 1.0,
    generator: NoiseSource | None = None,
    ts: Iterable[int] | None = None,
) -> Tensor:
    """Samples x_0 of `shape`, (B, C, H, W), float32 in [-1, 1] on `device`.

    Args:
        callback: called once a step by heun, dpm, euler, ancestral and progdist with x, i, sigma, denoised and,
            where the solver has one, sigma_hat, as of the step's first evaluation.
        model_kwargs: passed to the model, as {"y": labels}.
        generator: from `get_generator`; its streams end where the original's would. Without one, torch's global
            generator serves.
        ts: indices into the schedule, for multistep.

    Raises:
        RequestError: an argument is wrong.
    """
    solvers = [name for name in SOLVERS if name in ORIGINAL]
    require(sampler in solvers, f"sampler is {sampler!r}; it must be one of {', '.join(solvers)}")
    solver = SOLVERS[sampler]
    source = get_generator("dummy") if generator is None else generator
    rho = diffusion.rho if sampler == "multistep" else rho
    schedule = Schedule(steps=steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    churn = Churn(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    options = Indices(",".join(map(str, ts or ()))) if solver.options is Indices else churn
    schedule.validate()
    churn.validate(schedule)
    options.validate(schedule)
    x_T = source.randn(*shape, device=torch.get_default_device() if device is None else device)
    drawn = 0

    def draw_next() -> Tensor:
        nonlocal drawn
        drawn += 1
        return x_T if drawn == 1 else source.randn_like(x_T)

    def denoise(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        _, denoised = diffusion.denoise(model, x, sigma.to(x).expand(len(x)), **(model_kwargs or {}))
        return denoised.clamp(-1, 1) if clip_denoised else denoised

    sigmas, noise = solver.levels(schedule, options, torch.float32), in_order(draw_next)
    with step_bar(steps if progress and sampler in EVALUATIONS else None) as advance, torch.no_grad():
        reported = reporting(denoise, sampler, sigmas, callback, advance)
        x_0 = solver.run(reported, noise(0) * sigma_max, sigmas, noise, options).clamp(-1, 1)
    while drawn < 1 + solver.draws(steps, options):
        draw_next()
    return x_0


def reporting(
    denoise: Denoiser,
    sampler: str,
    sigmas: Tensor,
    callback: Callable[[dict[str, Any]], object] | None,
    advance: Callable[[], None],
) -> Denoiser:
    """`denoise`, which at the first evaluation of each step calls `callback` with its state and then `advance`."""
    if sampler not in EVALUATIONS:
        return denoise
    evaluations = 0

    def reported(x: Tensor, sigma: Tensor, step: Tensor | None = None) -> Tensor:
        nonlocal evaluations
        denoised = denoise(x, sigma)
        number, within = divmod(evaluations, EVALUATIONS[sampler])
        evaluations += 1
        if within == 0:
            if callback is not None:
                state = {"x": x, "i": number, "sigma": sigmas[number], "denoised": denoised}
                callback(state | ({"sigma_hat": sigma} if sampler in RAISES_SIGMA else {}))
            advance()
        return denoised

    return reported


@contextmanager
def step_bar(steps: int | None) -> Iterator[Callable[[], None]]:
    """A bar of so many steps, moved by calling what this yields; none for None."""
    if steps is None:
        yield lambda: None
        return
    with Progress() as bar:
        task = bar.add_task("sampling", total=steps)
        yield lambda: bar.advance(task)


class GlobalGenerator:
    """dummy: torch's global generator."""

    def randn(self, *size: int, **kwargs: Any) -> Tensor:
        return torch.randn(*size, **kwargs)

    def randn_like(self, tensor: Tensor, **kwargs: Any) -> Tensor:
        return torch.randn_like(tensor, **kwargs)

    def randint(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.randint(*args, **kwargs)


class SeededGenerator:
    """Streams whose rows belong to samples: row j of a call is sample done_samples + j, the last one at most.

    Streams go on from call to call, on each device by themselves. Where torch.distributed runs, row j of
    rank r is sample done_samples + r + j * ranks.
    """

    def __init__(self, num_samples: int, seed: int = 0, *, individual: bool) -> None:
        require(num_samples >= 1, f"num_samples is {num_samples}; this generator needs at least 1")
        self.num_samples = num_samples
        self.done_samples = 0
        self.seed = seed
        self.individual = individual
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if running else 0
        self.world_size = torch.distributed.get_world_size() if running else 1
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        """Begin all streams anew, from `seed`; `get_seed` goes on to give the first one."""
        self._stream_seed = seed
        self._streams: dict[tuple[torch.device, int], torch.Generator] = {}

    def get_seed(self) -> int:
        return self.seed

    def set_done_samples(self, done_samples: int) -> None:
        """Move row 0 to the sample `done_samples`; determ, whose stream is one, begins it anew."""
        self.done_samples = done_samples
        if not self.individual:
            self.set_seed(self.seed)

    def randn(self, *size: int, dtype: torch.dtype = torch.float, device: Device = "cpu") -> Tensor:
        return self._rows(size, device, lambda s, g: torch.randn(s, generator=g, dtype=dtype, device=g.device))

    def randn_like(self, tensor: Tensor) -> Tensor:
        return self.randn(*tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def randint(
        self, low: int, high: int, size: tuple[int, ...], dtype: torch.dtype = torch.long, device: Device = "cpu"
    ) -> Tensor:
        return self._rows(
            size, device, lambda s, g: torch.randint(low, high, s, generator=g, dtype=dtype, device=g.device)
        )

    def _rows(
        self, size: tuple[int, ...], device: Device, draw: Callable[[tuple[int, ...], torch.Generator], Tensor]
    ) -> Tensor:
        samples = self.done_samples + self.rank + self.world_size * torch.arange(size[0])
        samples = samples.clamp(0, self.num_samples - 1)
        if not self.individual:
            return draw((self.num_samples, *size[1:]), self._stream(device, 0))[samples]
        return torch.cat([draw((1, *size[1:]), self._stream(device, i)) for i in samples.tolist()])

    def _stream(self, device: Device, i: int) -> torch.Generator:
        """The stream of sample i; of all samples for determ."""
        device = torch.empty(0, device=device).device  # cuda and cuda:0 are one
        if (device, i) not in self._streams:
            seed = i + self.num_samples * self._stream_seed if self.individual else self._stream_seed
            self._streams[device, i] = torch.Generator(device).manual_seed(seed)
        return self._streams[device, i]


def get_generator(generator: str, num_samples: int = 0, seed: int = 0) -> GlobalGenerator | SeededGenerator:
    """A source of noise: "dummy" (torch's global generator), "determ" (one stream: each call draws for all
    num_samples) or "determ-indiv" (one stream a sample, seeded i + num_samples * seed).

    Raises:
        RequestError: another name, or a seeded one without samples.
    """
    require(
        generator in ("dummy", "determ", "determ-indiv"),
        f"generator is {generator!r}; it must be one of dummy, determ, determ-indiv",
    )
    if generator == "dummy":
        return GlobalGenerator()
    return SeededGenerator(num_samples, seed, individual=generator == "determ-indiv")


def args_to_dict(args: object, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes `keys` of an arguments object, by name."""
    return {key: getattr(args, key) for key in keys}


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """An option --name for each entry, of its default's type; None means text."""
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


def str2bool(v: str | bool) -> bool:
    """yes, true, t, y, 1 and no, false, f, n, 0, in any case."""
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is no boolean; write True or False")
