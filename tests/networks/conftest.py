"""Fixtures for tests of networks."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

from tests.networks.users_models import Write

NUMBER = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes modules into a separate folder, which is the current directory and on no path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def written(source: str, **siblings: str) -> str:
        name = f"users_{next(NUMBER)}"
        for file, text in {name: source, **siblings}.items():
            (tmp_path / f"{file}.py").write_text(text)
        return name

    return written
