"""`python -m ray_sampler.compat SCRIPT [ARGS]` runs a script of the consistency-models repository without one edit."""

import sys

from ray_sampler.compat.script import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
