"""The entry point of `ray job submit -- python jobs/sample.py`: the same as `ray-sampler sample`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_sampler.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
