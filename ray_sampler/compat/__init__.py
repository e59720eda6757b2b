"""The names that code for the consistency-models repository imports, over this package's network and solvers.

Signatures, defaults and results are the original's, in one process: such code changes its import lines only. Whole
scripts run without an edit: `python -m ray_sampler.compat SCRIPT [ARGS]`.
"""

from __future__ import annotations

from ray_sampler.compat.cm.karras_diffusion import KarrasDenoiser, karras_sample
from ray_sampler.compat.cm.random_util import Device, GlobalGenerator, NoiseSource, SeededGenerator, get_generator
from ray_sampler.compat.cm.script_util import (
    NUM_CLASSES,
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    str2bool,
)

__all__ = [
    "NUM_CLASSES",
    "Device",
    "GlobalGenerator",
    "KarrasDenoiser",
    "NoiseSource",
    "SeededGenerator",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_model_and_diffusion",
    "get_generator",
    "karras_sample",
    "model_and_diffusion_defaults",
    "str2bool",
]
