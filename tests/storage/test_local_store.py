"""Local disks that fail in passing, or where a second failure would hide the first."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.storage import local_store, retry
from ray_sampler.storage.local_store import LocalStore


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_is_deleted_whole_though_the_disk_fails_once(tmp_path: Path, monkeypatch, failing: int) -> None:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    (tmp_path / "run" / "fragments" / "inner").mkdir(parents=True)
    for name in ("a", "fragments/b", "fragments/inner/c"):
        (tmp_path / "run" / name).write_text("x")
    listed, calls = os.scandir, []

    def scandir(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return listed(*arguments)

    monkeypatch.setattr(os, "scandir", scandir)
    LocalStore(tmp_path).remove("run")
    assert len(calls) > failing
    assert not (tmp_path / "run").exists()


class Damage(Exception):
    """What ends an upload."""


def test_a_file_that_cannot_be_closed_hides_no_other_failure(tmp_path: Path, monkeypatch) -> None:
    """As on a mount that says at its close that a quota was exceeded."""

    class Full:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.file = builtins.open(*arguments, **named)  # noqa: SIM115 - closed by its close
            self.fileno = self.file.fileno

        def close(self) -> None:
            self.file.close()
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def chunks() -> Any:
        yield b"some"
        raise Damage

    monkeypatch.setattr(local_store, "open", Full, raising=False)
    with pytest.raises(Damage):
        LocalStore(tmp_path).upload("archive.npz", chunks(), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "archive.npz").mkdir()
    with (
        pytest.raises(Exception, match=r"^cannot read .*archive\.npz: Is a directory"),
        LocalStore(tmp_path).open("archive.npz") as read,
    ):
        read(4)
