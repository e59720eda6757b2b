"""What the golden tests of all versions share: where requests are made, and when bytes must be equal."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.cluster.runs import contents
from tests.golden import adapter
from tests.golden.machine import cpu

BATCH = 4
"""Of all pinned runs."""

ULP_SHARE = 0.01
"""Share of the pixel values that may differ by one on another kind of machine."""

TOLERANCE = 1e-3
"""Of values that are not rounded, absolute or relative, on another kind of machine."""


def read(path: Path) -> Any:
    """A JSON file's content."""
    return json.loads(path.read_text())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def same_kind_of_machine(here: Path) -> bool:
    """Whether this machine must compute the bytes pinned in a folder: its CPU and libraries are those that did."""
    pinned = read(here / "machine.json")
    return bool(pinned["cpu"] == cpu() and pinned["numerics_key"] == adapter.numerics_key(BATCH))


def assert_no_file_was_changed(here: Path, sums_sha256: str) -> None:
    """The folder holds the files that SHA256SUMS names, which has that SHA-256 itself."""
    sums = (here / "SHA256SUMS").read_bytes()
    assert sha256(sums) == sums_sha256
    pinned = {name: digest for digest, name in (line.split("  ") for line in sums.decode().splitlines())}
    actual = {name: sha256(data) for name, data in contents(here).items() if name != "SHA256SUMS"}
    assert actual == pinned


def assert_pinned_archive(here: Path, path: Path, name: str) -> None:
    """Equal bytes on the same kind of machine; elsewhere equal but for rare values that round to the next."""
    pinned_path = here / "archives" / f"{name}.npz"
    if same_kind_of_machine(here):
        assert path.read_bytes() == pinned_path.read_bytes()
        return
    with np.load(path) as actual, np.load(pinned_path) as pinned:
        assert actual.files == pinned.files
        assert np.array_equal(actual["arr_1"], pinned["arr_1"])
        assert (actual["arr_0"].dtype, actual["arr_0"].shape) == (pinned["arr_0"].dtype, pinned["arr_0"].shape)
        if actual["arr_0"].dtype == np.float32:
            np.testing.assert_allclose(actual["arr_0"], pinned["arr_0"], rtol=TOLERANCE, atol=TOLERANCE)
            return
        difference = np.abs(actual["arr_0"].astype(int) - pinned["arr_0"])
    assert difference.max() <= 1
    assert (difference > 0).mean() <= ULP_SHARE
