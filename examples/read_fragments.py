"""Read samples without the archive, even during a run: fragments are Parquet files with checksums.

python examples/read_fragments.py     # writes runs/fragments/means.png
"""

from pathlib import Path

import numpy as np
import pyarrow.dataset
from PIL import Image

from ray_sampler import RunConfig, read_fragment, run


def main(num_samples: int = 200) -> str:
    """Returns the path of a picture with the mean of each digit."""
    run(RunConfig(model="digits-cd", labels="balanced", num_samples=num_samples, output="runs/fragments"))
    sums, counts = np.zeros((10, 32, 32)), np.zeros(10)
    for path in sorted(Path("runs/fragments/fragments").iterdir()):
        samples = read_fragment(path).samples  # raises where a checksum differs
        assert samples.labels is not None  # they are None of a network without classes
        for image, label in zip(samples.images, samples.labels, strict=True):
            sums[label] += image[..., 0]
            counts[label] += 1
    means = (sums / counts[:, None, None]).astype(np.uint8)
    Image.fromarray(np.concatenate(means, axis=1)).save("runs/fragments/means.png")

    table = pyarrow.dataset.dataset("runs/fragments/fragments").to_table(columns=["index", "label"])
    print(table.group_by("label").aggregate([("index", "count")]).sort_by("label").to_pydict())
    return "runs/fragments/means.png"


if __name__ == "__main__":
    main()
