"""A network and its preconditioning from the flags of the consistency-models repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ray_sampler.errors import require
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.parameterisation import SIGMA_DATA, TIMES, consistency_scalings, edm_scalings
from ray_sampler.sampling.schedules import RHO

NUM_CLASSES = 1000


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
