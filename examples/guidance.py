"""Classifier-free guidance (CFG): the same noise and labels at several strengths, in one picture.

python examples/guidance.py           # writes runs/guidance/compare.png
"""

import numpy as np
import ray
from PIL import Image

from ray_sampler import RunConfig, read_archive, run


def main(num_samples: int = 40) -> str:
    """Returns the path of the picture: a row for each strength, a column for each sample."""
    ray.init(ignore_reinit_error=True)  # one Ray for all runs; otherwise each run starts its own
    rows = []
    for guidance in (1.0, 2.0, 4.0):
        folder = f"runs/guidance/{guidance:g}"
        result = run(RunConfig(guidance=guidance, labels="balanced", num_samples=num_samples, output=folder))
        images = read_archive(result.archive).read(0, 10).images  # (10, 32, 32, 3) uint8: the digits 0 to 9
        rows.append(np.concatenate(images, axis=1))
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((3 * picture.width, 3 * picture.height), Image.Resampling.NEAREST).save("runs/guidance/compare.png")
    print("runs/guidance/compare.png: guidance 1, 2 and 4 from top to bottom")
    return "runs/guidance/compare.png"


if __name__ == "__main__":
    main()
