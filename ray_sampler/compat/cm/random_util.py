"""Where a script's noise comes from."""

from ray_sampler.compat.generators import get_generator

__all__ = ["get_generator"]
