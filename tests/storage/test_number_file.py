"""Files of labels and levels that cannot be read, from wherever they are named: one sentence without a credential."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_sampler.errors import RequestError
from ray_sampler.storage.number_file import read_labels, read_levels
from tests.resolving import SMALL, resolve


@pytest.mark.parametrize("read", [read_labels, read_levels])
@pytest.mark.parametrize(
    "url",
    [
        pytest.param("s3://key:HIDDEN@bucket/x", id="a bucket's name that is none"),
        pytest.param("zip://x::PLAIN", id="no zip file"),
        pytest.param("unknown://user:HIDDEN@host/x", id="an unknown protocol"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    read: Callable[[str], Any], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    (tmp_path / "plain").write_text("1 2")
    with pytest.raises(RequestError) as refusal:
        read(url.replace("PLAIN", str(tmp_path / "plain")))
    assert "or a readable file" in str(refusal.value)
    assert "HIDDEN" not in str(refusal.value)
    assert refusal.value.__suppress_context__  # a traceback would show what the filesystem says


def test_an_unconditional_model_refuses_labels_without_showing_their_credential() -> None:
    with pytest.raises(RequestError, match="the model is unconditional") as refusal:
        resolve(SMALL | {"class_cond": False}, labels="https://host/labels.npy?signature=HIDDEN")
    assert "HIDDEN" not in str(refusal.value)
