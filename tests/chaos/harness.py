"""Runs that are killed, frozen, starved and spoiled on purpose, and must end in the bytes of an undisturbed one.

One Ray cluster of a head and two worker nodes serves all rounds. In each round a driver fills an archive while
actors, nodes and the driver itself are killed or frozen and fragments are damaged, by chance from a seed; the same
command is given again until it succeeds. In some rounds the output is a bucket whose requests fail.
"""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.torch import save

from tests.chaos.damage import spoil
from tests.cluster.fleets import Fleet, send
from tests.cluster.runs import flags_of, leave, random_weights, sampled, savez, small
from tests.faults.disk import DiskFault, faulty_disk
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.servers import BUCKET

FLAGS: dict[str, Any] = {"num_samples": 200, "shard_size": 4, "steps": 16, "max_actors": 2, "shard_timeout": 5.0}
"""Fifty shards, which take two actors some seconds."""

ARCHIVE = "samples_200x8x8x3.npz"
WORKERS = 2
DISTURBANCES = 6
"""Kills in one round, at most; then the run is left alone."""
SPOILED_AT_ONCE = 16
PATIENCE_S = 400.0
"""A run that is left alone and not done by then counts as stalled."""
NOTICED_S = 60.0
"""How long the driver is watched for a sign that it knows of a node's death."""

IN_BUCKET = 0.4
"""Share of the rounds whose output is a bucket."""
ON_DISK = 0.25
"""Share of the rounds whose output is a disk that can be full."""
FULL_S = (1.0, 30.0)
"""How long the disk stays full; a run gives up after 15 s in which nothing could be written."""
FAULTS = (
    Fault("503", probability=0.04),
    Fault("500", probability=0.02),
    Fault("reset", probability=0.02),
    Fault("reset upload", probability=0.02),
    Fault("lost", probability=0.01),
    Fault("truncated", probability=0.02),
    Fault("slow", probability=0.03, seconds=0.5),
    Fault("stall", probability=0.005, seconds=3),
)
CUT_SHORT = 0.3
"""Share of the rounds whose archive is cut short when it is done; the same command must make it again."""

DRIVER_SIGNALS = {
    "driver SIGKILL": signal.SIGKILL,
    "driver SIGTERM": signal.SIGTERM,
    "driver SIGINT": signal.SIGINT,
}
SWAPPED = "checkpoint swapped"
FULL = "disk full"
KILLS = ("actor", "all actors", "actor frozen", "raylet", "node", "all nodes", "node frozen", *DRIVER_SIGNALS, SWAPPED)
"""A node is its raylet and all that it started. The driver is killed when the checkpoint is swapped."""


@dataclass
class Score:
    """What was done to the runs, and what became of them."""

    rounds: int = 0
    in_bucket: int = 0
    on_disk: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Of storage requests."""
    noticed_s: list[float] = field(default_factory=list)
    """Seconds from the death of a node to its shards' going to others."""
    passed_on: int = 0
    """Shards that went to another actor."""
    rejected: int = 0
    cut_short: int = 0
    identical: int = 0
    lost: int = 0
    """Samples that are missing or wrong in the archives."""
    failures: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        seconds = self.noticed_s
        noticed = f"{statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s" if seconds else "not seen"
        return [
            ("rounds", str(self.rounds)),
            ("  into a bucket whose requests fail", str(self.in_bucket)),
            ("  onto a disk that can be full", str(self.on_disk)),
            *counted("kills", self.kills),
            *counted("faults of storage requests", self.faults),
            *counted("fragments corrupted", self.damages),
            ("finished archives cut short", str(self.cut_short)),
            ("shards recomputed", str(self.passed_on + self.rejected + self.damages["gone"])),
            ("  lost with their actor", str(self.passed_on)),
            ("  rejected as damaged or foreign", str(self.rejected)),
            ("  deleted", str(self.damages["gone"])),
            ("from a node's death to its shards' going to others", noticed),
            ("archives identical to the undisturbed run's", f"{self.identical} of {self.rounds}"),
            ("samples lost", str(self.lost)),
            ("failures", "; ".join(self.failures) or "none"),
        ]


def counted(what: str, counts: Counter[str]) -> list[tuple[str, str]]:
    kinds = [(f"  {kind.replace('_', ' ')}", str(count)) for kind, count in sorted(counts.items())]
    return [(what, str(counts.total())), *kinds]


def wrong_samples(archive: Path, expected: bytes) -> int:
    """How many of the expected samples an archive does not hold, at their places."""
    right = np.load(io.BytesIO(expected))["arr_0"]
    try:
        with np.load(archive) as found:
            images = found["arr_0"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return len(right)
    same = min(len(right), len(images))
    return len(right) - int((right[:same] == images[:same]).all(axis=(1, 2, 3)).sum())


class Chaos:
    """A cluster to be mistreated, and the archive that every run must end in.

    Args:
        folder: an empty one.
        proxy: before a bucket whose files lie in `folder`/bucket.
    """

    def __init__(self, checkpoint: Path, folder: Path, proxy: FaultProxy, seed: int) -> None:
        self.chance = random.Random(seed)
        self.checkpoint = Path(shutil.copy(checkpoint, folder / "model.safetensors"))
        self.right_weights = self.checkpoint.read_bytes()
        self.other_weights = save({name: 2 * tensor for name, tensor in random_weights().items()})
        self.folder = folder
        self.proxy = proxy
        self.score = Score()
        self.expected = savez(sampled(small(checkpoint, None, **FLAGS)))
        other = small(checkpoint, folder / "foreign", seed=7, **FLAGS)
        leave(other, sampled(other), [(0, 4)])
        self.foreign = next((folder / "foreign" / "fragments").iterdir())
        self.fleet = Fleet(WORKERS)
        self.frozen: list[psutil.Process] = []
        self.beheaded: list[Any] = []
        self.full = folder / "full"
        self.opened = ExitStack()
        try:
            self.disk: Path | None = self.opened.enter_context(
                faulty_disk(folder, [DiskFault("write", "ENOSPC", during=str(self.full))])
            )
        except pytest.skip.Exception as reason:
            print(f"no round on a disk that can be full: {reason}", file=sys.stderr)
            self.disk = None

    def close(self) -> None:
        send(signal.SIGKILL, self.frozen)
        self.fleet.close()
        self.opened.close()

    def round(self, place: str | None = None, most: int = DISTURBANCES) -> None:
        """One run, disturbed up to `most` times and given again until it ends.

        Args:
            place: "bucket", "disk" or "folder"; by chance, unless it is given.
        """
        name = f"round-{self.score.rounds}"
        if place is None:
            chance = self.chance.random()
            place = "bucket" if chance < IN_BUCKET else "disk" if chance < IN_BUCKET + ON_DISK else "folder"
        folders = {"bucket": self.folder / "bucket" / BUCKET, "disk": self.disk or self.folder, "folder": self.folder}
        self.kinds = (*KILLS, *([FULL] * 3 if place == "disk" and self.disk else []))
        self.score.rounds += 1
        self.score.in_bucket += place == "bucket"
        self.score.on_disk += FULL in self.kinds
        self.files = folders[place] / name
        self.output = f"s3://{BUCKET}/{name}" if place == "bucket" else str(self.files)
        self.log = self.folder / f"{name}.log"
        self.proxy.plan(*FAULTS)
        failure = self._disturbed_run(left=self.chance.randrange(1, most + 1))
        if failure is None and self.chance.random() < CUT_SHORT:
            self.score.cut_short += 1
            os.truncate(self.files / ARCHIVE, self.chance.randrange((self.files / ARCHIVE).stat().st_size))
            failure = self._disturbed_run(left=0)
        self._count(failure)

    def _disturbed_run(self, left: int) -> str | None:
        """Give the command until it succeeds, disturbing it `left` times; what must not be, if it happens."""
        while True:
            driver = self._start()
            codes = {0}
            while left and driver.poll() is None:
                self._wait_a_little(driver)
                if driver.poll() is not None:
                    break
                left -= 1
                kind = self.chance.choice(self.kinds)
                self._spoil()
                if kind == SWAPPED:
                    if failure := self._swap(driver):
                        return failure
                    codes = {0, -signal.SIGKILL}
                    break
                if kind == FULL:
                    self._fill_disk(driver)
                    codes = {0, 1}
                    continue
                self._kill(kind, driver)
                if kind in DRIVER_SIGNALS:
                    number = DRIVER_SIGNALS[kind]
                    codes = {0, 128 + number, -number}  # the last before it listens, and of SIGKILL
                    break
            code = self._wait(driver)
            if code == 0:
                return None
            if code not in codes:
                return f"exit code {code}: {self._said()[-1][:300]}"
            self._spoil()

    def _swap(self, driver: subprocess.Popen[bytes]) -> str | None:
        """Put other weights into the checkpoint's place and kill the driver: the command must then be refused."""
        if not (self.files / "run.json").exists():  # the run would be one of the other weights
            return None
        self.score.kills[SWAPPED] += 1
        self._put_checkpoint(self.other_weights)
        driver.kill()
        driver.wait()
        try:
            code = self._wait(self._start())
        finally:
            self._put_checkpoint(self.right_weights)
        said = self._said()[-1]
        return None if code == 2 and "weights" in said else f"exit code {code} with another checkpoint: {said[:300]}"

    def _put_checkpoint(self, data: bytes) -> None:
        hidden = self.folder / "hidden"
        hidden.write_bytes(data)
        hidden.replace(self.checkpoint)

    def _fill_disk(self, driver: subprocess.Popen[bytes]) -> None:
        """Let nothing be written for some time, or until the driver gives up."""
        self.score.kills[FULL] += 1
        self.full.touch()
        until = time.monotonic() + self.chance.uniform(*FULL_S)
        while driver.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        self.full.unlink()

    def _count(self, failure: str | None) -> None:
        """Add up a round, and remove what it left if all is well."""
        while self.beheaded:
            self.fleet.cluster.remove_node(self.beheaded.pop(), allow_graceful=False)
        self.proxy.plan()
        self.score.faults += self.proxy.faults
        self.proxy.clear()
        self.score.passed_on += sum(
            int(found[1]) for line in self._said() if (found := re.search(r"lost an actor; requeued (\d+) shard", line))
        )
        self.score.rejected += len(list((self.files / "rejected").glob("*.reason.txt")))
        archive = self.files / ARCHIVE
        if failure is None and archive.read_bytes() != self.expected:
            failure = "another archive"
        if failure is None:
            self.score.identical += 1
            shutil.rmtree(self.files)
        else:
            self.score.lost += wrong_samples(archive, self.expected)
            self.score.failures.append(f"round {self.score.rounds}: {failure}")
            print(f"round {self.score.rounds}: {failure}", *self._said()[-30:], sep="\n", file=sys.stderr)

    def _start(self) -> subprocess.Popen[bytes]:
        request = small(self.checkpoint, self.output, address=self.fleet.address, progress="log", **FLAGS)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_sampler", "sample", *flags_of(request)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _said(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()

    def _wait_a_little(self, driver: subprocess.Popen[bytes]) -> None:
        """Up to the next disturbance: anywhere from the driver's first second to the middle of sampling."""
        until = time.monotonic() + self.chance.uniform(0.5, 4)
        early = self.chance.random() < 0.2
        while driver.poll() is None and (time.monotonic() < until or not (early or self._samples())):
            time.sleep(0.05)

    def _samples(self) -> bool:
        return any((self.files / "fragments").glob("*.parquet"))

    def _wait(self, driver: subprocess.Popen[bytes]) -> int:
        try:
            return driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            return 1000

    def _spoil(self) -> None:
        fragments = self.files / "fragments"
        if fragments.exists():
            count = self.chance.randrange(SPOILED_AT_ONCE + 1)
            self.score.damages.update(spoil(fragments, self.foreign, count, self.chance))

    def _kill(self, kind: str, driver: subprocess.Popen[bytes]) -> None:
        if kind in DRIVER_SIGNALS:
            os.kill(driver.pid, DRIVER_SIGNALS[kind])
        elif "node" in kind or kind == "raylet":
            self._strike_nodes(kind, driver)
        else:
            actors = self._actors()
            if kind != "all actors":
                actors = actors[:1]
            if not actors:
                return
            if kind == "actor frozen":
                self.frozen += actors
            send(signal.SIGSTOP if kind == "actor frozen" else signal.SIGKILL, actors)
        self.score.kills[kind] += 1

    def _strike_nodes(self, kind: str, driver: subprocess.Popen[bytes]) -> None:
        """Kill or freeze nodes; others come in their place, at once or, in half of all cases, a little later."""
        struck = list(self.fleet.workers) if kind == "all nodes" else [self.chance.choice(self.fleet.workers)]
        computing = [node for node in struck if self._actors_of(node)]
        reports = self._losses()
        began = time.monotonic()
        for node in struck:
            if kind == "raylet":
                self.fleet.behead(node)
                self.beheaded.append(node)
            elif kind == "node frozen":
                self.frozen += self.fleet.freeze(node)
                self.fleet.workers.remove(node)
            else:
                self.fleet.kill(node)
        if kind == "node" and computing:
            self._watch(driver, reports, began)
        elif self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0, 3))
        for _ in struck:
            self.fleet.add()

    def _losses(self) -> int:
        return sum("lost an actor" in line for line in self._said())

    def _watch(self, driver: subprocess.Popen[bytes], reports: int, began: float) -> None:
        """Note when the driver knows of a node's death, unless the run ends before."""
        while driver.poll() is None and time.monotonic() < began + NOTICED_S:
            if self._losses() > reports:
                self.score.noticed_s.append(time.monotonic() - began)
                return
            time.sleep(0.02)

    def _actors(self) -> list[psutil.Process]:
        """The actors on this cluster's nodes, in an order of chance."""
        actors = [actor for node in self.fleet.workers for actor in self._actors_of(node)]
        self.chance.shuffle(actors)
        return actors

    def _actors_of(self, node: Any) -> list[psutil.Process]:
        found = []
        for process in self.fleet.processes(node):
            try:
                if "ray::Worker" in " ".join(process.cmdline()[:1]):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found
