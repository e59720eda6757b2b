"""Networks with one channel or with a variance half are sampled as they are, to the archive and the preview."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ray_sampler.cli import main
from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RunConfig
from ray_sampler.sampling.plan import sample_block
from tests.cluster.runs import TINY, random_weights, sampled, savez
from tests.loading import loaded

pytestmark = pytest.mark.usefixtures("local_ray")

SMALL = {"num_samples": 8, "batch_size": 4, "shard_size": 4, "steps": 4, "gpus_per_actor": 0.0, "max_actors": 1}


def request(path: Path, **flags: Any) -> RunConfig:
    """Without a flag that says how many channels there are: the weights determine it."""
    return RunConfig(**(TINY | SMALL | {"model": str(path), "output": str(path.parent / "run")} | flags))


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_a_network_of_one_channel_makes_grey_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(random_weights(in_channels=1), tmp_path / "grey.safetensors")
    config = request(tmp_path / "grey.safetensors")
    result = run(config)
    assert Path(result.archive).name == "samples_8x8x8x1.npz"
    assert Path(result.archive).read_bytes() == savez(sampled(config))
    with np.load(result.archive) as archive:
        assert (archive["arr_0"].shape, str(archive["arr_0"].dtype)) == ((8, 8, 8, 1), "uint8")
        first = archive["arr_0"][0, :, :, 0]
    sheet = picture(tmp_path / "run" / "preview.png").astype(int)
    grid = 3 * (96 + 8 + 16) - 8  # three rows of tiles with labels
    tile = sheet[-28 - grid :, 28:][:96, :96]
    assert (tile == tile[..., :1]).all(), "red, green and blue are equal"
    np.testing.assert_array_equal(tile[::12, ::12, 0], first)
    (tmp_path / "run" / "preview.png").unlink()
    for command in ("verify", "merge", "preview"):
        assert main([command, str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "preview.png").exists()


def test_the_variance_half_is_dropped(tmp_path: Path) -> None:
    """The pictures are those of the network whose last layer has the first half of its outputs."""
    six = random_weights(learn_sigma=True)
    assert six["out.2.weight"].shape[0] == 6
    three = six | {name: six[name][:3].clone() for name in ("out.2.weight", "out.2.bias")}
    save_file(six, tmp_path / "six.safetensors")
    save_file(three, tmp_path / "three.safetensors")
    result = run(request(tmp_path / "six.safetensors"))
    assert Path(result.archive).read_bytes() == savez(sampled(request(tmp_path / "three.safetensors")))


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_grey_network_is_guided_and_written_as_it_is(learn_sigma: bool, tmp_path: Path) -> None:
    """Two grey networks of different sorts, without a run."""
    save_file(random_weights(in_channels=1, learn_sigma=learn_sigma), tmp_path / "grey.safetensors")
    save_file(random_weights(in_channels=1, class_cond=False), tmp_path / "guide.safetensors")
    flags = {"guidance": 2.0, "guide": str(tmp_path / "guide.safetensors"), "decoder": "none"}
    job = prepare(request(tmp_path / "grey.safetensors", **flags))
    assert job.image_shape == (8, 8, 1)
    networks = {role: loaded(network) for role, network in job.networks.items()}
    with torch.inference_mode():
        x, labels = sample_block(networks, job.plan, torch.arange(2))
    assert x.shape == (2, 1, 8, 8)
    assert labels is not None
