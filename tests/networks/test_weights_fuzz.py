"""No byte of a file executes code, takes for ever or fills the memory."""

from __future__ import annotations

import io
import pickletools
import resource
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash
from tests.networks.layouts import refusal
from tests.networks.malicious import SMALL


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


NUMBERS = torch.arange(4.0).numpy().tobytes()
HUGE = {
    "a memo of 2^32 entries": b"\x80\x02}r\xff\xff\xff\xff.",
    "bytes of 2^60": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "a buffer of 2^33": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b"x.",
    "a text of 2^32": b"\x80\x02X\xff\xff\xff\xffx.",
    "an integer of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7fx.",
    "a frame of 2^60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b".",
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
    before, start = peak(), time.process_time()
    refusal(tmp_path / "w.pt")
    assert time.process_time() - start < 5
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
    assert "damaged" in refusal(tmp_path / "w.pt")


def read_or_refuse(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    start = time.process_time()
    try:
        read = read_checkpoint(str(path))
    except RequestError as error:
        said = str(error)
    else:
        weights_hash(read.tensors)
        assert sum(tensor.numel() for tensor in read.tensors.values()) < 2**24
        said = read.note or ""
    assert said == "" or said.isprintable()
    assert time.process_time() - start < 2


FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=150)


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
