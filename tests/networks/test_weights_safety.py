"""Nothing of a checkpoint runs, and a file may be a pipe or change at any time."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from ray_sampler.errors import RequestError
from ray_sampler.networks import formats
from ray_sampler.networks.weights import read_checkpoint, weights_hash
from tests.networks.layouts import refusal
from tests.networks.malicious import SMALL, Code


class SetsState:
    """Unpickled by others, this runs __setstate__."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __getstate__(self) -> dict[str, str]:
        return {"marker": self.marker}

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["marker"])


class Dictionary(dict[str, Any]):
    """Unpickled by others, this runs __setitem__."""

    def __setitem__(self, key: str, value: Any) -> None:
        if isinstance(value, str):
            os.mkdir(value)


def malicious(marker: Path) -> Iterator[Any]:
    yield Code(os.mkdir, str(marker))
    yield Code(os.system, f"touch {marker}")
    yield Code(eval, f"__import__('os').mkdir({str(marker)!r})")
    yield Code(exec, f"import os; os.mkdir({str(marker)!r})")
    yield Code(torch.hub.load, str(marker), "model")
    yield Code(getattr, "text", "upper")
    yield Code(subprocess.check_call, ["touch", str(marker)])
    yield Code(torch.load, str(marker))
    yield SetsState(str(marker))
    nested = Dictionary()
    dict.__setitem__(nested, "x", str(marker))
    yield nested


@pytest.mark.parametrize("attack", range(10))
@pytest.mark.parametrize("layout", ["zip", "old", "plain"])
@pytest.mark.parametrize("beside", [True, False])
def test_code_never_runs_and_what_is_beside_weights_is_ignored(
    beside: bool, layout: str, attack: int, tmp_path: Path
) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "w.pt"
    code = list(malicious(marker))[attack]
    content = {"w": torch.ones(2), "extra": code} if beside else code
    if layout == "plain":
        path.write_bytes(pickle.dumps(content, 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    if beside:
        assert read_checkpoint(str(path)).tensors["w"].tolist() == [1, 1]
    else:
        assert "state dict" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_malicious_pickle_never_runs(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Code(os.mkdir, str(tmp_path / "it-ran")), protocol))
    refusal(tmp_path / "w.pt")
    assert not (tmp_path / "it-ran").exists()


def test_no_module_is_imported_for_a_name_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    (tmp_path / "w.pt").write_bytes(b"\x80\x04ctrap\nNet\n)\x81}b.")
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from ray_sampler.networks.weights import read_checkpoint
try:
    read_checkpoint({str(tmp_path / "w.pt")!r})
except ValueError as error:
    assert "trap.Net" in str(error)
    assert "trap" not in sys.modules
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"


@pytest.mark.parametrize(
    "name", [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nFloatStorage"]
)
@pytest.mark.parametrize("protocol", [b"\x80\x02", b"\x80\x04"])
def test_a_file_does_not_change_the_stand_ins_of_its_names(protocol: bytes, name: bytes, tmp_path: Path) -> None:
    """BUILD sets attributes of functions and classes as well, where they are real ones."""
    path = tmp_path / "w.pt"
    path.write_bytes(protocol + b"c" + name + b"\n}X\4\0\0\0makeK\1s}X\x0c\0\0\0__defaults__)s\x86b.")
    refusal(path)
    torch.save(OrderedDict(w=torch.arange(3.0)), path)
    assert read_checkpoint(str(path)).tensors["w"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["tar", "zip with another pickle", "zip with code"])
def test_pickles_in_archives_of_older_or_made_up_layouts_never_run(kind: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "it-ran", tmp_path / "w.pt"
    code = pickle.dumps(Code(os.mkdir, str(marker)), 2)
    if kind == "tar":  # torch's first layout: it unpickles members of these names
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "tensors", "storages"):
                info = tarfile.TarInfo(name)
                info.size = len(code)
                archive.addfile(info, io.BytesIO(code))
    else:
        torch.save({"w": torch.zeros(3)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            if kind == "zip with code":  # what TorchScript keeps its programs in
                archive.writestr("w/constants.pkl", code)
                archive.writestr("w/code/__torch__.py", f"import os; os.mkdir({str(marker)!r})")
            archive.writestr("w/extra/data.pkl", code)
    with contextlib.suppress(RequestError):  # what is not read may lie there
        read_checkpoint(str(path))
    assert not marker.exists()


def test_a_pipe_is_read(tmp_path: Path) -> None:
    state = {"w": torch.randn(300_000)}
    for layout in ("zip", "old", "safetensors"):
        pipe = tmp_path / layout
        os.mkfifo(pipe)
        file = io.BytesIO()
        if layout == "safetensors":
            content = save(state)
        else:
            torch.save(state, file, _use_new_zipfile_serialization=layout == "zip")
            content = file.getvalue()
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert weights_hash(read_checkpoint(str(pipe)).tensors) == weights_hash(state)
        writer.join()


def test_process_substitution_is_read(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(3.0)}, tmp_path / "w.pt")
    script = "import sys; from ray_sampler.networks.weights import read_checkpoint as r; print(r(sys.argv[1]).tensors)"
    command = f"{sys.executable} -c '{script}' <(cat {tmp_path / 'w.pt'})"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{'w': tensor([0., 1., 2.])}\n"


def slowly(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Runs `meanwhile` after the first part of the first large storage of a zip archive was read."""
    monkeypatch.setattr(formats, "CHUNK", 2**16)
    read, done = zipfile.ZipExtFile.read, threading.Event()

    def watched(file: zipfile.ZipExtFile, count: int | None = -1) -> bytes:
        data = read(file, count)
        if not done.is_set() and len(data) == 2**16:
            done.set()
            meanwhile()
        return data

    monkeypatch.setattr(zipfile.ZipExtFile, "read", watched)


def test_a_file_that_is_overwritten_in_place_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    old, new = ({"w": torch.full((10**6,), value)} for value in (1.0, 2.0))
    torch.save(old, path)
    slowly(monkeypatch, lambda: torch.save(new, path))
    message = refusal(path)
    assert "changed while it was read" in message or "CRC-32" in message
    assert weights_hash(read_checkpoint(str(path)).tensors) == weights_hash(new)


def test_a_file_that_is_cut_while_it_is_read_is_refused_and_crashes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(10**6)}, path)
    slowly(monkeypatch, lambda: os.truncate(path, 100))
    assert "truncated" in refusal(path)


@pytest.mark.parametrize("layout", ["zip", "old", "plain", "safetensors"])
def test_weights_stay_as_they_were_read_whatever_happens_to_the_file(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(SMALL[layout])
    read = read_checkpoint(str(path), None if layout == "safetensors" else "model").tensors
    before = weights_hash(read)
    path.write_bytes(bytes(len(SMALL[layout])))
    assert weights_hash(read) == before
    os.truncate(path, 0)
    assert weights_hash(read) == before
    for tensor in read.values():
        tensor.mul_(2)  # it is memory of this process
    memory = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    assert len(memory) == len(read), "each has separate memory, so that each can be freed"


@pytest.mark.parametrize("layout", ["zip", "old", "safetensors"])
def test_reading_takes_the_memory_of_the_weights_that_are_chosen(layout: str, tmp_path: Path) -> None:
    """A file of 128 MiB weights and twice as much beside them."""
    path = tmp_path / "w.pt"
    state: dict[str, Tensor] = {f"{i}.weight": torch.ones(2**21) for i in range(16)}
    if layout == "safetensors":
        path.write_bytes(save(state))
    else:
        content = {"ema": state, "model": {name: t.clone() for name, t in state.items()}, "opt": torch.ones(2**25)}
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
        del content
    script = f"""
import resource
from ray_sampler.networks.weights import read_checkpoint
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
read = read_checkpoint({str(path)!r})
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.2 * 2**27


def test_a_file_that_is_cut_after_it_was_read_ends_no_process(tmp_path: Path) -> None:
    """One that maps the file into memory would end with SIGBUS."""
    torch.save({"w": torch.ones(10**6)}, tmp_path / "w.pt")
    script = f"""
import os
from ray_sampler.networks.weights import read_checkpoint, weights_hash
read = read_checkpoint({str(tmp_path / "w.pt")!r})
os.truncate({str(tmp_path / "w.pt")!r}, 0)
weights_hash(read.tensors)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
