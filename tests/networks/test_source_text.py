"""Snapshots that changed code wrote are noticed by their source text, which is compared and never run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.networks import source_text
from ray_sampler.networks.opening import open_network
from ray_sampler.networks.source_text import changed, statements, token_hash
from tests.networks import nvidia_files
from tests.networks.reference import FOLDER, saved

SOURCE = '''
"""Networks."""
import torch
from torch.nn.functional import silu

SCALE = 2  # of what follows

def resample(x):
    return x[:, :, ::2, ::2] * SCALE

def other(x):
    return x

@persistent
class Layer(torch.nn.Module):
    def forward(self, x):
        return silu(resample(x)) + f"{x:.3f}{'a'}".count("a")

@persistent
class UNet(torch.nn.Module):
    """Made of layers."""
    def __init__(self):
        self.layer = Layer()

class Precond(torch.nn.Module):
    def forward(self, x):
        raise SystemExit("this was run")

class Unused(torch.nn.Module):
    pass
'''


@pytest.fixture(autouse=True)
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """`SOURCE` in place of the published text."""
    table: dict[str, tuple[str, ...]] = {"imports": (token_hash([IMPORTS.split()]),)}
    for lines in statements(SOURCE):
        if lines[0][0] in ("class", "def"):
            table[lines[0][1]] = (token_hash(lines),)
        elif lines[0][1:2] == ["="]:
            table[lines[0][0]] = (token_hash(lines),)
    monkeypatch.setattr(source_text, "PUBLISHED", (table,))


IMPORTS = "import torch from torch . nn . functional import silu"


def test_the_hash_is_that_of_the_tokens_one_space_between() -> None:
    (lines,) = statements("@decorated\ndef f( x ):  # of x\n\n    return f'{x}'\n")
    digest = hashlib.sha256(b"def f ( x ) : return f'{x}'").hexdigest()
    assert token_hash(lines) == digest[:16]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("# of what follows", "# of nothing"),
        ("    def __init__(self):\n", "    def __init__( self ):\n        # the layer\n\n"),
        ("@persistent\nclass UNet", "@another\n@persistent\nclass UNet"),
        ("    pass\n", "    x = torch.relu\n"),
        ("def other(x):\n    return x\n", ""),
        ("class Unused", "VERSION = 3\n\nif __name__ == '__main__':\n    raise SystemExit\n\nclass Unused"),
    ],
)
def test_what_the_network_does_not_use_may_differ(old: str, new: str) -> None:
    assert old in SOURCE
    assert changed(SOURCE.replace(old, new), ["Precond", "UNet", "Layer"]) == []


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("silu(resample", "torch.relu(resample", ["Layer"]),
        ("x[:, :, ::2, ::2]", "x[:, :, 1::2, 1::2]", ["resample"]),
        ("SCALE = 2", "SCALE = 3", ["SCALE"]),
        ("import silu", "import relu as silu", ["imports"]),
        ("import torch\n", "import torch\nimport math\n", ["imports"]),
        ("SCALE = 2", "torch.nn.functional.silu = torch.relu\nSCALE = 2", ["torch"]),
        ("class Unused", "def silu(x):\n    return x\n\nclass Unused", ["silu"]),
        ("class Unused", "try:\n    from fast import silu\nexcept ImportError:\n    pass\n\nclass Unused", ["silu"]),
        ("class Unused", "class Layer(Layer):\n    pass\n\nclass Unused", ["Layer"]),
        ("{x:.3f}", "{x:.4f}", ["Layer"]),
        ("class UNet", "class Another", ["UNet"]),
        (SOURCE, "class Precond:\n    '''", ["a source text that cannot be read"]),
    ],
)
def test_what_the_network_uses_is_named(old: str, new: str, named: list[str]) -> None:
    assert old in SOURCE
    assert changed(SOURCE.replace(old, new), ["Precond", "UNet", "Layer"]) == named


def test_only_the_classes_that_the_file_uses_count() -> None:
    text = SOURCE.replace("silu(resample", "torch.relu(resample")
    assert changed(text, ["Precond"]) == []
    assert changed(text, ["Precond", "UNet"]) == ["Layer"]


@pytest.mark.parametrize("text", ["", "raise SystemExit\n", "# nothing\n", "x = 3\n"])
def test_a_text_with_neither_a_class_nor_an_import_is_none(text: str) -> None:
    assert changed(text, ["Precond", "UNet"]) == []


@pytest.mark.parametrize(
    ("source", "named"), [(SOURCE, None), (SOURCE.replace("silu(resample", "abs(resample"), "Layer")]
)
def test_an_opened_snapshot_says_what_differs_and_runs_nothing(
    source: str, named: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = saved("edm2_16")
    monkeypatch.setattr(nvidia_files, "SOURCE", source)
    arguments: dict[str, Any] = {k: v for k, v in stored.arguments.items() if k != "model_type"}
    path = tmp_path / "net.pkl"
    path.write_bytes(nvidia_files.snapshot("Precond", stored.tensors, arguments))
    note = open_network(str(path), {}).note
    if named is None:
        assert note is None
    else:
        assert note == (
            f"the code that wrote this file is not the published one: {named} differs; it is sampled with the "
            "published arithmetic, so pictures may be wrong"
        )


@pytest.mark.parametrize("name", ["edm2_16", "edm_ddpmpp16"])
def test_a_file_without_source_text_gets_no_warning(name: str) -> None:
    assert open_network(str(FOLDER / name / "net.pkl"), {}).note is None
