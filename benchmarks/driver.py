"""What does the driver cost: shards a second with a null engine, and memory and time for a million shards?

Ours is the dispatch as a run does it, with its inventory of fragments; theirs is a bare ray.wait loop over the same two
actors, with as many shards in flight. The million is driven in a separate process, whose actors answer at once from
within it: what is left is what the driver itself takes. The resumed run finds 990,000 fragments in a real directory.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray

from ray_sampler.cluster.calls import RayCalls
from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.members import Finished
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.shards import tasks_of
from ray_sampler.cluster.tasks import pack_pieces
from ray_sampler.cluster.worker import CONCURRENCY, Task, TaskResult, WorkerInfo
from ray_sampler.reporting.progress import Snapshot
from ray_sampler.reporting.sheet import PreviewKeeper
from ray_sampler.storage.record import LABEL, Column, FragmentName, Record
from ray_sampler.storage.run_dir import RunDir
from table import Goal, Row, in_turn, parser, report

ACTORS, IN_FLIGHT = 2, 2
SHARD = 512
SHARDS = 4_000
MILLION, LEFT = 1_000_000, 10_000
FINGERPRINT = "ab" * 32


COLUMNS = {"image": Column("uint8", (64, 64, 3)), "label": LABEL}


def result_of(start: int, stop: int) -> TaskResult:
    """What an actor says of a shard of labelled images."""
    crc32 = {column: start * 7919 % 2**32 + i for i, column in enumerate(("image", "index", "label", "label_int64"))}
    made = {"numerics_key": "a CPU, torch, batch 64, fp32", "device": "a CPU", "host": "here", "seconds": 0.0}
    record = Record(FINGERPRINT, start, stop, COLUMNS, crc32, made)
    return TaskResult(FragmentName(start, stop, "parquet"), record, 0.0, 0.0, 0.0)


class NullActor:
    """As Worker, without an engine or a store."""

    def start(self) -> WorkerInfo:
        return WorkerInfo(ray.get_runtime_context().get_node_id(), 0, "a CPU", "a key")

    def work(self, packed: list[Any]) -> TaskResult:
        task = Task(*packed)
        return result_of(task.start, task.stop)


class Silent:
    """A reporter that shows nothing."""

    def update(self, snapshot: Snapshot) -> None:
        pass

    def message(self, text: str, level: str = "info") -> None:
        print(text, file=sys.stderr)


def job_in(folder: Path, shards: int) -> Any:
    """As much of a job as its bookkeeping reads."""
    named = {"run_dir": RunDir(str(folder)), "output": str(folder), "fingerprint": FINGERPRINT}
    config = SimpleNamespace(shard_size=SHARD)
    return SimpleNamespace(**named, config=config, num_samples=shards * SHARD, products={}, overwrite=False)


SETTINGS = {"model": "a run", "sampler": "heun", "steps": 18, "seed": 42}


class Bookkeeping:
    """What a run keeps of its fragments."""

    def __init__(self, job: Any) -> None:
        self.job = job
        num_samples = job.num_samples
        self.inventory = Inventory(job, Silent())
        self.tally = Tally(num_samples, reused=num_samples - sum(b - a for a, b in self.inventory.missing()))
        self.preview = PreviewKeeper(job.run_dir, FINGERPRINT, num_samples, SETTINGS, self.inventory.fragments.names)
        self.shards = list(tasks_of(self.inventory.missing(), SHARD))

    def dispatch(self, pool: Any) -> float:
        """Shards a second, from the first one given out to the last one back."""
        metrics = DriverMetrics("benchmark")
        background = self.inventory.check_some

        def finished(task: Task, result: TaskResult) -> None:
            assert result.record
            self.inventory.add(result.name, result.record)

        Dispatch(pool, self.shards, [self.tally], Silent(), finished, background, ACTORS, metrics).run()
        first, last = self.tally.first_shard, self.tally.last_sample
        assert first
        assert last
        return len(self.shards) / (last - first)


def ours(handles: list[Any]) -> float:
    waiting = list(handles)
    with tempfile.TemporaryDirectory() as folder:
        books = Bookkeeping(job_in(Path(folder), SHARDS))
        rate = books.dispatch(Pool(waiting.pop, Fleet(0, 1, ACTORS), 600.0))
        books.preview.close()
    return rate


def theirs(handles: list[Any]) -> float:
    queue = deque(Task(0, i * SHARD, (i + 1) * SHARD) for i in range(SHARDS))
    began = time.perf_counter()
    owners = {handle.work.remote(list(queue.popleft())): handle for handle in handles for _ in range(IN_FLIGHT)}
    results = 0
    while owners:
        (ref,), _ = ray.wait(list(owners), num_returns=1)
        handle = owners.pop(ref)
        results += isinstance(ray.get(ref), TaskResult)
        if queue:
            owners[handle.work.remote(list(queue.popleft()))] = handle
    assert results == SHARDS
    return SHARDS / (time.perf_counter() - began)


class ScriptedPool:
    """As Pool, with actors within this process that answer at once."""

    def __init__(self) -> None:
        self.fleet, self.calls = Fleet(0, 1, ACTORS), RayCalls()
        self.ready = self.members = [None] * ACTORS
        self.given: deque[Task] = deque()

    def assign(self, queue: deque[Task], alone: object) -> list[Task]:
        given = [queue.popleft() for _ in range(min(len(queue), ACTORS * IN_FLIGHT - len(self.given)))]
        self.given += given
        return given

    def wait(self, timeout: float, others: object = ()) -> list[Finished]:
        return [Finished(shard, result_of(shard.start, shard.stop)) for shard in (self.given.popleft(),)]

    def idle(self) -> list[None]:
        return []

    def busy(self) -> int:
        return ACTORS

    def in_flight(self) -> int:
        return len(self.given)

    def pending(self) -> int:
        return 0

    def scale(self, wanted: int, keep: int) -> None:
        pass

    def unplaced_s(self) -> float:
        return 0.0

    def look_around(self) -> None:
        pass

    def release_idle(self, keep: int) -> None:
        pass


def memory_mib(field: str) -> float:
    """VmRSS or VmHWM, its peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def drive_here(folder: Path) -> None:
    """Drive a million shards, less those in `folder`, and print what it took."""
    before, began = memory_mib("VmRSS"), time.perf_counter()
    books = Bookkeeping(job_in(folder, MILLION))
    planned = time.perf_counter()
    inventory = books.inventory
    # Checking a million fragments is the cluster's work; what is known of them afterwards is the driver's.
    names, inventory.fragments.to_check = inventory.fragments.to_check, []
    for name in names:
        record = result_of(name.start, name.stop).record
        assert record
        inventory.add(name, record)
    checked = time.perf_counter()
    books.dispatch(ScriptedPool())
    assert not inventory.unchecked()
    assert not inventory.missing()
    packed = pack_pieces(inventory.fragments.cover(), inventory.fragments.known)
    parts = inventory.parts()
    ended = time.perf_counter()
    books.preview.close()
    assert packed
    assert len(parts) == 1
    growth = memory_mib("VmHWM") - before
    print(json.dumps({"planning": planned - began, "driving": ended - checked, "memory": growth}))


def drive(done: int) -> dict[str, float]:
    """A run of a million shards in a separate process, which finds the first `done` of them there."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        fragments = Path(name) / "fragments"
        fragments.mkdir()
        for i in range(done):
            (fragments / FragmentName(i * SHARD, (i + 1) * SHARD, "parquet").filename).touch()
        command = [sys.executable, __file__, "--drive", name]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--drive", type=Path, help="internal: drive a million shards in this folder")
    arguments = made.parse_args()
    if arguments.drive:
        drive_here(arguments.drive)
        return
    ray.init("local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    actor = ray.remote(NullActor).options(max_concurrency=CONCURRENCY)
    handles = [actor.remote() for _ in range(ACTORS)]
    theirs(handles)  # the first calls start the actors
    dispatched, waited = in_turn(5, lambda: ours(handles), lambda: theirs(handles))
    ray.shutdown()
    fresh, resumed = drive(0), drive(MILLION - LEFT)
    rows = [
        Row("shards dispatched, against ray.wait", dispatched, waited, "shards/s", Goal("at least", 0.9)),
        Row("a million shards: memory of the driver", (fresh["memory"],), (), "MiB", Goal("at most", 1024, "ours")),
        Row("a million shards: the driver's own time", (fresh["driving"],), (), "s"),
        Row("the same, 99% there: memory", (resumed["memory"],), (), "MiB", Goal("at most", 1024, "ours")),
        Row("the same, 99% there: planning", (resumed["planning"],), (), "s", Goal("at most", 5, "ours")),
    ]
    report(rows, [], arguments.json)


if __name__ == "__main__":
    main()
