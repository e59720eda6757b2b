"""A summary with everything in it, as a run on mixed hardware leaves one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ray_sampler.config import RunConfig
from ray_sampler.networks.adm import spec_of
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.reporting.pixels import PixelStatistics
from ray_sampler.reporting.summary import Part, Timeline, summary_of
from tests.resolving import resolved_for

HOSTILE = "<script>console.error('run')</script>"


@pytest.fixture
def images() -> np.ndarray:
    """uint8 (40, 8, 8, 3), without repeats."""
    return np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)


@pytest.fixture
def summary(images: np.ndarray) -> dict[str, Any]:
    """The content of summary.json, read back from JSON."""
    spec = spec_of(AdmOptions(class_cond=True, num_classes=10), {})
    run = resolved_for(RunConfig(num_samples=50_000), f"s3://bucket/{HOSTILE}", {}, spec, gpus=None)
    pixels = PixelStatistics()
    pixels.add(images)
    pixels.add(images[:2])
    timeline = Timeline()
    for second in range(60):
        timeline.add(float(second), second / 7, second // 10)
    content = summary_of(
        fingerprint="7f3a91c2" * 8,
        settings=run.as_json(),
        identity=run.identity("00" * 32),
        num_samples=50_000,
        reused=12_288,
        computed=37_712,
        seconds={"start": 14.25, "sampling": 4012.5, "merge": 0.75, "computing": 46_210.5},
        max_actors=12,
        failures=3,
        retries=7,
        rejected=(("000000000000-000000000512.parquet", "the image bytes do not match their CRC-32"),),
        parts=(Part(0, 12_288, "a10g, batch 16", "NVIDIA A10G"), Part(12_288, 50_000, "h200, batch 16", "NVIDIA H200")),
        archive="samples_50000x8x8x3.npz",
        archive_bytes=10_000_500,
        archive_members=(("arr_0.npy", 9_600_128, 0xDEADBEEF), ("arr_1.npy", 400_128, 0x12AB)),
        labels={label: 5000 + label for label in range(10)},
        pixels=pixels,
        timeline=timeline,
        made={
            "command": "ray-sampler sample --num_samples=50000",
            "folder": "/home/user",
            "output": "s3://bucket/run",
            "date": "2026-01-02T03:04:05+00:00",
            "commit": "ab" * 20,
            "versions": {"ray-sampler": "0.2.0", "torch": "2.13", "ray": "2.60", "python": "3.11"},
        },
    )
    return json.loads(json.dumps(content, allow_nan=False))
