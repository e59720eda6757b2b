"""`from ray_sampler import RunConfig, run`: in a script or a notebook, with Ray already started or without."""

from __future__ import annotations

import gc
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import numpy as np
import pytest
import ray

import ray_sampler
import ray_sampler.compat
from ray_sampler import RequestError, RunConfig, read_fragment, run
from ray_sampler.cluster.joining import own_token
from ray_sampler.storage.record import DamagedFragment, Samples
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, SMALL, TINY, fragments, leave, savez
from tests.conftest import Configure

ROOT = Path(__file__).resolve().parents[1]


def python(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script that has the settings of a small run, the checkpoint apart, as FLAGS."""
    given = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-c", f"FLAGS = {TINY | SMALL | {'model': 'tiny.safetensors'}}\n{script}"],
        cwd=folder,
        env=given | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_importing_the_package_imports_neither_torch_nor_ray(tmp_path: Path):
    done = python("import sys, ray_sampler; print({'torch', 'ray'} & set(sys.modules))", tmp_path)
    assert done.stdout == "set()\n", done.stderr


def test_the_command_line_hears_signals_before_it_imports_what_takes_long(tmp_path: Path):
    """Until then Ctrl-C would be answered by Python's traceback."""
    slow = "{'torch', 'ray', 'numpy', 'pyarrow', 'fsspec', 'rich'}"
    done = python(f"import sys, ray_sampler.cli; print({slow} & set(sys.modules))", tmp_path)
    assert done.stdout == "set()\n", done.stderr


def test_what_needs_no_network_imports_no_torch(tmp_path: Path):
    """So that `status` answers at once, wherever it is asked."""
    done = python("import sys, ray_sampler.run_folder, ray_sampler.cli; print('torch' in sys.modules)", tmp_path)
    assert done.stdout == "False\n", done.stderr


PUBLIC = [(module, name) for module in (ray_sampler, ray_sampler.compat) for name in module.__all__]
NAMES = {name: getattr(ray_sampler, name) for name in ray_sampler.__all__}
PUBLIC.remove((ray_sampler.compat, "NUM_CLASSES"))


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=str)
def test_everything_public_is_documented_and_has_types(module: ModuleType, name: str):
    public = getattr(module, name)
    assert public.__doc__
    members = vars(public).values() if inspect.isclass(public) else [public]
    functions = [member.fget if isinstance(member, property) else member for member in members]
    for function in filter(inspect.isfunction, functions):
        if function.__module__.startswith("ray_sampler") and not function.__name__.startswith("_"):
            assert function.__doc__, function
            assert get_type_hints(function, localns=NAMES).keys() >= {
                *inspect.signature(function).parameters,
                "return",
            } - {"self"}
    if inspect.isclass(public):
        get_type_hints(public)  # raises where a name in them is missing


def test_a_run_uses_the_ray_that_is_started_and_leaves_it_running(configure: Configure, samples: Samples, local_ray):
    config = configure()
    leave(config, samples, [(0, 24), (24, 40)])
    result = run(config)
    assert ray.is_initialized()
    assert gc.get_freeze_count() == 0  # the caller's garbage is collected again
    assert result.archive == str(Path(str(config.output)) / ARCHIVE)
    assert Path(result.archive).read_bytes() == savez(samples)
    assert result.summary == json.loads((Path(str(config.output)) / "summary.json").read_text())
    assert all(Path(path).is_file() for path in (result.report, result.preview))
    assert len(repr(result)) < 300
    archive, summary = result
    assert (archive, summary["num_samples"]) == (result.archive, 40)


SCRIPT = """
import asyncio, logging, signal
import ray
from ray_sampler import RunConfig, run

async def cell():
    return run(RunConfig(output="run", **FLAGS))

before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
result = asyncio.run(cell())
assert result.archive.endswith("/run/samples_40x8x8x3.npz"), result.archive
assert result.summary["computed"] == 40
assert not ray.is_initialized()
assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

def refuse(*arguments, **flags):
    raise AssertionError("Ray was started")

ray.init = refuse
assert run(RunConfig(output="run", **FLAGS)) == result
"""
"""As a cell of a notebook, whose event loop runs while the cell does; and the same cell again, which needs no Ray."""


@pytest.mark.slow
def test_a_run_without_ray_starts_its_own_and_stops_it_and_a_complete_one_starts_none(
    checkpoint: Path, tmp_path: Path, samples: Samples
):
    (tmp_path / "tiny.safetensors").symlink_to(checkpoint)
    done = python(SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "complete already" in done.stderr
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_a_run_joins_the_cluster_at_an_address(
    configure: Configure, checkpoint: Path, tmp_path: Path, samples: Samples, local_ray
):
    leave(configure(), samples, [(0, 40)])
    (tmp_path / "tiny.safetensors").symlink_to(checkpoint)
    address = ray.get_runtime_context().gcs_address
    script = f"from ray_sampler import *; print(run(RunConfig(output='run', address={address!r}, **FLAGS)).archive)"
    done = python(script, tmp_path, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **own_token())  # it listens on loopback only
    assert done.stdout.strip() == str(tmp_path / "run" / ARCHIVE), done.stderr
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)


def test_a_wrong_request_raises_and_writes_nothing(configure: Configure, tmp_path: Path):
    for flags in ({"steps": 0}, {"sampler": "magic"}, {"model": "nowhere.pt"}, {"output": "memory://run"}):
        with pytest.raises(RequestError):
            run(configure(**flags))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_gives_the_resolved_settings_and_writes_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    resolved = run(RunConfig(dry_run=True, num_samples=20, output="run")).summary
    assert (resolved["num_samples"], resolved["steps"], resolved["output"]) == (20, 12, "run")
    assert not list(tmp_path.iterdir())


def test_a_request_is_one_value_with_one_field_for_each_flag(configure: Configure):
    assert configure() == configure()
    assert hash(configure()) == hash(configure())
    with pytest.raises(AttributeError):
        configure().seed = 3  # type: ignore[misc]  # it is frozen
    with pytest.raises(TypeError, match=r"^RunConfig\..*'num_sample'"):
        RunConfig(num_sample=3)  # type: ignore[call-arg]  # there is none


def test_run_takes_a_request_alone():
    with pytest.raises(RequestError, match="run takes a RunConfig, not 'digits'"):
        run("digits")  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize("fragment_format", ["parquet", "npz"])
def test_read_fragment_gives_arrays(
    configure: Configure, tmp_path: Path, samples: Samples, fragment_format, monkeypatch
):
    leave(configure(fragment_format=fragment_format), samples, [(8, 24)])
    (filename,) = fragments(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run" / "fragments" / filename
    for url in (str(path), f"file://{path}", f"run/fragments/{filename}"):
        fragment = read_fragment(url)
        assert fragment.samples.start == 8
        assert np.array_equal(fragment.samples.images, samples.images[8:24])
        assert samples.labels is not None
        assert fragment.samples.labels is not None
        assert np.array_equal(fragment.samples.labels, samples.labels[8:24])
        assert fragment.record.computed_by["device"] == "cpu"


def test_read_fragment_refuses_what_is_none(configure: Configure, tmp_path: Path, samples: Samples):
    leave(configure(), samples, [(8, 24)])
    path = tmp_path / "run" / "fragments" / "000000000008-000000000024.parquet"
    with pytest.raises(RequestError, match="there is no"):
        read_fragment(str(path).replace("024", "025"))
    with pytest.raises(RequestError, match="not a fragment's name"):
        read_fragment(str(tmp_path / "run" / "run.json"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedFragment):
        read_fragment(str(path))
