"""Train the bundled feature extractor `digits` on real digits, and measure the held-out ones for its reference.

It is a classifier of the 4,500 digits that the bundled models were trained on; the 500 held-out ones, which neither
it nor a model has seen, are the reference of `--score digits`. On one core it takes about a minute.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data import Digits, load_digits
from evaluate import BATCH, EPOCHS, train_classifier
from ray_sampler.scoring.extractors import DigitsNetwork
from recipe import recipe_of


@dataclass(frozen=True)
class Recipe:
    out: Path = Path("ray_sampler/scoring/digits")
    """Folder of the weights and the reference."""
    epochs: int = EPOCHS
    batch: int = BATCH
    seed: int = 0


def grey(digits: Digits) -> Tensor:
    """(N, 1, 32, 32) float32 in [-1, 1]: the channels are equal."""
    return torch.from_numpy(digits.images[:, :1])


def pictures(digits: Digits) -> Tensor:
    """(N, 32, 32, 3) uint8."""
    return torch.from_numpy(np.rint((digits.images + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1).copy())


def train(recipe: Recipe) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    digits, held_out = load_digits()
    began = time.monotonic()
    network = train_classifier(grey(digits), digits.labels, recipe.seed, recipe.epochs, recipe.batch)
    weights = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    recorded = {name: str(value) for name, value in asdict(recipe).items() if name != "out"}
    recipe.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, recipe.out / "digits.safetensors", metadata=recorded)
    print(f"trained in {time.monotonic() - began:.0f} s", flush=True)
    write_reference(network, held_out, recipe.out)


@torch.inference_mode()
def write_reference(network: DigitsNetwork, held_out: Digits, folder: Path) -> None:
    """Write mu, sigma and features of the held-out digits, with the hash of the weights that made them."""
    features = network(pictures(held_out)).numpy()
    right = (network.logits(features).argmax(1) == held_out.labels).mean()
    sha256 = hashlib.sha256((folder / "digits.safetensors").read_bytes()).hexdigest()
    mu, sigma = features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)
    np.savez(folder / "held_out.npz", mu=mu, sigma=sigma, features=features, extractor="digits", sha256=sha256)
    print(f"right on {right:.1%} of the {len(features)} held-out digits; wrote {folder}")


if __name__ == "__main__":
    train(recipe_of(Recipe, __doc__))
