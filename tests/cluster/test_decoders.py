"""Decoders: what becomes of latents, in what blocks, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ray_sampler.cli import main
from ray_sampler.cluster import driver
from ray_sampler.cluster.job import Job, prepare
from ray_sampler.cluster.shipping import Shipped, ship
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks.decoders import autoencoder_class
from ray_sampler.networks.family import Network
from ray_sampler.sampling.engine import Engine, NonFiniteError
from ray_sampler.sampling.memory import OutOfDeviceMemoryError
from ray_sampler.storage.fragment import read_fragment
from ray_sampler.storage.run_dir import RunDir
from tests.cluster.autoencoders import autoencoder, model, saved
from tests.cluster.small_models import REFERENCE, edm2_snapshot
from tests.loading import loaded

N = 10
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("autoencoder") / "vae")


def job(vae: Path | str | None, rule: str | None = "sd", **flags: Any) -> Job:
    settings: dict[str, Any] = {"model": model(rule), "decoder": None if vae is None else str(vae)}
    settings |= {"num_samples": N, "batch_size": 4, "steps": 3, "sampler": "euler", "gpus_per_actor": 0.0}
    return prepare(RunConfig(**settings | flags))


def computed(made: Job, **networks: nn.Module) -> dict[str, np.ndarray]:
    """Pictures and latents of a job, by an engine of this process."""
    modules = {role: loaded(net) if net.tensors else net.build("fp32") for role, net in made.networks.items()}
    engine = Engine(modules | networks, batch_size=made.config.batch_size, device=torch.device("cpu"), compile="off")
    found = engine.sample(made.plan, 0, N, {"latents": lambda x, networks: {"latent": x.float()}})()
    return {**found.columns, **found.products["latents"]}


def published(rule: str, x: Tensor, decode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Pixels (B, C, H, W) by rounding, as the scripts of each publication write them."""
    if rule == "sd":
        y = decode(x / 0.18215)
        half = (y / 2 + 0.5).clamp(0, 1)
        return {
            "truncate": (255.0 * torch.clamp((y + 1) / 2.0, 0, 1)).to(torch.uint8),  # REPA
            "nearest": torch.clamp(127.5 * y + 128.0, 0, 255).to(torch.uint8),  # DiT, SiT
            "round": (half * 255).round().to(torch.uint8),  # diffusers
        }
    mean, std = (torch.tensor(v)[None, :, None, None] for v in ((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)))
    y = decode(x * std / 0.5 + mean)
    return {
        "truncate": (y.clamp(0, 1) * 255).to(torch.uint8),
        "nearest": (y.clamp(0, 1) * 255 + 0.5).to(torch.uint8),
        "round": (y.clamp(0, 1) * 255).round().to(torch.uint8),
    }


def close(pixels: np.ndarray, wanted: np.ndarray) -> None:
    """Equal, but for values that lie on a border between two levels."""
    levels = np.abs(pixels.astype(int) - wanted.astype(int))
    assert levels.max() <= 1
    assert (levels > 0).mean() < 0.01


@pytest.mark.parametrize("rule", ["sd", "edm2"])
@pytest.mark.parametrize("rounding", ["truncate", "nearest", "round"])
def test_pixels_are_those_of_the_publication(rule: str, rounding: str, vae: Path) -> None:
    made = job(vae, rule, rounding=rounding)
    found, theirs = computed(made), autoencoder_class().from_pretrained(vae, use_safetensors=True)
    with torch.inference_mode():
        wanted = published(rule, torch.from_numpy(found["latent"]), lambda z: theirs.decode(z).sample)
    assert made.image_shape == found["image"].shape[1:] == (16, 16, 3)
    close(found["image"], wanted[rounding].permute(0, 2, 3, 1).numpy())
    assert len(np.unique(found["image"])) > 100
    assert made.identity.items() >= {"decoder_rule": rule, "rounding": rounding}.items()


def test_a_picture_depends_neither_on_the_batch_nor_on_its_neighbours(vae: Path) -> None:
    wanted = computed(job(vae, decoder_batch=3))
    for batch in (1, 5, 16):
        found = computed(job(vae, decoder_batch=3, batch_size=batch))
        np.testing.assert_array_equal(found["latent"], wanted["latent"])
        np.testing.assert_array_equal(found["image"], wanted["image"])


def test_shift_scale_weights_rule_and_precision_decide_the_run_and_the_block_does_not(
    vae: Path, tmp_path: Path
) -> None:
    made = job(vae)
    shifted = saved(tmp_path / "shifted", scaling_factor=0.5, shift_factor=0.25)
    other = saved(tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    encoder = {name: t + 1 if name.startswith("encoder.") else t for name, t in tensors.items()}
    save_file(encoder, other / WEIGHTS)
    assert job(other).fingerprint == made.fingerprint  # what encodes has no part in it
    save_file({name: t + 1e-3 for name, t in tensors.items()}, other / WEIGHTS)
    changed = {job(other).fingerprint, job(shifted).fingerprint, job(vae, "edm2").fingerprint}
    changed |= {job(vae, decoder_precision="bf16").fingerprint, job("none").fingerprint, made.fingerprint}
    assert len(changed) == 6
    assert {job(vae, decoder_batch=2).fingerprint, job(vae, keep_latents=True).fingerprint} == {made.fingerprint}
    x = torch.from_numpy(computed(job(shifted))["latent"])
    with torch.inference_mode():
        y = autoencoder(scaling_factor=0.5).decode(x / 0.5 + 0.25).sample
    close(computed(job(shifted))["image"], ((y + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("kind", ["sharded", "variant", "older names", "URL"])
def test_a_directory_is_read_however_diffusers_wrote_it(kind: str, vae: Path, tmp_path: Path) -> None:
    folder: Path | str = tmp_path / "vae"
    if kind == "variant":
        folder = saved(tmp_path / "vae", variant="fp16")
    elif kind == "sharded":
        autoencoder().save_pretrained(folder, max_shard_size="20KB")
        assert len(list(Path(folder).glob("*.safetensors"))) > 1
    else:
        shutil.copytree(vae, folder)
        former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(Path(folder) / WEIGHTS)
        for now, then in former.items():
            tensors = {name.replace(f"0.{now}.", f"0.{then}."): tensor for name, tensor in tensors.items()}
        save_file(tensors, Path(folder) / WEIGHTS)
        assert any("proj_attn" in name for name in tensors)
        folder = Path(folder).as_uri() if kind == "URL" else folder
    assert job(folder).fingerprint == job(vae).fingerprint


def test_a_decoder_that_gives_no_numbers_is_blamed(vae: Path) -> None:
    made = job(vae)
    decoder = loaded(made.networks["decoder"])

    def broken(z: Tensor) -> Tensor:
        return decoder(z).log()

    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(1))
    module.forward = broken
    with pytest.raises(NonFiniteError, match="the finisher made non-finite values"):
        computed(made, decoder=module)


class Small(nn.Module):
    """A decoder on a device that has room for some latents."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = nn.Parameter(torch.tensor(float(room)))

    def forward(self, z: Tensor) -> Tensor:
        if len(z) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(len(z), 3, 16, 16)


def test_out_of_memory_is_one_sentence_with_the_value_that_fits(vae: Path) -> None:
    made = job(vae, decoder_batch=16)
    for room, advice in ((5, "try --decoder_batch 4"), (0, "not even one fits; try --decoder_precision fp16")):
        with pytest.raises(OutOfDeviceMemoryError, match=f"--decoder_batch 16 while decoding; {advice}"):
            computed(made, decoder=Small(room))
    assert computed(job(vae, decoder_batch=4), decoder=Small(5))["image"].shape == (N, 16, 16, 3)


# What is refused.


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def pipeline(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model_index.json")


def lacking(folder: Path, begins: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if not name.startswith(begins)}, folder / WEIGHTS)


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights that may hold code": (pickled, "only diffusion_pytorch_model.bin, which may hold code; .*safe_serial"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"must have {WEIGHTS}, but has nothing"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; give the directory of an AutoencoderKL"),
    "a pipeline": (pipeline, "has no config.json; it is that of a pipeline: give its folder vae"),
    "a damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json is damaged"),
    "another class": (lambda f: config(f, _class_name="VQModel"), "of class 'VQModel'; it must be AutoencoderKL"),
    "no class": (lambda f: config(f, _class_name="absent"), "of class None"),
    "no scale": (lambda f: config(f, scaling_factor=None), "scaling_factor None; it must be a number above 0"),
    "a negative scale": (lambda f: config(f, scaling_factor=-1), "scaling_factor -1"),
    "a shift that is none": (lambda f: config(f, shift_factor="no"), "shift_factor 'no'; it must be a number"),
    "scales of their own": (lambda f: config(f, latents_mean=[0] * 4), "has latents_mean"),
    "quantised": (lambda f: config(f, quantization_config={}), "has quantization_config"),
    "another architecture": (lambda f: config(f, block_out_channels=[8, 8]), "do not fit its config.json"),
    "an impossible one": (lambda f: config(f, norm_num_groups=3), "describes no AutoencoderKL"),
    "a missing layer": (lambda f: lacking(f, "decoder.mid_block"), "do not fit its config.json: .* missing"),
    "only what encodes": (lambda f: lacking(f, "decoder"), "missing"),
    "cut short": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]),
        "it is (truncated|damaged|.*)",
    ),
    "other latents": (lambda f: saved(f, latent_channels=8), "for latents of 8 channels, but the network's have 4"),
    "no pictures": (lambda f: saved(f, out_channels=4), "makes pictures of 4 channels"),
}


def refused(tmp_path: Path, **flags: Any) -> str:
    """The sentence by which a request is refused; nothing is written."""
    output = tmp_path / "run"
    with pytest.raises(RequestError) as error:
        job(**{"output": str(output)} | flags)
    said = str(error.value)
    assert "\n" not in said
    assert not output.exists()
    return said


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_directory_that_cannot_be_used_is_refused(spoil: str, vae: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vae, tmp_path / "spoiled")
    do, wanted = SPOILED[spoil]
    do(folder)
    said = refused(tmp_path, vae=folder)
    assert said.startswith(f"--decoder is {folder}")
    assert re.search(wanted, said), said


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"vae": None}, "--decoder is missing: the network makes latents of 4 channels.*--decoder DIR.*--decoder none"),
        ({"vae": "nowhere"}, "--decoder is 'nowhere'; there is no such directory"),
        ({"vae": ""}, "--decoder is empty"),
        ({"vae": "digits"}, "--decoder is digits, a network of family adm, which decodes nothing"),
        ({"vae": __file__}, "test_decoders.py, a file; give the directory of an autoencoder"),
        ({"decoder_batch": 0}, "--decoder_batch is 0; it must be from 1"),
        ({"decoder_precision": "int8"}, "--decoder_precision is 'int8'; it must be one of fp32, fp16, bf16"),
        ({"model": "digits", "steps": 4}, "--decoder is .*, but the network makes pictures; leave it out"),
        ({"vae": "none", "keep_latents": True}, "--keep_latents is True, but --decoder none writes the same"),
        ({"vae": None, "model": "digits", "keep_latents": True}, "--keep_latents is True, but the network makes pict"),
        ({"image_size": 64}, "--image_size is 64, but --decoder makes pictures of 16 pixels .* latents of 8; give the"),
        ({"image_size": 12}, "--image_size is 12, but the file says 8"),
        ({"rule": "edm2", "model": model("edm2", 8)}, "for latents of 4 channels, but the network's have 8"),
    ],
)
def test_a_wrong_request_is_one_sentence(flags: dict[str, Any], wanted: str, vae: Path, tmp_path: Path) -> None:
    said = refused(tmp_path, **{"vae": vae} | flags)
    assert re.search(wanted, said), said


def test_the_size_of_pictures_or_of_latents_may_be_repeated(vae: Path) -> None:
    assert job(vae, image_size=16).fingerprint == job(vae, image_size=8).fingerprint == job(vae).fingerprint


def test_a_missing_extra_is_one_sentence_with_the_command(vae: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert refused(tmp_path, vae=vae).endswith("pip install 'ray-sampler[diffusers]'")


def test_a_snapshot_of_edm2_brings_the_rule_and_the_rounding_of_its_publication(vae: Path, tmp_path: Path) -> None:
    latent = edm2_snapshot(tmp_path / "latent.pkl", "StabilityVAEEncoder", img_channels=4)
    made = job(vae, model=str(latent), sampler="heun")
    assert made.image_shape == (16, 16, 3)
    assert made.identity.items() >= {"decoder_rule": "edm2", "rounding": "truncate"}.items()


@pytest.mark.parametrize(
    ("name", "flags", "rounding"),
    [("sit_repa8", {"num_heads": 4}, "truncate"), ("dit8", {"num_heads": 3, "prediction": "eps"}, "nearest")],
)
def test_transformers_bring_the_rule_and_the_rounding_of_their_publication(
    name: str, flags: dict[str, Any], rounding: str, vae: Path
) -> None:
    made = job(vae, model=str(REFERENCE / name / "checkpoint.pt"), sampler="heun", **flags)
    assert made.identity.items() >= {"decoder_rule": "sd", "rounding": rounding}.items()
    assert made.image_shape == (16, 16, 3)


def test_a_decoder_unlike_the_published_ones_is_noted(tmp_path: Path) -> None:
    flags: dict[str, Any] = {"model": str(REFERENCE / "dit8" / "checkpoint.pt"), "sampler": "heun"}
    flags |= {"prediction": "eps", "num_heads": 3}
    published: dict[str, Any] = {"scaling_factor": 0.18215, "levels": 4}
    notes = {
        name: [note for note in job(saved(tmp_path / name, **config), **flags).notes if "published" in note]
        for name, config in {"same": published, "small": {}, "scaled": published | {"scaling_factor": 0.13025}}.items()
    }
    assert notes["same"] == []
    assert ["has 2 pixels in a row for each latent, not 8 as those" in note for note in notes["small"]] == [True]
    assert ["has the scaling_factor 0.13025, not 0.18215 as those" in note for note in notes["scaled"]] == [True]


# The command line.


LATENT_MODEL = """
from tests.cluster.autoencoders import model


def load(weights):
    return model()
"""


@pytest.mark.usefixtures("local_ray")
def test_pictures_and_kept_latents_of_a_whole_run(vae: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latent_model.py").write_text(LATENT_MODEL)
    shutil.copytree(vae, tmp_path / "vae")
    flags = "--model python:latent_model:load --decoder vae --sampler euler --steps 3 --batch_size 4 --shard_size 8"
    command = ["sample", *flags.split(), *["--gpus_per_actor", "0", "--max_actors", "1", "--progress", "none"]]
    wanted = computed(job(vae))
    output = tmp_path / "run"

    def sampled(count: int, *more: str) -> np.ndarray:
        assert main([*command, "--output", "run", "--num_samples", str(count), *more]) == 0
        with np.load(output / f"samples_{count}x16x16x3.npz") as archive:
            return np.array(archive["arr_0"])

    def latents() -> np.ndarray:
        files = sorted((output / "latents").iterdir())
        return np.concatenate([read_fragment(path).samples.columns["latent"] for path in files])

    assert (sampled(6) == wanted["image"][:6]).all()
    assert not (output / "latents").exists()
    # Asked for later, latents of what is there are sampled, and its fragments stay.
    before = {path: path.stat().st_mtime_ns for path in (output / "fragments").iterdir()}
    assert (sampled(N, "--keep_latents", "True") == wanted["image"]).all()
    np.testing.assert_array_equal(latents(), wanted["latent"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # What is damaged is repaired.
    hurt = sorted((output / "latents").iterdir())[0]
    hurt.write_bytes(hurt.read_bytes()[:-9])
    assert main(["verify", "run"]) == 1
    assert re.search("latents: [0-9]+ OK, 1 rejected", capsys.readouterr().out)
    sampled(N, "--keep_latents", "True")
    np.testing.assert_array_equal(latents(), wanted["latent"])
    # Another decoder needs no new sampling.
    other = saved(tmp_path / "other", scaling_factor=0.5)
    shipped: list[str] = []

    def recorded(network: Network, *more: Any) -> Shipped:
        shipped.append(network.spec.family)
        return ship(network, *more)

    monkeypatch.setattr(driver, "ship", recorded)
    assert main([*command, *f"--output again --num_samples {N} --latents run --decoder {other}".split()]) == 0
    with np.load(tmp_path / "again" / f"samples_{N}x16x16x3.npz") as archive:
        assert (archive["arr_0"] == computed(job(other))["image"]).all()
    assert shipped == ["autoencoder"]
    capsys.readouterr()
    assert main(["status", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["products"] == {"latents": N}
    record = RunDir(str(output)).fragments.read(RunDir(str(output)).fragments.list().fragments[0], None).record
    assert record.computed_by["numerics_key"].endswith("decoder batch 4")
