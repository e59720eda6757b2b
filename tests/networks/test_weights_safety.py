"""Nothing of a checkpoint runs, no file hangs the reader or fills the memory, and one may change at any time."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from isal import isal_zlib
from safetensors.torch import save
from torch import Tensor

from ray_sampler.errors import RequestError
from ray_sampler.networks import stored
from ray_sampler.networks.weights import read_checkpoint, weights_hash


def refusal(url: str | Path) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(RequestError) as refused:
        read_checkpoint(str(url))
    message = str(refused.value)
    assert message.isprintable()
    assert message.startswith("--model is ")
    return message


class Code:
    """Unpickled, this calls a function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


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
def test_code_never_runs_and_what_stands_beside_weights_is_ignored(
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


def zip_of(pickled: bytes, records: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        for name, data in records.items():
            archive.writestr(f"w/{name}", data)
    return file.getvalue()


def tensor_of(size: int, stride: int, offset: int = 0) -> bytes:
    """A pickle of {"w": a tensor of a storage of four numbers}."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    numbers = b"".join(b"\x8a\x09" + n.to_bytes(9, "little", signed=True) for n in (offset, size, stride))
    offset_, size_, stride_ = numbers[:11], numbers[11:22], numbers[22:]
    arguments = b"(" + storage + offset_ + size_ + b"\x85" + stride_ + b"\x85\x89}t"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


def deep_keys() -> bytes:
    """A dictionary whose key is a tuple of a tuple twice, and so on: its hash takes 2^60 steps."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."


NUMBERS = torch.arange(4.0).numpy().tobytes()
HUGE = {
    "a memo of 2^32 entries": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a buffer of 2^33": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
    "a text of 2^32": b"\x80\x02X\xff\xff\xff\xffx.",
    "an integer of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".",
    "a key that is never hashed": deep_keys(),
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a dictionary in itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
    "a list doubled sixty times": b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 60 + b".",
    "an expanded number": zip_of(tensor_of(2**40, 0), {"data/0": NUMBERS}),
    "a size past 64 bits": zip_of(tensor_of(2**66, 0), {"data/0": NUMBERS}),
    "a stride past its storage": zip_of(tensor_of(4, 2), {"data/0": NUMBERS}),
    "a negative stride": zip_of(tensor_of(2, -1, 1), {"data/0": NUMBERS}),
    "an offset past its storage": zip_of(tensor_of(4, 1, 1), {"data/0": NUMBERS}),
    "an offset past 64 bits": zip_of(tensor_of(0, 1, 2**66), {"data/0": NUMBERS}),
    "a header of 2^24 bytes": struct.pack("<Q", 2**24) + b"{}",
    "a header of nested lists": struct.pack("<Q", 10**6) + b'{"a":' + b"[" * 10**6,
}


@pytest.mark.parametrize("name", HUGE)
def test_no_claim_of_a_file_takes_time_or_memory(name: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(HUGE[name])
    before, start = peak(), time.monotonic()
    refusal(tmp_path / "w.pt")
    assert time.monotonic() - start < 5
    assert peak() - before < 2**28


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_records_of_a_zip_archive_that_lie_on_one_another_are_refused(tmp_path: Path) -> None:
    """Each record's entry in the directory points at the same bytes, which so would be read many times."""
    count, size = 300, 2**20
    storages = b"".join(
        b"X\x04\x00\x00\x00%04dctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x04\x00\x00\x00%04dX\x03\x00\x00\x00cpuJ%btQK\x00J%b\x85K\x01\x85\x89}tR" % (i, i, n, n)
        for i in range(count)
        for n in [struct.pack("<i", size // 4)]
    )
    records = {"data/0000": bytes(size)} | {f"data/{i:04}": b"" for i in range(1, count)}
    content = zip_of(b"\x80\x02}(" + storages + b"u.", records)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        at = archive.getinfo("w/data/0000").header_offset
        directory = archive.start_dir
    changed = bytearray(content)
    for position in (m for m in range(directory, len(content) - 46) if content[m : m + 4] == b"PK\x01\x02"):
        if b"w/data/0" in content[position + 46 : position + 54]:
            changed[position + 16 : position + 28] = struct.pack("<III", 0, size, size)
            changed[position + 42 : position + 46] = struct.pack("<I", at)
    (tmp_path / "w.pt").write_bytes(changed)
    assert "larger than the file" in refusal(tmp_path / "w.pt")


def test_more_instructions_than_weights_need_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_sampler.networks.pickles.MAX_OPCODES", 1000)
    (tmp_path / "w.pt").write_bytes(b"\x80\x02" + b"}0" * 1000 + b".")
    assert "instructions" in refusal(tmp_path / "w.pt")


def small(layout: str) -> bytes:
    file = io.BytesIO()
    model = {"w": torch.arange(6.0), "b": torch.ones(2).half()}
    content = {"model": model, "ema": [torch.ones(2)], "lr": Code(print, 1)}
    if layout == "safetensors":
        return save(model)
    if layout == "plain":
        return pickle.dumps(content, 4)
    torch.save(content, file, _use_new_zipfile_serialization=layout == "zip")
    return file.getvalue()


SMALL = {layout: small(layout) for layout in ("zip", "old", "plain", "safetensors")}


def read_or_refuse(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    try:
        read = read_checkpoint(str(path))
    except RequestError as error:
        said = str(error)
    else:
        weights_hash(read.tensors)
        assert sum(tensor.numel() for tensor in read.tensors.values()) < 2**24
        said = read.note or ""
    assert said == "" or said.isprintable()


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=2000)


HEADS = [b"", b"\x80\x02", b"PK\x03\x04", b"\x02\0\0\0\0\0\0\0{", b"\x80\x04}"]


@pytest.mark.parametrize("layout", SMALL)
@FUZZ
@given(data=st.data())
def test_changed_bytes_give_tensors_or_a_refusal(layout: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(SMALL[layout])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read_or_refuse(bytes(content), tmp_path / "w.pt")


@FUZZ
@given(body=st.binary(max_size=300), head=st.sampled_from(HEADS))
def test_arbitrary_bytes_are_refused(head: bytes, body: bytes, tmp_path: Path) -> None:
    read_or_refuse(head + body, tmp_path / "w.pt")


PARTS = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
PARTS += [b"\x00", b"\x01", b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\1\0\0\0w"]


@FUZZ
@given(parts=st.lists(st.sampled_from(PARTS)))
def test_arbitrary_instructions_are_refused(parts: list[bytes], tmp_path: Path) -> None:
    body = b"\x80\x02" + b"".join(parts) + b"."
    read_or_refuse(body, tmp_path / "w.pt")
    read_or_refuse(zip_of(body, {"data/0": NUMBERS}), tmp_path / "w.pt")


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
    """Runs `meanwhile`, in a thread of its own, after the first part of the first large storage was read."""
    monkeypatch.setattr(stored, "CHUNK", 2**16)
    done = threading.Event()

    def crc32(data: Any, value: int) -> int:
        if not done.is_set() and len(data) == 2**16:
            done.set()
            thread = threading.Thread(target=meanwhile)
            thread.start()
            thread.join()
        return isal_zlib.crc32(data, value)

    monkeypatch.setattr(stored, "isal_zlib", type("", (), {"crc32": staticmethod(crc32)}))


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
    assert len(memory) == len(read), "each has memory of its own, so that each can be freed"


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
