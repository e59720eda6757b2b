"""How fast are Inception features, beside torch-fidelity's own loop over the same pictures?

INCEPTION_WEIGHTS names a file of the published weights; without it they are random, which takes the same time. With
GPU_REHEARSAL=1 and no GPU, few pictures prove the code.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from ray_sampler.errors import RequestError
from ray_sampler.sampling.finish import derive
from ray_sampler.sampling.numerics import pin
from ray_sampler.scoring import inception
from ray_sampler.scoring.features import FEATURES
from ray_sampler.scoring.scores import product_of
from table import Goal, Row, in_turn, parser, report
from tests.scoring.random_inception import write_weights

CUDA = torch.cuda.is_available()
PICTURES = 10_000 if CUDA else 64
SIZE = 64
BATCH = 64


def measured(weights: Path) -> list[Row]:
    device = torch.device("cuda" if CUDA else "cpu")
    pin(device, "off")
    pictures = np.random.default_rng(0).integers(0, 256, (PICTURES, SIZE, SIZE, 3), np.uint8)
    extractor = inception.open_inception(str(weights))
    extractor.network.to(device)
    product = product_of(extractor)
    made = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    theirs = made("theirs", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
    loader = DataLoader(TensorDataset(torch.from_numpy(pictures).permute(0, 3, 1, 2)), BATCH, pin_memory=CUDA)

    def rate_of_ours() -> float:
        began = time.perf_counter()
        derive(product, pictures, 0, {FEATURES: extractor.network}, device)
        return PICTURES / (time.perf_counter() - began)

    @torch.inference_mode()
    def rate_of_theirs() -> float:
        began = time.perf_counter()
        torch.cat([theirs(batch.to(device, non_blocking=True))[0].cpu() for (batch,) in loader])
        return PICTURES / (time.perf_counter() - began)

    if CUDA:
        rate_of_ours(), rate_of_theirs()
    ours, others = in_turn(3 if CUDA else 1, rate_of_ours, rate_of_theirs)
    question = f"Inception features of {PICTURES:,} pictures of {SIZE}x{SIZE}"
    return [Row(question, ours, others, "images/s", Goal("at least", 0.9) if CUDA else None)]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    given = os.environ.get("INCEPTION_WEIGHTS")
    with tempfile.TemporaryDirectory() as folder:
        try:
            inception.fidelity("feature_extractor_inceptionv3")
        except RequestError as error:
            report([], [str(error)], arguments.json)
            return
        weights = Path(given or f"{folder}/random.pth")
        if not given:
            inception.PUBLISHED = ""
            write_weights(weights)
        report(measured(weights), [f"Weights are {'the published ones' if given else 'random'}."], arguments.json)


if __name__ == "__main__":
    main()
