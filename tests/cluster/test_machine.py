"""What limits of containers and jobs leave of a machine, as their files say it, in both versions of control groups."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from ray_sampler.cluster import machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of control groups; this process's own is told by /proc, whatever its name."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    return tmp_path


def write(group: Path, version: int, controller: str, **files: str) -> None:
    folder = group if version == 2 else group / controller
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{controller}.{name}").write_text(text + "\n")


def versions() -> set[int]:
    """The versions of control groups that this process is in."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return {2 if line.startswith("0::") else 1 for line in lines}


@pytest.mark.parametrize(
    ("version", "files", "cpus"),
    [
        (1, {"cfs_quota_us": "50000", "cfs_period_us": "100000"}, 0.5),
        (1, {"cfs_quota_us": "-1", "cfs_period_us": "100000"}, math.inf),
        (2, {"max": "150000 100000"}, 1.5),
        (2, {"max": "max 100000"}, math.inf),
    ],
)
def test_the_cpu_quota(group: Path, version: int, files: dict[str, str], cpus: float):
    if version not in versions():
        pytest.skip(f"this machine has no control groups of version {version}")
    write(group, version, "cpu", **files)
    assert machine.cpu_quota() == cpus
    assert machine.cpus() == max(1, int(min(cpus, len(os.sched_getaffinity(0)))))


@pytest.mark.parametrize(("version", "name"), [(1, "limit_in_bytes"), (2, "max")])
def test_the_memory_limit(group: Path, version: int, name: str):
    if version not in versions():
        pytest.skip(f"this machine has no control groups of version {version}")
    assert machine.memory_limit() == math.inf
    write(group, version, "memory", **{name: "max"})
    assert machine.memory_limit() == math.inf
    write(group, version, "memory", **{name: str(2**29)})
    assert machine.memory_limit() == 2**29


def test_cpus_that_the_process_may_not_use_do_not_count():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_the_processes_that_are_left(group: Path):
    write(group, min(versions()), "pids", max="100", current="30")
    assert machine.processes_left() <= 70
