"""`python -m ray_sampler` is `ray-sampler`."""

from ray_sampler.cli import entry

if __name__ == "__main__":
    entry()
