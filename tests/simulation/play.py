"""A run's dispatch, pool and inventory, as they are, on the cluster of a seed, and what became of every shard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import ray

from ray_sampler.cluster import dispatch, inventory
from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.driver import REPAIR_ROUNDS
from ray_sampler.cluster.inventory import Inventory
from ray_sampler.cluster.members import Event, Finished, Member
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import Task, TaskResult
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import Snapshot
from ray_sampler.storage.archive import DamagedPiece
from ray_sampler.storage.ranges import Checked, Listing
from ray_sampler.storage.record import FragmentName
from tests.simulation.cluster import Ref
from tests.simulation.ledger import SIZE, Broken, Ledger
from tests.simulation.storm import FINGERPRINT, Interrupted, Settings, Storm, record_of

SHARD_TIMEOUT_S = 600.0

REPLACE_S = 5e-6
"""What looking for the gaps that damaged files leave is said to take for each file."""

SAFEGUARDS = ("requeue", "duplicate", "forget")


@dataclass
class Outcome:
    """What became of a simulated run."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind; those that hit something."""
    finished: int = 0
    lost: int = 0
    duplicated: int = 0
    given_up: int = 0
    virtual_seconds: float = 0.0
    driver_seconds: float = 0.0
    """Processor time of the driver's own code."""
    peak_memory: float = 0.0
    """Of the process, in MiB."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why shards were given up."""
    broken: str | None = None
    """The invariant that does not hold, if one does not."""

    def as_json(self) -> dict[str, Any]:
        return {
            "kills": dict(sorted(self.kills.items())),
            "lost": self.lost,
            "duplicated": self.duplicated,
            "given_up": self.given_up,
            "virtual_seconds": round(self.virtual_seconds, 3),
            "driver_seconds": round(self.driver_seconds, 1),
            "peak_memory": round(self.peak_memory),
        }


class Timed(Storm):
    """A storm that counts the time which the driver takes between its calls.

    By a clock that costs nothing: a question for processor time may take longer than what it measures.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.driver_s = 0.0
        self.returned: float | None = None

    def wait(self, refs: Collection[Ref], timeout: float) -> list[Ref]:
        if self.returned is not None:
            self.driver_s += time.perf_counter() - self.returned
        if timeout:
            self.turn()
        done = super().wait(refs, timeout)
        self.returned = time.perf_counter()
        return done


class Files:
    """The folder of fragments, as the inventory sees it."""

    folder, holds = "fragments", dict[str, None]()

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def list(self) -> Listing:
        return Listing([], [], {})

    def noted(self) -> dict[FragmentName, str]:
        return {}

    def reject(self, filename: str, reason: str) -> None:
        name = FragmentName.parse(filename)
        assert name
        self.ledger.rejected(name.start // SIZE)


class Bookkeeping(Inventory):
    """An inventory for which looking for gaps takes time, by the virtual clock too."""

    storm: Timed

    def _replace(self, product: str, shelf: Any, found: Any) -> list[Task]:
        self.storm.clock += REPLACE_S * len(shelf.names) if found else 0.0
        return super()._replace(product, shelf, found)


class Mute:
    """A reporter that counts."""

    def __init__(self) -> None:
        self.messages = 0

    def update(self, snapshot: Snapshot) -> None:
        pass

    def message(self, text: str, level: str = "info") -> None:
        self.messages += 1


class Losing(Dispatch):
    """Without a safeguard: what failed, or was lost with its actor, is not queued again."""

    def _return(self, shard: Task, *, front: bool, give_up: str | bool) -> None:
        super()._return(shard, front=front, give_up=give_up)
        if shard in self.queue:
            self.queue.remove(shard)


class Doubling(Dispatch):
    """Without a safeguard: each answer counts, also one for a shard that is finished already."""

    def _handle(self, event: Event) -> None:
        if isinstance(event, Finished) and not self.copies[event.task]:
            self.finished(event.task, event.result)
        super()._handle(event)


class Believing(Pool):
    """Without a safeguard: it passes on what came late or twice."""

    def wait(self, timeout: float, others: Collection[Any] = ()) -> list[Event]:
        events = super().wait(timeout, others)
        unasked = cast(Timed, self.calls).unasked
        return [*events, *(unasked.popleft() for _ in range(len(unasked)))]


class Forgetting(Pool):
    """Without a safeguard: an actor that is taken back is forgotten, and not ended."""

    def remove(self, member: Member) -> None:
        with patch.object(self.calls, "kill"):
            super().remove(member)


class Checks:
    """Tasks that check files, as Ray would carry them out."""

    def __init__(self, storm: Timed) -> None:
        self.storm = storm

    def options(self, **_: Any) -> Any:
        return SimpleNamespace(remote=self._remote)

    def _remote(self, output: str, fingerprint: str, names: Sequence[FragmentName], *_: Any) -> Ref:
        ref = Ref()

        def done() -> None:
            damaged = [name for name in names if name.start // SIZE in self.storm.ledger.damaged]
            records = {name: record_of(name.start, name.stop) for name in names if name not in damaged}
            self.storm.resolve(ref, Checked(records, [(name, "its CRC-32 is wrong") for name in damaged], []))

        self.storm.later(self.storm.clock + self.storm.chance.uniform(0.1, 1.0), done)
        return ref


@contextmanager
def without_ray(storm: Timed) -> Iterator[None]:
    """Let what asks Ray beside the pool's calls ask the simulated cluster."""

    def there(refs: Sequence[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.at <= storm.clock], [ref for ref in refs if ref.at > storm.clock]

    fake = SimpleNamespace(wait=there, get=storm.get, exceptions=ray.exceptions)
    with ExitStack() as patches:
        for module, name, value in (
            (inventory, "ray", fake),
            (inventory, "check_task", Checks(storm)),
            (inventory, "beside_driver", lambda: None),
            (inventory, "time", SimpleNamespace(monotonic=storm.now)),
            (dispatch, "why_unplaced", lambda fleet: "nothing is free"),
        ):
            patches.enter_context(patch.object(module, name, value))
        yield


class Simulation:
    """One run on the cluster of a seed; as `driver.Filling` it samples, merges and repairs."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.storm = settings, Timed(settings)
        self.listener = Mute()
        num_samples = settings.shards * SIZE
        files = Files(self.storm.ledger)
        job = SimpleNamespace(
            run_dir=SimpleNamespace(ranges=lambda *_: files, url="a simulated run"),
            output="",
            fingerprint=FINGERPRINT,
            config=SimpleNamespace(given={"shard_size"}, shard_size=SIZE),
            num_samples=num_samples,
            products={},
            overwrite=False,
        )
        self.inventory = Bookkeeping(cast(Any, job), self.listener)
        self.inventory.storm = self.storm
        self.tally = Tally(num_samples, reused=0)
        self.given_up: dict[int, str] = {}
        self.kept = False
        """Whether a dispatch that was through remembered shards."""

    def run(self) -> Outcome:
        began, computing = time.perf_counter(), time.thread_time()
        outcome = Outcome()
        try:
            with without_ray(self.storm):
                self._fill()
                self._settle(outcome)
        except Broken as broken:
            outcome.broken = str(broken)
        outcome.kills = self.storm.hits
        outcome.duplicated = max(outcome.duplicated, self.storm.ledger.duplicated)
        outcome.virtual_seconds = self.storm.clock
        share = self.storm.driver_s / (time.perf_counter() - began)
        outcome.driver_seconds = share * (time.thread_time() - computing)
        outcome.peak_memory = peak_memory()
        return outcome

    def _fill(self) -> None:
        """Sample and merge until the archive is whole, or the run stops."""
        stopped = None
        for _ in range(REPAIR_ROUNDS + 1):
            tasks = self.inventory.tasks()
            if tasks or self.inventory.unchecked():
                stopped = self._sample(tasks)
            if stopped or self.given_up:
                break
            damaged = next((p for p in self.inventory.fragments.cover() if self._is_damaged(p.fragment)), None)
            if damaged is None:
                return
            self.inventory.repair(DamagedPiece(damaged.fragment, "its CRC-32 is wrong", False, False))
        if stopped:
            for start, stop in self.inventory.missing():
                self.given_up |= dict.fromkeys(range(start // SIZE, stop // SIZE), stopped) | self.given_up

    def _is_damaged(self, name: FragmentName) -> bool:
        return name.start // SIZE in self.storm.ledger.damaged

    def _sample(self, tasks: list[Task]) -> str | None:
        """Carry out tasks; returns why the run stopped, if it did."""
        storm, broken = self.storm, self.settings.broken
        make_pool = {"forget": Forgetting, "duplicate": Believing}.get(broken or "", Pool)
        make_dispatch = {"requeue": Losing, "duplicate": Doubling}.get(broken or "", Dispatch)
        fleet = Fleet(0, 1, min(self.settings.actors, len(tasks) or 1))
        pool = make_pool(storm.start, fleet, SHARD_TIMEOUT_S, cast(Any, storm))
        pool.tracebacks = cast(Any, SimpleNamespace(keep=lambda error: None))  # very many, of no interest
        quiet = SimpleNamespace(retries=SimpleNamespace(inc=lambda: None), fleet=lambda *_: None)
        driver = storm.driver = make_dispatch(
            pool,
            tasks,
            [self.tally],
            self.listener,
            self._finished,
            self.inventory.check_some,
            0,
            cast(Any, quiet),
            lambda: list(self.inventory.checking),
        )
        tasks.clear()
        try:
            driver.run()
        except RunError as error:
            return str(error)
        except Interrupted:
            return "no machine came any more, and the run was interrupted"
        finally:
            pool.close()
            self.given_up |= {task.start // SIZE: reason for task, reason in driver.given_up.items()}
        if storm.actors:
            raise Broken(f"no actor left: {len(storm.actors)} live when the run is over")
        self.kept |= bool(driver.suspects or driver.queue or driver.copies)
        return None

    def _finished(self, task: Task, result: TaskResult) -> None:
        assert result.record
        self.storm.ledger.count(task)
        self.inventory.add(result.name, result.record)

    def _settle(self, outcome: Outcome) -> None:
        """Look at the archive, index by index. Raises Broken: one is lost, or there twice."""
        reached = 0
        ledger = self.storm.ledger
        for piece in self.inventory.fragments.cover():
            outcome.duplicated += piece.start < reached
            reached = piece.stop
            shard = piece.start // SIZE
            outcome.finished += 1
            if not ledger.written[shard] or shard in self.given_up:
                raise Broken(f"no index lost: shard {shard} is in the archive, and was not written or is given up")
        outcome.given_up = len(self.given_up)
        outcome.reasons = Counter(self.given_up.values())
        outcome.lost = self.settings.shards - outcome.finished - outcome.given_up
        outcome.duplicated += ledger.duplicated
        if outcome.lost:
            raise Broken(f"no index lost: {outcome.lost} shards are neither finished nor given up")
        if outcome.duplicated:
            raise Broken(f"no index written twice: {outcome.duplicated} shards were counted more than once")
        if not all(self.given_up.values()):
            raise Broken("every shard finished or reported with a reason: one was given up without")
        if self.kept:
            raise Broken("bounded driver memory: shards are kept when the run is over")


def peak_memory() -> float:
    """Of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
