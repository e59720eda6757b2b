"""Measure an archive of digits with a small classifier that was trained on real digits only.

Four questions: does the classifier see in each sample the digit that its label asks for, how far is the distribution
of its features on samples from that on real digits, do the samples of a class differ as much as real digits do, and are
they copies, of each other or of digits that the model was trained on?
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data import JUDGES_PER_CLASS, Digits, load_digits
from ray_sampler.scoring.extractors import FEATURES, DigitsNetwork
from ray_sampler.scoring.metrics import Moments, frechet

EPOCHS = 24
BATCH = 50
PEAK_LEARNING_RATE = 3e-3
FULL = 4500
"""Digits for which EPOCHS is meant; of fewer, each is seen more often."""
LARGEST_SHIFT = 2
"""Pixels."""
SPLITS = 20
"""Random halvings of the real digits over which Frechet distances are averaged."""
SEED = 0


@dataclass(frozen=True)
class Measures:
    samples: int
    held_out: int
    held_out_accuracy: float
    """Of the classifier, on real digits that it was not trained on."""
    agreement: float
    """Share of the samples that the classifier sees as their label."""
    agreement_by_class: dict[int, float]
    samples_by_class: dict[int, int]
    compared: int
    """Samples, or real digits, on one side of each Frechet distance."""
    reference: int
    """Real digits on its other side."""
    frechet: float
    """Between samples and real digits."""
    frechet_deviation: float
    """Over the splits."""
    frechet_real: float
    """Between real digits and other real digits: what a perfect model would reach on average."""
    frechet_real_deviation: float
    within_class_variance: float
    """Of the samples, see `within_class_variance`."""
    within_class_variance_real: float
    """Of the real digits that the model was trained on."""
    twice: int
    """Samples that equal an earlier one."""
    nearest: tuple[float, float]
    """Least and median distance of a sample to the nearest digit that the model was trained on, see `nearest`."""
    nearest_real: tuple[float, float]
    """The same of real digits that it was not trained on."""


class Seen(NamedTuple):
    """What the classifier makes of images: classes (N,) int64 and features (N, FEATURES) float64."""

    classes: np.ndarray
    features: np.ndarray


def gray(images: np.ndarray) -> Tensor:
    """(N, 3, 32, 32) float32 -> (N, 1, 32, 32): the mean of the channels, which are equal in real digits."""
    return torch.from_numpy(images).mean(dim=1, keepdim=True)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, 1, 32, 32) moved by up to LARGEST_SHIFT pixels along both axes, with background moved in."""
    padded = F.pad(images, (LARGEST_SHIFT,) * 4, value=-1.0)
    size = images.shape[-1]
    offsets = torch.randint(2 * LARGEST_SHIFT + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + size, x : x + size] for image, (y, x) in zip(padded, offsets, strict=True)])


def train_classifier(
    images: Tensor, labels: np.ndarray, seed: int = SEED, epochs: int = EPOCHS, batch: int = BATCH
) -> DigitsNetwork:
    """A classifier of images (N, 1, 32, 32) float32 in [-1, 1] with labels (N,) int64.

    On one machine equal arguments give an equal one.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.from_numpy(labels)
    network = DigitsNetwork().train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // batch * batch].split(batch):
            logits = network.head(network.features(shifted(images[rows], generator)))
            optimizer.zero_grad()
            F.cross_entropy(logits, targets[rows], label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def obtain_classifier(digits: Digits, cache: Path | None) -> DigitsNetwork:
    """The classifier from `cache` if this very file left it there, else a freshly trained one, kept there."""
    path, count = None, len(digits.labels)
    if cache is not None:
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
        path = cache / f"classifier-{count}-{version}.safetensors"
        if path.exists():
            classifier = DigitsNetwork()
            classifier.load_state_dict(load_file(path))
            return classifier.eval()
    began = time.monotonic()
    classifier = train_classifier(gray(digits.images), digits.labels, epochs=EPOCHS * FULL // count)
    print(f"trained a classifier in {time.monotonic() - began:.0f} s", file=sys.stderr)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(classifier.state_dict(), path)
    return classifier


@torch.inference_mode()
def look_at(classifier: DigitsNetwork, images: np.ndarray) -> Seen:
    """What `classifier` makes of images (N, 3, 32, 32) float32 in [-1, 1]."""
    features = torch.cat([classifier.features(batch) for batch in gray(images).split(250)])
    return Seen(classifier.head(features).argmax(dim=1).numpy(), features.double().numpy())


def moments(features: np.ndarray) -> Moments:
    """Of features (N, D) float64. The distance between two is biased upwards, more so for fewer features."""
    return Moments(features.mean(axis=0), np.cov(features, rowvar=False))


def within_class_variance(digits: Digits) -> float:
    """Mean over the classes of the variance of a pixel's red value, from 0 to 1, summed over all pixels."""
    red = (digits.images[:, 0] + 1) / 2
    classes = np.unique(digits.labels)
    return float(np.mean([red[digits.labels == each].var(axis=0, dtype=np.float64).sum() for each in classes]))


def nearest(digits: Digits, trained: Digits) -> tuple[float, float]:
    """Least and median Euclidean distance to the nearest of `trained`, red values from -1 to 1."""
    red, others = (torch.from_numpy(each.images[:, 0]).flatten(1) for each in (digits, trained))
    distances = torch.cat([torch.cdist(part, others).amin(dim=1) for part in red.split(250)])
    return float(distances.min()), float(distances.median())


def load_archive(path: Path) -> Digits:
    """The samples of an archive as images (N, 3, 32, 32) float32 in [-1, 1] and labels (N,) int64.

    Raises:
        SystemExit: it is not an archive of labelled 32x32 images.
    """
    if not zipfile.is_zipfile(path):
        raise SystemExit(f"{path} is missing, cut short or no .npz archive; name one that a run has written")
    with np.load(path, allow_pickle=False) as archive:
        members = {name: archive[name] for name in archive.files}
    images, labels = members.get("arr_0"), members.get("arr_1")
    if images is None or images.ndim != 4 or images.shape[1:] != (32, 32, 3) or images.dtype != np.uint8:
        raise SystemExit(f"{path} has no arr_0 of (N, 32, 32, 3) uint8; sample a model of digits first")
    if labels is None or labels.shape != images.shape[:1]:
        raise SystemExit(f"{path} has no arr_1 with a label for each image; sample a class-conditional model")
    if len(images) < 2:
        raise SystemExit(f"{path} holds {len(images)} images; a distance needs at least 2")
    return Digits((images.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32), labels.astype(np.int64))


def measure(samples: Digits, cache: Path | None = None, unseen: bool = False) -> Measures:
    """Train or load the classifier, and measure `samples` with it, beside real digits.

    The classifier is trained on the digits that the model was trained on; with `unseen`, for `digits-latent`, on those
    that the model never saw.

    The Frechet distances of samples and of real digits have equal counts on both sides, as their bias depends on
    the counts: real digits are halved at random; one half is the reference of both distances, and as many of the
    other half as there are samples (or as many samples as it has digits) are compared with it.
    """
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    trained, others = load_digits(held_out_per_class=JUDGES_PER_CLASS) if unseen else load_digits()
    train, held_out = (others, trained) if unseen else (trained, others)
    classifier = obtain_classifier(train, cache)
    on_samples, on_held_out = look_at(classifier, samples.images), look_at(classifier, held_out.images)
    agrees = on_samples.classes == samples.labels

    real = np.concatenate([look_at(classifier, train.images).features, on_held_out.features])
    half = len(real) // 2
    compared = min(half, len(samples.labels))
    rng = np.random.default_rng(SEED)
    distances, real_distances = [], []
    for _ in range(SPLITS):
        order = rng.permutation(len(real))
        of_reference, rest = moments(real[order[:half]]), real[order[half:]]
        chosen = rng.permutation(len(samples.labels))[:compared]
        distances.append(frechet(moments(on_samples.features[chosen]), of_reference))
        real_distances.append(frechet(moments(rest[:compared]), of_reference))

    classes = sorted({int(label) for label in samples.labels})
    return Measures(
        samples=len(samples.labels),
        held_out=len(held_out.labels),
        held_out_accuracy=float((on_held_out.classes == held_out.labels).mean()),
        agreement=float(agrees.mean()),
        agreement_by_class={digit: float(agrees[samples.labels == digit].mean()) for digit in classes},
        samples_by_class={digit: int((samples.labels == digit).sum()) for digit in classes},
        compared=compared,
        reference=half,
        frechet=float(np.mean(distances)),
        frechet_deviation=float(np.std(distances)),
        frechet_real=float(np.mean(real_distances)),
        frechet_real_deviation=float(np.std(real_distances)),
        within_class_variance=within_class_variance(samples),
        within_class_variance_real=within_class_variance(trained),
        twice=len(samples.images) - len({image.tobytes() for image in samples.images}),
        nearest=nearest(samples, trained),
        nearest_real=nearest(others, trained),
    )


def table(measures: Measures) -> str:
    """`measures` for people."""
    m = measures
    by_class = "".join(
        f"\n  {digit}{share:41.1%}   of {m.samples_by_class[digit]}" for digit, share in m.agreement_by_class.items()
    )
    return f"""\
accuracy on real digits, held out{m.held_out_accuracy:12.1%}   of {m.held_out}
agreement with the samples' labels{m.agreement:11.1%}   of {m.samples}{by_class}
Frechet distance, samples to real{m.frechet:12.3f}   deviation {m.frechet_deviation:.3f}
Frechet distance, real to real{m.frechet_real:15.3f}   deviation {m.frechet_real_deviation:.3f}
variance within a class, samples{m.within_class_variance:11.1f}
variance within a class, real{m.within_class_variance_real:14.1f}
samples that equal an earlier one{m.twice:12}
nearest digit of the training, samples{m.nearest[0]:7.2f}   median {m.nearest[1]:.2f}
nearest digit of the training, real{m.nearest_real[0]:10.2f}   median {m.nearest_real[1]:.2f}
Both distances: {m.compared} images to {m.reference} real digits, {FEATURES} features, mean of {SPLITS} splits."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("archive", type=Path, help="an .npz of digits: arr_0 (N, 32, 32, 3) uint8, arr_1 (N,) labels")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--cache", type=Path, help="folder where the trained classifier is kept for the next time")
    parser.add_argument("--unseen", action="store_true", help="train it on digits that digits-latent never saw")
    request = parser.parse_args()
    result = measure(load_archive(request.archive), request.cache, request.unseen)
    print(json.dumps(asdict(result), indent=2) if request.json else table(result))
