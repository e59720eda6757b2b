"""Weights arrive safely: nothing of a checkpoint runs, and what is wrong with it is said in one sentence."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import pickle
import tarfile
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ray_sampler.errors import RequestError
from ray_sampler.networks.weights import read_checkpoint, weights_hash


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Tensors of an ADM network's names, none of them 0."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "time_embed.0.weight": (128, 32),
        "input_blocks.0.0.weight": (32, 3, 3, 3),
        "input_blocks.0.0.bias": (32,),
        "out.2.weight": (3, 32, 3, 3),
        "out.2.bias": (3,),
    }
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def zip_pickle(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


def old_pickle(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def nested(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"state_dict": state, "step": 3}, path)


def safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


WRITERS = [(zip_pickle, "w.pt"), (old_pickle, "w.pt"), (nested, "w.pth"), (safetensors, "w.safetensors")]
Writer = Callable[[dict[str, Tensor], Path], None]


def refusal(url: str | Path) -> str:
    """The one sentence with which a checkpoint is refused."""
    with pytest.raises(RequestError) as refused:
        read_checkpoint(str(url))
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith("--model is ")
    return message


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_every_format_gives_the_same_tensors(
    write: Writer, name: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    write(state, tmp_path / name)
    loaded = read_checkpoint(str(tmp_path / name)).tensors
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    assert weights_hash(loaded) == weights_hash(state)


def test_a_url_gives_what_the_path_gives(state: dict[str, Tensor], tmp_path: Path) -> None:
    zip_pickle(state, tmp_path / "w.pt")
    with fsspec.open("memory://checkpoints/w.pt", "wb") as file:
        file.write((tmp_path / "w.pt").read_bytes())
    for url in ("memory://checkpoints/w.pt", (tmp_path / "w.pt").as_uri()):
        assert weights_hash(read_checkpoint(url).tensors) == weights_hash(state)


class Code:
    """Unpickled, this runs a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("place", [lambda code: code, lambda code: {"w": torch.zeros(1), "extra": code}])
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec])
def test_a_malicious_pickle_is_refused_and_never_runs(
    function: Callable[..., object], place: Callable[[Code], object], new_format: bool, tmp_path: Path
) -> None:
    marker = tmp_path / "it-ran"
    arguments = {
        os.mkdir: str(marker),
        os.system: f"touch {marker}",
        eval: f"__import__('os').mkdir({str(marker)!r})",
        exec: f"import os; os.mkdir({str(marker)!r})",
    }
    path = tmp_path / "w.pt"
    torch.save(place(Code(function, arguments[function])), path, _use_new_zipfile_serialization=new_format)
    assert "would run code" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_bare_malicious_pickle_never_runs(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Code(os.mkdir, str(tmp_path / "it-ran")), protocol))
    refusal(tmp_path / "w.pt")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("content", [nn.Linear(2, 2), {"w": torch.zeros(1), "args": argparse.Namespace(lr=1)}])
def test_objects_beside_tensors_are_refused_with_a_way_out(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert "save its state dict alone" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, torch.zeros(3), {"w": 3}, {3: torch.zeros(1)}, {"model": {"w": 1.0}}])
def test_what_holds_no_state_dict_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pt")
    assert "must hold a state dict" in refusal(tmp_path / "w.pt")


@pytest.mark.parametrize(("write", "name"), WRITERS)
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(
    write: Writer, name: str, kept: float, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    assert "truncated" in refusal(path)


def small_checkpoint() -> bytes:
    file = io.BytesIO()
    torch.save({"w": torch.arange(6.0)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_arbitrary_bytes_are_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    refusal(tmp_path / f"w{suffix}")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(at=st.integers(0, len(small_checkpoint()) - 1), value=st.integers(0, 255))
def test_a_changed_byte_gives_tensors_or_a_refusal(at: int, value: int, tmp_path: Path) -> None:
    content = bytearray(small_checkpoint())
    content[at] = value
    (tmp_path / "w.pt").write_bytes(content)
    try:
        loaded = read_checkpoint(str(tmp_path / "w.pt")).tensors
    except RequestError:
        return
    assert all(isinstance(tensor, Tensor) for tensor in loaded.values())


def test_a_missing_file_a_directory_and_another_suffix_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "w.ckpt").write_bytes(b"")
    assert "no such file" in refusal(tmp_path / "none.pt")
    assert "a directory" in refusal(tmp_path / "folder.pt")
    assert "a directory" in refusal((tmp_path / "folder.pt").as_uri())
    assert ".safetensors" in refusal(tmp_path / "w.ckpt")
    assert "no such file" in refusal("memory://none.pt")


def test_an_unreachable_bucket_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "very-secret",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    message = refusal("s3://bucket/w.pt")
    assert "cannot be read" in message
    assert "very-secret" not in message


def test_an_error_holds_no_credential_of_the_url() -> None:
    for scheme in ("http", "unknown"):
        message = refusal(f"{scheme}://user:very-secret@127.0.0.1:9/w.pt?sig=very-secret")
        assert "very-secret" not in message
        assert "127.0.0.1:9/w.pt" in message


class Forbidding(BaseHTTPRequestHandler):
    """A server that tells a file's size and gives it to nobody, as one does whose signed URL has expired."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_error(403)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_an_error_that_quotes_the_url_in_another_spelling_holds_no_credential_of_it() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        for query in ("sig=very-secret", "sig=very-secret%2Fa%3D%2b", "a=b c&sig=very-secret%7E", "sig=%76ery-secret"):
            url = f"http://user:very-secret@{host}/w.pt?{query}"
            with pytest.raises(RequestError) as caught:
                read_checkpoint(url)
            assert "ClientResponseError: 403" in str(caught.value)
            assert f"http://{host}/w.pt" in str(caught.value)
            assert "ery-secret" not in str(caught.value)
            assert caught.value.__suppress_context__  # nor does a traceback show the error that quotes it
        server.shutdown()


@pytest.mark.parametrize("kind", ["tar", "zip with another pickle", "zip with code"])
def test_pickles_in_archives_of_older_or_made_up_layouts_never_run(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    code = pickle.dumps(Code(os.mkdir, str(marker)), 2)
    path = tmp_path / "w.pt"
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


def test_the_hash_of_weights_is_the_same_in_every_version() -> None:
    state = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(7, dtype=torch.int64)}
    content = b"a int64 []\n" + (7).to_bytes(8, "little") + b"b float32 [1, 2]\n" + bytes.fromhex("0000c03f000000c0")
    assert weights_hash(state) == hashlib.sha256(content).hexdigest()


def test_the_hash_sees_values_and_not_how_they_lie_in_memory() -> None:
    images = torch.arange(24.0).reshape(1, 2, 3, 4)
    laid_out = images.to(memory_format=torch.channels_last)
    assert laid_out.stride() != images.stride()
    assert weights_hash({"x": laid_out, "y": images}) == weights_hash({"y": images, "x": images.clone()})


@pytest.mark.parametrize(
    "other",
    [
        {"v": torch.zeros(4)},
        {"w": torch.zeros(4, dtype=torch.int32)},
        {"w": torch.zeros(2, 2)},
        {"w": torch.tensor([0, 0, 0, 1e-30])},
        {"w": torch.zeros(4, dtype=torch.bfloat16)},
        {"w": torch.zeros(4), "v": torch.zeros(0)},
    ],
)
def test_the_hash_tells_names_types_shapes_and_bytes_apart(other: dict[str, Tensor]) -> None:
    assert weights_hash(other) != weights_hash({"w": torch.zeros(4)})
