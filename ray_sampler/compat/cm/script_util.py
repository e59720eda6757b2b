"""A script's arguments, and the network that they describe."""

from ray_sampler.compat.preconditioned import NUM_CLASSES, create_model_and_diffusion, model_and_diffusion_defaults
from ray_sampler.compat.script_arguments import add_dict_to_argparser, args_to_dict, str2bool

__all__ = [
    "NUM_CLASSES",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "str2bool",
]
