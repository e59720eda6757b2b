"""`python -m ray_sampler.compat SCRIPT` runs scripts of the consistency-models repository without one edit."""

from __future__ import annotations

import importlib
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ray_sampler.compat.script import main
from ray_sampler.networks.adm_options import AdmOptions
from ray_sampler.networks.adm_unet import UNet
from ray_sampler.networks.weights import read_checkpoint
from ray_sampler.options import of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
GOLDEN = ROOT / "tests" / "golden" / "reference" / "classcond32"
FLAGS: dict[str, Any] = json.loads((GOLDEN / "flags.json").read_text())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the numbers that were computed with the original."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    path.write_bytes(lzma.decompress((GOLDEN / "model.pt.xz").read_bytes()))
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a `cm` and an `ours` of the user's in it; OPENAI_LOGDIR is its subfolder out."""
    (tmp_path / "cm").mkdir()
    (tmp_path / "cm" / "__init__.py").write_text("OWNER = 'user'\n")
    (tmp_path / "cm" / "dist_util.py").write_text("raise RuntimeError('this cm is not ours')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "out"))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def pixels_of(x_0: np.ndarray) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] -> (B, H, W, C) uint8, truncated."""
    return np.clip((x_0.astype(np.float64) + 1) * 127.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def assert_same_pictures(images: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(images.astype(int) - expected)
    assert images.dtype == np.uint8
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.95  # truncation makes 254 of what is a little below 1


# Independent of what is tested: two steps of a consistency model (Song et al. 2023, algorithm 1), in float64


def noise_of(samples: list[int], num_samples: int, draws: int) -> list[Tensor]:
    """Draw k of each sample, from its own generator, as `determ-indiv` promises it for seed 42."""
    generators = [torch.Generator().manual_seed(i + num_samples * 42) for i in samples]
    return [torch.cat([torch.randn(1, 3, 32, 32, generator=g) for g in generators]).double() for _ in range(draws)]


def two_steps(model: UNet, draws: list[Tensor], labels: Tensor) -> np.ndarray:
    def denoised(x: Tensor, sigma: float) -> Tensor:
        skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        out = (sigma - 0.002) * 0.5 / (sigma**2 + 0.25) ** 0.5
        scaled = x / (sigma**2 + 0.25) ** 0.5
        times = torch.full((len(x),), 250 * np.log(sigma))
        with torch.no_grad():
            return (skip * x + out * model(scaled.float(), times.float(), labels).double()).clamp(-1, 1)

    def level(t: int) -> float:
        return float((80 ** (1 / 7) + t / 39 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7)

    x = denoised(draws[0] * 80.0, level(0))
    x = denoised(x + draws[1] * (level(17) ** 2 - 0.002**2) ** 0.5, level(17))
    return x.numpy()


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> UNet:
    model = UNet(of(AdmOptions, FLAGS | {"num_classes": 1000}))
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    return model.eval()


def flags_of(checkpoint: Path, **more: object) -> list[str]:
    flags = FLAGS | {
        "training_mode": "consistency_distillation",
        "sampler": "multistep",
        "ts": "0,17,39",
        "generator": "determ-indiv",
        "model_path": checkpoint,
    }
    return [word for name, value in (flags | more).items() for word in (f"--{name}", str(value))]


def test_a_script_with_flags_writes_the_archive_that_it_would_have_written(
    folder: Path, checkpoint: Path, network: UNet
) -> None:
    script = str(shutil.copy(SCRIPTS / "with_flags.py", folder))
    command = [sys.executable, "-m", "ray_sampler.compat", script, *flags_of(checkpoint, num_samples=6, batch_size=4)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arrays = arrays_of(folder / "out" / "samples_6x32x32x3.npz")
    assert arrays.keys() == {"arr_0", "arr_1"}
    labels = torch.from_numpy(arrays["arr_1"])
    assert (labels.shape, labels.dtype) == ((6,), torch.int64)
    # Its generator is never moved on: the second batch takes what follows in the streams of the samples of the first.
    draws = noise_of([0, 1, 2, 3], 6, 6)
    expected = [two_steps(network, draws[:2], labels[:4]), two_steps(network, [d[:2] for d in draws[3:5]], labels[4:])]
    assert_same_pictures(arrays["arr_0"], pixels_of(np.concatenate(expected)))
    assert "6 samples" not in done.stdout
    assert "8 samples" in done.stdout
    assert "8 samples" in (folder / "out" / "log.txt").read_text()


def test_ranks_of_torchrun_share_the_samples(folder: Path, checkpoint: Path, network: UNet) -> None:
    script = str(shutil.copy(SCRIPTS / "with_flags.py", folder))
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--module",
    ]
    flags = flags_of(checkpoint, num_samples=4, batch_size=2)
    command = [*launcher, "ray_sampler.compat", script, *flags]
    done = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    arrays = arrays_of(folder / "out" / "samples_4x32x32x3.npz")
    draws = noise_of([0, 2, 1, 3], 4, 2)  # row j of rank r is sample r + 2 j, and the archive goes rank by rank
    expected = two_steps(network, draws, torch.from_numpy(arrays["arr_1"]))
    assert_same_pictures(arrays["arr_0"], pixels_of(expected))
    assert done.stdout.count("4 samples") == 1


def test_a_script_with_hard_coded_arguments_writes_the_originals_pictures(folder: Path, checkpoint: Path) -> None:
    script = str(shutil.copy(SCRIPTS / "hard_coded.py", folder))
    shutil.copy(checkpoint, folder / "model.pt")
    assert main([script]) == 0
    arrays = arrays_of(folder / "out" / "samples_4x32x32x3.npz")
    with np.load(GOLDEN / "samples.npz") as golden:
        assert_same_pictures(arrays["arr_0"], pixels_of(golden["edm/determ-indiv/heun_churn"]))
    assert arrays["arr_1"].tolist() == [0, 3, 999, 500]


def test_a_script_with_an_adapter_by_keyword_writes_the_originals_pictures(
    folder: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLES", str(folder / "chosen"))
    assert main([str(SCRIPTS / "adapter.py"), str(GOLDEN / "flags.json"), str(checkpoint)]) == 0
    arrays = arrays_of(folder / "chosen" / "samples_4x32x32x3.npz")
    with np.load(GOLDEN / "samples.npz") as golden:
        assert_same_pictures(arrays["arr_0"], pixels_of(golden["consistency/determ/multistep"]))


# What the script sees


def test_it_runs_as_main_with_its_arguments_and_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "beside.py").write_text("NAME = 'beside'\n")
    script = write(
        folder / "sub" / "script.py", "import sys, beside\nprint(__name__, __file__, sys.argv[1:], beside.NAME)\n"
    )
    before = sys.argv, sys.path.copy()
    assert main([script, "--flag", "-h", "a b"]) == 0
    assert capsys.readouterr().out == f"__main__ {script} ['--flag', '-h', 'a b'] beside\n"
    assert (sys.argv, sys.path) == before


def test_our_cm_is_there_within_the_script_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(folder))
    users = importlib.import_module("cm")
    assert users.OWNER == "user"
    script = write(
        folder / "script.py",
        "import cm, cm.dist_util, cm.nn\n"
        "from mpi4py import MPI\n"
        "assert not hasattr(cm, 'OWNER')\n"
        "assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD.Get_size()) == (0, 1, 1)\n",
    )
    assert main([script]) == 0
    assert importlib.import_module("cm") is users
    assert "cm.nn" not in sys.modules
    assert sys.modules.get("mpi4py.MPI") is not importlib.import_module("ray_sampler.compat.mpi")
    assert not dist.is_initialized()


def test_a_module_that_sampling_does_not_use_is_not_found_in_the_users_cm(folder: Path) -> None:
    (folder / "cm" / "train_util.py").write_text("")
    with pytest.raises(ModuleNotFoundError, match=r"cm\.train_util"):
        main([write(folder / "script.py", "import cm.train_util\n")])


def test_an_mpi4py_that_is_installed_is_the_one_that_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").write_text("MPI = 'installed'\n")
    script = write(folder / "script.py", "from mpi4py import MPI\nassert MPI == 'installed'\n")
    try:
        assert main([script]) == 0
    finally:
        sys.modules.pop("mpi4py", None)


def test_one_process_is_a_group_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "an.address.that.nobody.asks.invalid")
    script = write(
        folder / "script.py",
        "import torch, torch.distributed as dist\n"
        "from cm import dist_util\n"
        "dist_util.setup_dist()\n"
        "dist_util.setup_dist()\n"
        "assert (dist.get_rank(), dist.get_world_size()) == (0, 1)\n"
        "parts = [torch.zeros(2, device=dist_util.dev())]\n"
        "dist.all_gather(parts, torch.ones(2, device=dist_util.dev()))\n"
        "assert parts[0].tolist() == [1, 1]\n"
        "dist.barrier()\n",
    )
    assert main([script]) == 0


@pytest.mark.parametrize("layout", ["plain", "module", "ema", "half"])
def test_checkpoints_of_every_layout_are_read(folder: Path, checkpoint: Path, layout: str) -> None:
    state = torch.load(checkpoint, weights_only=True)
    stored = {
        "plain": state,
        "module": {f"module.{name}": tensor for name, tensor in state.items()},
        "ema": {"model": {name: tensor * 0 for name, tensor in state.items()}, "ema": state, "step": 3},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }[layout]
    torch.save(stored, folder / "stored")
    script = write(
        folder / "script.py",
        "import json, sys, torch\n"
        "from cm import dist_util\n"
        "from cm.script_util import create_model_and_diffusion\n"
        "model, _ = create_model_and_diffusion(**json.load(open(sys.argv[1])))\n"
        "model.load_state_dict(dist_util.load_state_dict('stored', map_location=torch.device('cpu')))\n"
        "torch.save(model.state_dict(), 'read')\n",
    )
    assert main([script, str(GOLDEN / "flags.json")]) == 0
    read = read_checkpoint(str(folder / "read")).tensors
    assert read.keys() == state.keys()
    for name, tensor in read.items():
        torch.testing.assert_close(tensor, state[name], atol=1e-3 if layout == "half" else 0, rtol=0)


def test_nothing_in_a_checkpoint_is_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "evil.pt").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    script = write(folder / "script.py", "from cm import dist_util\n\ndist_util.load_state_dict('evil.pt')\n")
    assert main([script]) == 2
    assert not (folder / "ran").exists()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "sentence"),
    [("", "--model_path is empty"), (str(GOLDEN.parent / "edm2_16" / "net.pkl"), "snapshot of NVlabs/edm")],
)
def test_what_holds_no_weights_of_such_a_network_is_one_sentence(
    path: str, sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write(folder / "script.py", f"from cm import dist_util\n\ndist_util.load_state_dict({path!r})\n")
    assert main([script]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


# Where it writes


def test_without_openai_logdir_it_writes_to_a_new_dated_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_LOGDIR")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    script = write(
        folder / "script.py", "from cm import logger\nlogger.configure()\nlogger.log('at', logger.get_dir())\n"
    )
    for _ in range(2):
        assert main([script]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("at ")]
    assert len(set(lines)) == 2
    for line in lines:
        at = Path(line.removeprefix("at "))
        assert at.parent == folder
        assert at.name.split("-")[1].isdigit()
        assert (at / "log.txt").read_text() == f"{line}\n"


def test_a_folder_is_made_where_the_script_configures_nothing(folder: Path) -> None:
    script = write(folder / "script.py", "from cm import logger\nopen(logger.get_dir() + '/file', 'w').close()\n")
    assert main([script]) == 0
    assert (folder / "out" / "file").exists()


# What goes wrong


@pytest.mark.parametrize("script", ["nowhere.py", "."])
def test_a_wrong_path_is_one_sentence(script: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([script]) == 2
    error = capsys.readouterr().err
    assert f"SCRIPT is {script}; " in error
    assert error.count("\n") == 1


def test_without_a_script_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "SCRIPT" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "SCRIPT" in capsys.readouterr().out


def test_an_exception_of_the_script_keeps_its_traceback(folder: Path) -> None:
    script = write(folder / "script.py", "def deep():\n    raise KeyError('lost')\n\n\ndeep()\n")
    command = [sys.executable, "-m", "ray_sampler.compat", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert f'File "{script}", line 2, in deep' in done.stderr
    assert done.stderr.endswith("KeyError: 'lost'\n")


@pytest.mark.parametrize(("code", "expected"), [("7", 7), ("", None), ("'text'", "text")])
def test_exit_codes_pass_through(code: str, expected: object, folder: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([write(folder / "script.py", f"import sys\nsys.exit({code})\n")])
    assert stopped.value.code == expected


def test_a_wrong_argument_of_ours_is_one_sentence_with_its_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write(folder / "script.py", "from cm import dist_util\n\ndist_util.load_state_dict('nowhere.pt')\n")
    assert main([script]) == 2
    error = capsys.readouterr().err
    assert "--model_path is nowhere.pt" in error
    assert error.endswith(f"({script}, line 3)\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize("launcher", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_of_mpiexec_are_told_about_torchrun(
    launcher: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = write(folder / "script.py", "print('ran')\n")
    monkeypatch.setenv(launcher, "8")
    assert main([script]) == 2
    assert f"torchrun --nproc_per_node 8 -m ray_sampler.compat {script}" in capsys.readouterr().err
    monkeypatch.setenv(launcher, "1")
    assert main([script]) == 0
