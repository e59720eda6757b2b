"""`python -m ray_sampler` is `ray-sampler`."""

import sys

from ray_sampler.cli import main

if __name__ == "__main__":
    sys.exit(main())
