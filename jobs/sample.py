"""The entry point of `ray job submit -- python jobs/sample.py`: the same as `ray-sampler sample`.

It runs from any folder, with the package installed or only beside it: Ray's workers inherit PYTHONPATH.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_sampler.cli import entry

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (sys.path[0], os.environ.get("PYTHONPATH"))))
    entry(["sample", *sys.argv[1:]])
