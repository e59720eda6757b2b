"""Runs that are killed, starved and spoiled on purpose, and must end in the bytes of an undisturbed one.

One Ray cluster of a head and two worker nodes serves all rounds. In each round a driver fills an archive while
actors, nodes and the driver itself are killed and fragments are damaged, by chance from a seed; the same command is
given again until it succeeds.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

from ray_sampler.cluster.driver import run
from tests.chaos.damage import spoil
from tests.cluster.runs import flags_of, small

FLAGS: dict[str, Any] = {"num_samples": 320, "shard_size": 4, "steps": 30, "max_actors": 2}
"""Eighty shards, which take two actors some seconds."""

ARCHIVE = "samples_320x8x8x3.npz"
WORKERS = 2
DISTURBANCES = 6
"""Kills in one round, at most; then the run is left alone."""
SPOILED_AT_ONCE = 12
PATIENCE_S = 300.0
"""A run that is left alone and not done by then counts as stalled."""
KILLS = ("actor", "all actors", "node", "driver SIGKILL", "driver SIGTERM", "driver SIGINT")
DRIVER_SIGNALS = {
    "driver SIGKILL": signal.SIGKILL,
    "driver SIGTERM": signal.SIGTERM,
    "driver SIGINT": signal.SIGINT,
}


@dataclass
class Score:
    """What was done to the runs, and what became of them."""

    rounds: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    damages: Counter[str] = field(default_factory=Counter)
    set_aside: int = 0
    identical: int = 0
    failures: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, for a table."""
        return [
            ("rounds", str(self.rounds)),
            ("kills", str(self.kills.total())),
            *((f"  {kind}", str(count)) for kind, count in sorted(self.kills.items())),
            ("fragments damaged", str(self.damages.total())),
            *((f"  {kind.replace('_', ' ')}", str(count)) for kind, count in sorted(self.damages.items())),
            ("fragments set aside by runs", str(self.set_aside)),
            ("archives identical to the undisturbed run's", f"{self.identical} of {self.rounds}"),
            ("failures", "; ".join(self.failures) or "none"),
        ]


class Chaos:
    """A cluster to be mistreated, and the archive that every run must end in."""

    def __init__(self, checkpoint: Path, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.checkpoint = checkpoint
        self.score = Score()
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.workers = [self.cluster.add_node(num_cpus=1) for _ in range(WORKERS)]
        ray.init(address=self.cluster.address, log_to_driver=False)
        try:
            self.expected = self._undisturbed(seed=42)
            self._undisturbed(seed=7)
            self.foreign = next((folder / "undisturbed-7" / "fragments").iterdir())
        finally:
            ray.shutdown()

    def _undisturbed(self, seed: int) -> bytes:
        output = self.folder / f"undisturbed-{seed}"
        run(small(self.checkpoint, output, seed=seed, progress="none", **FLAGS))
        return (output / ARCHIVE).read_bytes()

    def close(self) -> None:
        self.cluster.shutdown()

    def round(self) -> None:
        """One run, disturbed and given again until it ends."""
        output = self.folder / f"round-{self.score.rounds}"
        self.score.rounds += 1
        left = self.chance.randrange(1, DISTURBANCES + 1)
        while True:
            driver = self._start(output)
            codes = {0}
            while left and driver.poll() is None:
                self._wait_a_little(driver, output)
                if driver.poll() is not None:
                    break
                left -= 1
                kind = self.chance.choice(KILLS)
                self._spoil(output)
                self._kill(kind, driver)
                if kind in DRIVER_SIGNALS:
                    number = DRIVER_SIGNALS[kind]
                    codes = {0, 128 + number, -number}  # the last before it listens, and of SIGKILL
                    break
            code = self._wait(driver)
            if code == 0:
                break
            if code not in codes:
                self.score.failures.append(f"round {self.score.rounds}: exit code {code}: {self._said(output)}")
                return
            self._spoil(output)
        self.score.set_aside += len(list((output / "rejected").glob("*.reason.txt")))
        if (output / ARCHIVE).read_bytes() == self.expected:
            self.score.identical += 1
            shutil.rmtree(output)
        else:
            self.score.failures.append(f"round {self.score.rounds}: another archive")

    def _start(self, output: Path) -> subprocess.Popen[bytes]:
        request = small(self.checkpoint, output, address=self.cluster.address, progress="log", **FLAGS)
        with (self.folder / f"{output.name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_sampler", "sample", *flags_of(request)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _said(self, output: Path) -> str:
        return (self.folder / f"{output.name}.log").read_text(errors="replace").strip().splitlines()[-1][:300]

    def _wait_a_little(self, driver: subprocess.Popen[bytes], output: Path) -> None:
        """Up to the next disturbance: anywhere from the driver's first second to the middle of sampling."""
        until = time.monotonic() + self.chance.uniform(0.5, 4)
        early = self.chance.random() < 0.2
        while driver.poll() is None and (time.monotonic() < until or not (early or self._samples(output))):
            time.sleep(0.05)

    def _samples(self, output: Path) -> bool:
        return any((output / "fragments").glob("*.parquet"))

    def _wait(self, driver: subprocess.Popen[bytes]) -> int:
        try:
            return driver.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            driver.kill()
            driver.wait()
            return 1000

    def _spoil(self, output: Path) -> None:
        folder = output / "fragments"
        if folder.exists():
            count = self.chance.randrange(SPOILED_AT_ONCE + 1)
            self.score.damages.update(spoil(folder, self.foreign, count, self.chance))

    def _kill(self, kind: str, driver: subprocess.Popen[bytes]) -> None:
        if kind in DRIVER_SIGNALS:
            os.kill(driver.pid, DRIVER_SIGNALS[kind])
        elif kind == "node":
            node = self.workers.pop(self.chance.randrange(len(self.workers)))
            self.cluster.remove_node(node, allow_graceful=False)
            self.workers.append(self.cluster.add_node(num_cpus=1))
        else:
            actors = self._actors()
            for pid in actors if kind == "all actors" else actors[:1]:
                os.kill(pid, signal.SIGKILL)
            if not actors:
                return
        self.score.kills[kind] += 1

    def _actors(self) -> list[int]:
        """Process ids of the actors on this cluster's nodes, in an order of chance."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if "SamplerActor" in process.name() or "SamplerActor" in " ".join(process.cmdline()[:1]):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        self.chance.shuffle(found)
        return found
