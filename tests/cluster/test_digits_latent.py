"""The bundled latent model: a flow with guidance, kept latents and a decoder, in a run on Ray and in this process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.inspection import inspect
from ray_sampler.networks.opening import open_network
from ray_sampler.sampling.finish import to_uint8
from ray_sampler.sampling.plan import sample_block
from ray_sampler.scoring.extractors import open_digits
from ray_sampler.storage.fragment import read_fragment
from ray_sampler.storage.record import Samples
from tests.loading import loaded

N = 40
RANGE = f"{0:012}-{N:012}.parquet"


def request(**flags: Any) -> RunConfig:
    settings: dict[str, Any] = {"model": "digits-latent", "guidance": 2.0, "num_samples": N, "labels": "balanced"}
    return RunConfig(**(settings | {"batch_size": 20, "shard_size": N, "gpus_per_actor": 0.0} | flags))


@pytest.fixture(scope="module")
def finished(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Samples]:
    """What a run that keeps its latents has written, by folder."""
    output = tmp_path_factory.mktemp("latent") / "run"
    run(request(output=str(output), keep_latents=True, max_actors=1))
    return {folder: read_fragment(output / folder / RANGE).samples for folder in ("fragments", "latents")}


def test_pictures_show_the_digits_that_were_asked_for_and_no_two_are_equal(finished: dict[str, Samples]) -> None:
    images = finished["fragments"].images
    classifier: Any = open_digits().network
    with torch.inference_mode():
        logits = classifier.logits(classifier(torch.from_numpy(images)).numpy())
    assert (logits.argmax(1) == np.arange(N) % 10).mean() >= 0.95
    assert len({image.tobytes() for image in images}) == N


def test_pictures_are_what_the_decoder_makes_of_the_kept_latents(finished: dict[str, Samples]) -> None:
    latents = torch.from_numpy(finished["latents"].columns["latent"])
    assert latents.shape == (N, 4, 8, 8)
    with torch.inference_mode():
        images = to_uint8(loaded(open_network("digits-decoder", {}))(latents), "truncate").numpy()
    assert np.abs(images.astype(int) - finished["fragments"].images).max() <= 1


def test_without_a_decoder_it_writes_the_same_latents(finished: dict[str, Samples]) -> None:
    job = prepare(request(decoder="none"))
    assert job.plan.columns()["image"].shape == (8, 8, 4)
    networks = {role: loaded(network) for role, network in job.networks.items()}
    with torch.inference_mode():
        x, _ = sample_block(networks, job.plan, torch.arange(20))
    torch.testing.assert_close(x.float().numpy(), finished["latents"].columns["latent"][:20], rtol=1e-3, atol=1e-3)


def test_inspect_prints_a_command_that_samples_it() -> None:
    found = inspect(RunConfig(model="digits-latent"))
    assert (found["family"], found["shape"], found["null_label"]) == ("dit", [4, 8, 8], 10)
    assert found["command"] == "ray-sampler sample --model digits-latent"


@pytest.mark.parametrize("flags", [{"prediction": "eps"}, {"data_at": 1}, {"num_heads": 2}])
def test_what_its_name_tells_is_not_changed(flags: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"--{next(iter(flags))} is"):
        prepare(request(**flags))


def test_the_decoder_is_no_model() -> None:
    with pytest.raises(RequestError, match="neither a file nor a bundled model"):
        prepare(RunConfig(model="digits-decoder"))
