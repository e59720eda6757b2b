"""Runs of a tiny network: their flags, what one engine computes for them, and what a killed one leaves."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_sampler.cluster.job import claim, prepare
from ray_sampler.config import RunConfig
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.sampling.engine import Engine
from ray_sampler.sampling.plan import MAIN
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import FragmentName, Samples
from ray_sampler.storage.run_dir import RunDir
from tests.loading import loaded

TINY: dict[str, Any] = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": "1",
    "attention_resolutions": "4",
    "class_cond": True,
    "num_classes": 10,
}
"""The architecture, by flag name."""

SMALL: dict[str, Any] = {
    "num_samples": 40,
    "batch_size": 4,
    "shard_size": 8,
    "steps": 4,
    "gpus_per_actor": 0.0,
    "max_actors": 1,
}
"""Five shards of two batches each, on one actor: a second one takes longer to start than to work."""

LONGER: dict[str, Any] = {"num_samples": 48, "shard_size": 4, "steps": 18}
"""Twelve shards, which take long enough to be interrupted."""

ARCHIVE = "samples_40x8x8x3.npz"
"""What the small run ends in."""


def random_weights(**architecture: Any) -> dict[str, Tensor]:
    """The state dict of a network with random weights, those that training begins at 0 among them."""
    random = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tensor.shape, generator=random) * (0.1 if tensor.ndim > 1 else 0.5)
        for name, tensor in UNet(AdmOptions(**TINY | architecture)).state_dict().items()
    }


def small(checkpoint: Path, output: Path | str | None, **flags: Any) -> RunConfig:
    """The request for a small run; `flags` set or replace its flags."""
    return RunConfig(**(TINY | SMALL | {"model": str(checkpoint), "output": output and str(output)} | flags))


def flags_of(config: RunConfig) -> list[str]:
    """A request as a command line."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != f.default}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def sampled(config: RunConfig) -> Samples:
    """What one engine, in this process, computes for `config`: all of its samples."""
    job = prepare(replace(config, output=None))
    engine = Engine(
        {MAIN: loaded(job.networks[MAIN])},
        batch_size=config.batch_size,
        device=torch.device("cpu"),
        compile="off",
    )
    pictures = engine.sample(job.plan, 0, config.num_samples)()
    return Samples(0, pictures.columns)


def savez(samples: Samples) -> bytes:
    """The file that np.savez writes of the images and, if there are any, the labels."""
    file = io.BytesIO()
    labels = () if samples.labels is None else (samples.labels.astype(np.int64),)
    np.savez(file, samples.images, *labels)
    return file.getvalue()


def part(samples: Samples, start: int, stop: int) -> Samples:
    """The samples [start, stop) of samples that begin at 0."""
    return Samples.of(start, samples.images[start:stop], None if samples.labels is None else samples.labels[start:stop])


def leave(config: RunConfig, samples: Samples, ranges: Iterable[tuple[int, int]]) -> None:
    """Make what a run leaves that was killed when it had written the fragments of `ranges`."""
    job = prepare(config)
    claim(job)
    for start, stop in ranges:
        name = FragmentName(start, stop, job.config.fragment_format)
        made = {"numerics_key": "a key", "device": "cpu"}
        data, _ = encode(part(samples, start, stop), job.fingerprint, made, name.format)
        job.run_dir.fragments.write(name, data)


def recorded_seconds(output: Path | str) -> float:
    """What the records of all fragments add up to of the seconds that actors computed."""
    ranges = RunDir(str(output)).ranges()
    return sum(ranges.read_record(name, None).computed_by["seconds"] for name in ranges.list().fragments)


def fragments(output: Path | str) -> list[str]:
    """Names of what lies under fragments/, sorted."""
    return sorted(path.name for path in (Path(output) / "fragments").iterdir())


def whole(output: Path | str) -> list[str]:
    """Names of the existing fragments, sorted; a hidden file is one that is being written, or never will be."""
    return sorted(path.name for path in (Path(output) / "fragments").glob("0*"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
