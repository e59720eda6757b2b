"""Draw large sample sets from diffusion and consistency models, on a laptop or an autoscaling Ray cluster."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_sampler.errors import RequestError, RunError

if TYPE_CHECKING:
    from ray_sampler.cluster.driver import RunResult
    from ray_sampler.config import RunConfig
    from ray_sampler.networks.custom import Model
    from ray_sampler.storage.fragment import Fragment, read_fragment
    from ray_sampler.storage.read_archive import Archive, ArchiveRange, read_archive
    from ray_sampler.storage.record import DamagedFragment

__all__ = [
    "Archive",
    "ArchiveRange",
    "DamagedFragment",
    "Fragment",
    "Model",
    "RequestError",
    "RunConfig",
    "RunError",
    "RunResult",
    "read_archive",
    "read_fragment",
    "run",
    "score",
]
__version__ = "0.2.0"


def run(config: RunConfig) -> RunResult:
    """Fill the archive that `config` asks for; continue where an earlier run of it stopped.

    Uses the Ray that this process is connected to, or the one at config.address or RAY_ADDRESS, else starts a local one
    and stops it. With `dry_run` nothing is opened or written, and the result holds the resolved settings in place of a
    summary.

    Returns:
        The archive's path or URL, and the content of summary.json.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: the run failed or is incomplete; finished samples are kept, and the same call continues.
    """
    from ray_sampler.cluster.driver import run as drive

    return drive(config)


def score(source: str | os.PathLike[str], reference: str, **flags: Any) -> dict[str, Any]:
    """Compare pictures with a reference.

    Uses Ray as `run` does. Features are kept, and made again only where they are missing.

    Args:
        source: a run directory, an archive or a folder of pictures: a local path or any fsspec URL.
        reference: as of --reference.
        flags: other flags of `ray-sampler score` by name: metrics, features, features_weights, output, ...

    Returns:
        The content of scores.json.

    Raises:
        RequestError: the request is wrong; nothing was written.
        RunError: it failed; features that were made are kept.
    """
    from ray_sampler.cluster.scoring import score as measure
    from ray_sampler.config import ScoreRequest

    return measure(source, ScoreRequest(score=reference, **flags))


LATER = {
    "Archive": "storage.read_archive",
    "ArchiveRange": "storage.read_archive",
    "DamagedFragment": "storage.record",
    "Fragment": "storage.fragment",
    "Model": "networks.custom",
    "RunConfig": "config",
    "RunResult": "cluster.driver",
    "read_archive": "storage.read_archive",
    "read_fragment": "storage.fragment",
}
"""Names that come with their first use, and where from: torch takes seconds to import, numpy and pyarrow half of one,
in which the command line would not hear a signal yet."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(f"ray_sampler.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
