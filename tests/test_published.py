"""The table of published checkpoints is what their authors published, and a preset alone fetches what it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from ray_sampler.cli import main
from ray_sampler.cluster.driver import run
from ray_sampler.cluster.job import prepare
from ray_sampler.config import RequestError, RunConfig
from ray_sampler.networks import edm2
from ray_sampler.networks.nvidia import SavedNetwork
from ray_sampler.presets import PRESETS, ModelOptions, model_of
from tests.cluster.small_models import REFERENCE
from tests.networks.test_edm2 import on_meta

EDM2 = "https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/"
EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/"
CONSISTENCY = "https://openaipublic.blob.core.windows.net/consistency/"
DIT = "https://dl.fbaipublicfiles.com/DiT/models/"

PLAIN = """
img512-xs-fid xs-2147483-0.135 FID 3.53
img512-s-fid s-2147483-0.130 FID 2.56
img512-m-fid m-2147483-0.100 FID 2.25
img512-l-fid l-1879048-0.085 FID 2.06
img512-xl-fid xl-1342177-0.085 FID 1.96
img512-xxl-fid xxl-0939524-0.070 FID 1.91
img512-xs-dino xs-2147483-0.200 FDD 103.39
img512-s-dino s-2147483-0.190 FDD 68.64
img512-m-dino m-2147483-0.155 FDD 58.44
img512-l-dino l-1879048-0.155 FDD 52.25
img512-xl-dino xl-1342177-0.155 FDD 45.96
img512-xxl-dino xxl-0939524-0.150 FDD 42.84
img64-s-fid s-1073741-0.075 FID 1.58
img64-m-fid m-2147483-0.060 FID 1.43
img64-l-fid l-1073741-0.040 FID 1.33
img64-xl-fid xl-0671088-0.040 FID 1.33
"""
GUIDED = """
img512-xs-guid-fid xs-2147483-0.045 FID 2.91 1.40 xs-uncond-2147483-0.045
img512-s-guid-fid s-2147483-0.025 FID 2.23 1.40 xs-uncond-2147483-0.025
img512-m-guid-fid m-2147483-0.030 FID 2.01 1.20 xs-uncond-2147483-0.030
img512-l-guid-fid l-1879048-0.015 FID 1.88 1.20 xs-uncond-2147483-0.015
img512-xl-guid-fid xl-1342177-0.020 FID 1.85 1.20 xs-uncond-2147483-0.020
img512-xxl-guid-fid xxl-0939524-0.015 FID 1.81 1.20 xs-uncond-2147483-0.015
img512-xs-guid-dino xs-2147483-0.150 FDD 79.94 1.70 xs-uncond-2147483-0.150
img512-s-guid-dino s-2147483-0.085 FDD 52.32 1.90 xs-uncond-2147483-0.085
img512-m-guid-dino m-2147483-0.015 FDD 41.98 2.00 xs-uncond-2147483-0.015
img512-l-guid-dino l-1879048-0.035 FDD 38.20 1.70 xs-uncond-2147483-0.035
img512-xl-guid-dino xl-1342177-0.030 FDD 35.67 1.70 xs-uncond-2147483-0.030
img512-xxl-guid-dino xxl-0939524-0.015 FDD 33.09 1.70 xs-uncond-2147483-0.015
img512-s-autog-fid s-2147483-0.070 FID 1.34 2.10 xs-0134217-0.125
img512-s-autog-dino s-2147483-0.120 FDD 36.67 2.45 xs-0134217-0.165
img512-xxl-autog-fid xxl-0939524-0.075 FID 1.25 2.05 m-0268435-0.155
img512-xxl-autog-dino xxl-0939524-0.130 FDD 24.18 2.30 m-0268435-0.205
img512-s-uncond-autog-fid s-uncond-2147483-0.070 FID 3.86 2.85 xs-uncond-0134217-0.110
img512-s-uncond-autog-dino s-uncond-2147483-0.090 FDD 90.39 2.90 xs-uncond-0134217-0.125
img64-s-autog-fid s-1073741-0.045 FID 1.01 1.70 xs-0134217-0.110
img64-s-autog-dino s-1073741-0.105 FDD 31.85 2.20 xs-0134217-0.175
"""
"""Name without edm2-, network, measure, value, weight, guide, as NVlabs/edm2 lists them."""

EDM_STEPS = {
    "edm-cifar10-32x32-cond-vp": 18,
    "edm-cifar10-32x32-cond-ve": 18,
    "edm-cifar10-32x32-uncond-vp": 18,
    "edm-cifar10-32x32-uncond-ve": 18,
    "edm-ffhq-64x64-uncond-vp": 40,
    "edm-ffhq-64x64-uncond-ve": 40,
    "edm-afhqv2-64x64-uncond-vp": 40,
    "edm-afhqv2-64x64-uncond-ve": 40,
    "edm-imagenet-64x64-cond-adm": 256,
}
ROWS = [row.split() for row in (PLAIN + GUIDED).strip().splitlines() if row]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_of_edm2_is_as_published(row: list[str]) -> None:
    name, network, measure, value, *guidance = row
    preset = PRESETS[f"edm2-{name}"]
    data = name.partition("-")[0]
    assert preset.url == f"{EDM2}edm2-{data}-{network}.pkl"
    measured, _, figure = preset.score.partition(" ")
    assert (measured, float(figure)) == (measure, float(value))
    expected: dict[str, Any] = {"sampler": "heun", "steps": 32}
    if guidance:
        expected |= {"guidance": float(guidance[0]), "guide": f"{EDM2}edm2-{data}-{guidance[1]}.pkl"}
    assert preset.settings == expected


def test_there_are_the_published_presets_and_no_other() -> None:
    assert {name for name in PRESETS if name.startswith("edm2-")} == {f"edm2-{row[0]}" for row in ROWS}
    assert {name for name in PRESETS if PRESETS[name].folder == EDM} == EDM_STEPS.keys()
    assert {PRESETS[name].folder for name in PRESETS if PRESETS[name].file} == {EDM2, EDM, CONSISTENCY, DIT}
    assert {name for name in PRESETS if not PRESETS[name].file} == {"sit-xl2-256", "repa-sit-xl2"}
    assert sum(preset.folder == CONSISTENCY for preset in PRESETS.values()) == 12


@pytest.mark.parametrize("name", EDM_STEPS)
def test_every_checkpoint_of_edm_is_as_published(name: str) -> None:
    preset = PRESETS[name]
    assert preset.url == f"{EDM}{name}.pkl"
    churn = {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003} if "imagenet" in name else {}
    assert preset.settings == {"sampler": "heun", "steps": EDM_STEPS[name]} | churn


WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


@pytest.mark.parametrize(
    ("data", "size", "classes"),
    [("img512", size, 1000) for size in WIDTHS]
    + [("img64", size, 1000) for size in ("s", "m", "l", "xl")]
    + [("img512", "s", 0)],
)
def test_parameters_are_those_of_the_network_and_its_training_weights(data: str, size: str, classes: int) -> None:
    arguments = {"img_resolution": 64, "img_channels": 4 if data == "img512" else 3, "label_dim": classes}
    network = on_meta(edm2.options_from(SavedNetwork("Precond", arguments | {"model_channels": WIDTHS[size]}, {})))
    name = f"edm2-{data}-{size}-fid" if classes else f"edm2-{data}-{size}-uncond-autog-fid"
    uncertainty = 128  # logvar_linear, which only training uses
    assert PRESETS[name].parameters == sum(p.numel() for p in network.parameters()) + uncertainty


def test_transformers_are_as_published() -> None:
    three = {"guidance": 1.5, "guidance_channels": 3}
    ancestral = {"prediction": "eps", "sampler": "ddpm", "steps": 250, **three}
    flow = {"prediction": "velocity", "sampler": "flow_sde", "steps": 250}
    expected: dict[str, tuple[str, dict[str, Any], str]] = {
        "dit-xl2-256": (f"{DIT}DiT-XL-2-256x256.pt", ancestral, "FID 2.27"),
        "dit-xl2-512": (f"{DIT}DiT-XL-2-512x512.pt", ancestral, "FID 3.04"),
        "sit-xl2-256": ("", flow | {"data_at": 1} | three, "FID 2.06"),
        "repa-sit-xl2": ("", flow | {"data_at": 0, "guidance": 1.8, "guidance_interval": "0,0.7"}, "FID 1.42"),
    }
    for name, row in expected.items():
        assert (PRESETS[name].url, PRESETS[name].settings, PRESETS[name].score) == row


def test_a_preset_without_an_address_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--preset", "sit-xl2-256", "--dry_run"]) == 2
    assert "whose weights are at no plain address; give --model FILE" in capsys.readouterr().err
    assert main(["sample", "--preset", "sit-xl2-256", "--model", "SiT-XL-2.pt", "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    found = {name: shown[name] for name in ("sampler", "nfe", "state", "clip_denoised", "num_heads", "rounding")}
    expected = {"sampler": "flow_sde", "nfe": 250, "state": "fp64", "clip_denoised": False}
    assert found == expected | {"num_heads": None, "rounding": None}


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].file])
def test_a_preset_alone_is_a_request(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, brought = model_of(ModelOptions(preset=name))
    assert model == PRESETS[name].url
    assert brought == PRESETS[name].settings
    assert main(["sample", "--preset", name, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model"], shown["steps"]) == (model, brought["steps"])
    assert shown.get("guide") == brought.get("guide")


def test_the_table_shows_every_preset_with_its_score_and_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: " ".join(line.split()) for line in shown.splitlines() if line.strip()}
    for name, preset in PRESETS.items():
        assert preset.score in lines[name]
        assert lines[name].endswith(preset.file), "no name is cut or wrapped"
    assert " 511 FID 1.36 " in lines["edm-imagenet-64x64-cond-adm"]
    assert " 63 FID 1.01 " in lines["edm2-img64-s-autog-fid"]
    assert "guidance 1.7 " in lines["edm2-img64-s-autog-fid"]
    assert " 2 cd_imagenet64_l2.pt" in lines["cd-imagenet64-l2"]
    assert max(map(len, shown.splitlines())) <= 200


# A preset without --model, against a server.


class Server(ThreadingHTTPServer):
    """Serves files by name, and breaks off where it is told to."""

    files: dict[str, bytes]
    cuts: dict[str, int]
    """How many of the next transfers of a file end half way."""
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.begin()

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.asked.append(name)
        if (content := self.begin()) is None:
            return
        if self.server.cuts.get(name, 0):
            self.server.cuts[name] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.connection.close()
        else:
            self.wfile.write(content)

    def begin(self) -> bytes | None:
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()[:8]}"')
        self.end_headers()
        return content

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.files, server.cuts, server.asked = files, {}, []
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


PRESET = "edm2-img64-s-autog-fid"
NET, GUIDE = "edm2-img64-s-1073741-0.045.pkl", "edm2-img64-xs-0134217-0.110.pkl"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves small networks as those of PRESET, which is looked for there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {NET: (REFERENCE / "edm2_16" / "net.pkl").read_bytes()}
    files[GUIDE] = (REFERENCE / "edm2_16" / "gnet.pkl").read_bytes()
    with serving(files) as served:
        folder = f"http://127.0.0.1:{served.server_port}/"
        preset = PRESETS[PRESET]
        moved = replace(preset, folder=folder, settings=dict(preset.settings) | {"guide": folder + GUIDE})
        monkeypatch.setitem(PRESETS, PRESET, moved)
        yield served


def cached(tmp_path: Path) -> set[str]:
    """SHA-256 of every large file in the cache folder."""
    files = [path for path in (tmp_path / "cache" / "ray-sampler").rglob("*") if path.is_file()]
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.stat().st_size > 10_000}


def digest(server: Server, name: str) -> str:
    return hashlib.sha256(server.files[name]).hexdigest()


def test_a_preset_fetches_network_and_guide_once(server: Server, tmp_path: Path) -> None:
    job = prepare(RunConfig(preset=PRESET, gpus_per_actor=0.0))
    assert (job.networks["main"].sha256, job.networks["guide"].sha256) == (digest(server, NET), digest(server, GUIDE))
    assert (job.plan.guidance.guidance, job.plan.schedule.steps) == (1.7, 32)
    again = prepare(RunConfig(preset=PRESET, gpus_per_actor=0.0))
    assert again.fingerprint == job.fingerprint
    assert sorted(server.asked) == [NET, GUIDE]
    assert cached(tmp_path) == {digest(server, NET), digest(server, GUIDE)}


def test_what_is_given_wins_over_what_would_be_fetched(server: Server) -> None:
    local = str(REFERENCE / "edm2_16" / "net.pkl")
    job = prepare(RunConfig(preset=PRESET, model=local, guide=local, gpus_per_actor=0.0))
    assert server.asked == []
    assert job.fetched() == {}
    alone = prepare(RunConfig(preset=PRESET, model=local, guidance=1.0, gpus_per_actor=0.0))
    assert (server.asked, list(alone.networks)) == ([], ["main"])


def test_a_transfer_that_breaks_off_is_begun_again(server: Server, tmp_path: Path) -> None:
    server.cuts = {NET: 1, GUIDE: 2}
    job = prepare(RunConfig(preset=PRESET, gpus_per_actor=0.0))
    assert (server.asked.count(NET), server.asked.count(GUIDE)) == (2, 3)
    assert job.networks["guide"].sha256 == digest(server, GUIDE)
    assert cached(tmp_path) == {digest(server, NET), digest(server, GUIDE)}


def test_a_transfer_that_keeps_breaking_off_is_refused_and_the_next_command_continues(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = {GUIDE: 9}
    with pytest.raises(RequestError) as refused:
        prepare(RunConfig(preset=PRESET, gpus_per_actor=0.0))
    assert str(refused.value).startswith(f"--guide is http://127.0.0.1:{server.server_port}/{GUIDE}; ")
    server.cuts = {}
    job = prepare(RunConfig(preset=PRESET, gpus_per_actor=0.0))
    assert job.networks["guide"].sha256 == digest(server, GUIDE)
    assert server.asked.count(NET) == 1, "what had arrived is kept"
    assert cached(tmp_path) == {digest(server, NET), digest(server, GUIDE)}


@pytest.mark.usefixtures("local_ray")
def test_the_summary_records_what_was_fetched(server: Server, tmp_path: Path) -> None:
    config = RunConfig(
        preset=PRESET,
        output=str(tmp_path / "run"),
        num_samples=2,
        batch_size=2,
        steps=2,
        gpus_per_actor=0.0,
        max_actors=1,
    )
    result = run(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary == result.summary
    folder = f"http://127.0.0.1:{server.server_port}/"
    for role, name in (("main", NET), ("guide", GUIDE)):
        told = summary["weights"][role]
        assert (told["url"], told["sha256"], told["key"]) == (folder + name, digest(server, name), "ema")
        assert len(told["hash"]) == 64
    assert summary["identity"]["weights"] == summary["weights"]["main"]["hash"]
