"""Noise levels from a list or a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ray_sampler.errors import RequestError
from ray_sampler.storage.number_file import read_levels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80,10,1", (80.0, 10.0, 1.0, 0.0)),
        ("80, 10 ,1,0", (80.0, 10.0, 1.0, 0.0)),
        ("8e1,1e-3,0.0", (80.0, 0.001, 0.0)),
        ("14.6", (14.6, 0.0)),
    ],
)
def test_a_list_is_read_and_ends_in_0(text: str, expected: tuple[float, ...]) -> None:
    assert read_levels(text) == expected


def test_levels_may_be_numbers() -> None:
    assert read_levels([80, 10.5, np.float64(1)]) == (80.0, 10.5, 1.0, 0.0)


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "levels.txt").write_text("80, 10.5\n 1\n")
    np.save(tmp_path / "levels.npy", np.array([80, 10.5, 1, 0]))
    np.savez(tmp_path / "levels.npz", np.array([80, 10.5, 1], dtype=np.float32))
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbfsigma\n80\n10.5 # half-way\n1\n")
    np.save(tmp_path / "column.npy", np.array([[80.0], [10.5], [1.0]]))
    (tmp_path / "levels").write_bytes((tmp_path / "levels.npz").read_bytes())
    for name in ("levels.txt", "levels.npy", "levels.npz", "table.csv", "column.npy", "levels"):
        assert read_levels(str(tmp_path / name)) == (80.0, 10.5, 1.0, 0.0), name


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "it must be a list"),
        ("10,80", "80 follows 10"),
        ("80,10,10,1", "10 follows 10"),
        ("80,0,1", "1 follows 0"),
        ("80,0,0", "0 follows 0"),
        ("80,-1", "-1 follows 80"),
        ("inf,1", "1 follows inf"),
        ("80,nan", "nan follows 80"),
        ("0", "must begin with a noise level above 0"),
        ("nan", "must begin with a noise level above 0"),
        ("missing.txt", "readable file"),
        ("80,ten", "readable file"),
    ],
)
def test_what_does_not_fall_is_refused(text: str, expected: str) -> None:
    with pytest.raises(RequestError) as error:
        read_levels(text)
    assert expected in str(error.value)
    assert str(error.value).startswith("--sigmas is")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("eighty ten one")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    np.savez(tmp_path / "other.npz", sigmas=np.array([80.0, 1.0]))
    np.save(tmp_path / "square.npy", np.ones((2, 2)))
    np.save(tmp_path / "text.npy", np.array(["80", "1"]))
    np.save(tmp_path / "objects.npy", np.array([80.0, None]), allow_pickle=True)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(RequestError, match="--sigmas"):
            read_levels(str(path))
