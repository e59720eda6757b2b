"""Latents that an earlier run kept take the place of sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ray_sampler.cluster.job import claim
from ray_sampler.cluster.worker import kept_of
from ray_sampler.config import RunError
from ray_sampler.storage.fragment import encode
from ray_sampler.storage.record import FragmentName, Samples
from tests.cluster.autoencoders import saved
from tests.cluster.test_decoders import N, computed, job, refused


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("vae"))


def undecoded(output: Path, count: int = N, **flags: Any) -> np.ndarray:
    """A run with --decoder none that wrote `count` samples; what it wrote, (n, H, W, C)."""
    made = job("none", output=str(output), **flags)
    claim(made)
    images = computed(made)["image"]
    for start in range(0, count, 4):
        stop = min(start + 4, count)
        data, _ = encode(Samples.of(start, images[start:stop], None), made.fingerprint, {}, "parquet")
        made.run_dir.fragments.write(FragmentName(start, stop, "parquet"), data)
    return images


def test_latents_of_an_earlier_run_take_the_place_of_sampling(vae: Path, tmp_path: Path) -> None:
    images = undecoded(tmp_path / "kept")
    made = job(vae, latents=str(tmp_path / "kept"))
    assert made.fingerprint == job(vae).fingerprint
    kept = kept_of(str(made.latents), 3, 9)
    np.testing.assert_array_equal(kept.x.numpy(), images.transpose(0, 3, 1, 2)[3:9])
    dead = nn.Module()
    dead.forward = lambda *given: pytest.fail("it was sampled")
    whole = replace(made, plan=replace(made.plan, kept=kept_of(str(made.latents), 0, N)))
    found, wanted = computed(whole, main=dead), computed(job(vae))
    np.testing.assert_array_equal(found["image"], wanted["image"])
    np.testing.assert_array_equal(found["latent"], wanted["latent"])
    (tmp_path / "kept" / "fragments" / "000000000004-000000000008.parquet").write_bytes(b"")
    with pytest.raises(RunError, match=r"kept are damaged: .* run that run's command again"):
        kept_of(str(made.latents), 3, 9)


def test_latents_of_another_run_are_refused(vae: Path, tmp_path: Path) -> None:
    undecoded(tmp_path / "kept", 6)
    kept = str(tmp_path / "kept")
    assert "which keeps 6 of the 10 latents; let that run grow first" in refused(tmp_path, vae=vae, latents=kept)
    said = refused(tmp_path, vae=vae, latents=kept, num_samples=6, seed=7)
    assert said.endswith("a run of other latents: seed 42, not 7; give the same settings")
    assert "which keeps no latents" in refused(tmp_path, vae=vae, latents=str(tmp_path / "nothing"))
