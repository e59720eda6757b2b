"""Every name of other packages that they do not promise to keep; a test sees to it that none is used elsewhere.

All were tried with the versions of Ray that pyproject.toml allows. `tests/test_private.py` says for each what to do
where a later Ray lacks it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray._private import ray_constants
from ray._private.state import state as cluster_state
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, without types

__all__ = ["cluster_state", "read_settings_again", "without_uv"]

# cluster_state: where all actors of a job are, and which nodes are about to go, in one question each. ray.util.state
# answers the first by way of the dashboard, which a local Ray lacks, and the second not at all.


def read_settings_again() -> None:
    """Let Ray read RAY_AUTH_MODE again, which it reads once a process: one run may use a token, and the next none."""
    Config.initialize("")


@contextmanager
def without_uv() -> Iterator[None]:
    """Join a Ray that runs on this machine without what Ray does under `uv run`: it copies the working folder.

    RAY_ENABLE_UV_RUN_RUNTIME_ENV is read when Ray is imported, which may be long ago.
    """
    earlier = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = earlier
