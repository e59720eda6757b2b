"""A node without memory or disk left: what is full, what to free, and none of Ray's own lines."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import OutOfDiskError
from torch import nn

from ray_sampler import cli
from ray_sampler.cluster import outcome
from ray_sampler.cluster.outcome import MERGE_ATTEMPTS
from ray_sampler.cluster.shipping import Shipped, ship, unpack
from ray_sampler.errors import RunError
from ray_sampler.networks.opening import open_network
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import flags_of
from tests.conftest import ROOT, Configure

FULL = (
    r"^node \S+ has no room for the network's weights: Ray's object store is full, and so is the disk .* delete files"
)


@pytest.mark.usefixtures("local_ray")
def test_a_merge_that_is_killed_again_and_again_ends_with_the_cause_and_what_to_do(
    configure: Configure, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("summary.json", "samples_40x8x8x3.npz"):
        (copy / name).unlink()

    def is_killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(outcome, "merge_task", ray.remote(num_cpus=0, max_retries=0)(is_killed))
    assert cli.main(["sample", *flags_of(configure(progress="log"))]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "was killed" in line and "it is started again" in line]) == MERGE_ATTEMPTS - 1
    assert lines[-1].startswith("ray-sampler: the archive could not be written: its process was killed 3 times, ")
    assert "for lack of memory; the samples are kept: free memory on the driver's node and run the same" in lines[-1]
    assert f"or run `ray-sampler merge {copy}` on a machine that has more" in lines[-1]
    assert not any("python-core-worker" in line for line in lines)


def test_a_full_store_is_named_with_what_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutOfDiskError("Local disk is full")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(RunError, match=FULL):
        ship(open_network("digits", {}), "fp32")
    monkeypatch.setattr(ray, "get", full)
    with pytest.raises(RunError, match=FULL):
        unpack(Shipped(b"", (), (), lambda module, precision: nn.Identity(), "fp32", False))


FILLS = """
import ray, torch
from ray_sampler.cluster.shipping import _Loader
ray.init(address="local", object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False,
         _system_config={"local_fs_capacity_threshold": 0.0})
loader = _Loader({}, {}, True)
for tensor in [torch.zeros(20_000_000) for _ in range(3)]:
    loader.take(tensor)
"""


@pytest.mark.accidents
def test_ray_reports_a_store_and_a_disk_that_are_full() -> None:
    """As Ray itself counts a disk as full, here at any use of it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", FILLS], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 1
    assert re.search(FULL.removeprefix("^"), done.stderr)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("A worker died or was killed while executing a task by an unexpected system error. To troubleshoot", False),
        ("Task merge_fragments failed. There are 3 retries remaining, so the task will be retried. Error: ", False),
        ("Warning: The following resource request cannot be scheduled right now", True),
    ],
)
def test_rays_lines_of_a_lost_process_are_not_shown(line: str, shown: bool) -> None:
    """Ray prints on standard output, where a run prints the path of its archive."""
    show = (
        "import sys, ray_sampler.cluster, ray._private.worker as worker\n"
        "worker.print_to_stdstream({'lines': [sys.argv[1]], 'pid': 'raylet', 'is_err': False}, False)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_DEDUP_LOGS_SKIP_REGEX", None)
    done = subprocess.run(
        [sys.executable, "-c", show, line], env=environment, capture_output=True, text=True, check=True
    )
    assert (line.strip() in done.stdout) == shown
