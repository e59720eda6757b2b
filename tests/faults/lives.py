"""The life of a run as its store sees it, without the computing: what it says at the end, and with which exit code."""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.archive import archive_intact, content_of, merge
from ray_sampler.storage.ranges import cover
from ray_sampler.storage.record import FragmentName
from ray_sampler.storage.run_dir import RunDir
from tests.storage.fill import FINGERPRINT, fill

NAMES = [FragmentName(0, 4, "parquet"), FragmentName(4, 8, "parquet")]
ARCHIVE = "samples_8x8x8x3.npz"


@dataclass
class Life:
    """What became of a run."""

    code: int = 0
    said: str = ""
    computed: bool = False
    """Whether it came to the computing."""
    rejected: list[tuple[str, str]] = field(default_factory=list)


def live(url: str) -> Life:
    """Do with a store what a run does. Only the two errors that the command line reports are caught."""
    life = Life()
    try:
        run_dir = RunDir(url)
        run_dir.create_run({"seed": 1})
        found = run_dir.fragments.verify(FINGERPRINT)
        life.rejected = found.rejected
        run_dir.prove_rights()
        run_dir.probe_write("driver")
        assert run_dir.probe_seen("driver", 60.0)
        life.computed = True
        records = found.records | fill(run_dir, [name for name in NAMES if name not in found.records])
        run_dir.probes_clear()
        contents = {name: content_of(record) for name, record in records.items()}
        layout = merge(run_dir, cover(records, 8), contents, 8, (8, 8, 3), True, FINGERPRINT)
        run_dir.write_file("report.html", b"report")
        assert archive_intact(run_dir, layout)
    except RequestError as error:
        life.code, life.said = 2, str(error)
    except RunError as error:
        life.code, life.said = 1, str(error)
    return life
