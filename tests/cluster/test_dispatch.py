"""Shards on their way to actors and back: none is lost, none is counted twice, and hopeless ones are given up."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from ray_sampler.cluster import dispatch
from ray_sampler.cluster.dispatch import Dispatch, Tally
from ray_sampler.cluster.members import ATTEMPTS, DEATHS, START_FAILURES
from ray_sampler.cluster.metrics import DriverMetrics
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.shards import tasks_of
from ray_sampler.cluster.worker import Task
from ray_sampler.errors import RunError
from ray_sampler.reporting.progress import Snapshot

pytestmark = pytest.mark.usefixtures("local_ray")

SHARDS = [Task(0, i, i + 8) for i in range(0, 48, 8)]

Script = Mapping[int, Sequence[str]]
"""What happens at each attempt at the shard that starts there: ok, die, raise, slow, hang, or join, which waits until
there is another actor; ok after the last one."""


def scripted_actor(folder: Path, script: Script, starts: Sequence[str], seconds: float) -> type:
    """A class like Worker that does what it is told. It is made here so that Ray ships it with the call."""

    class Scripted:
        def __init__(self) -> None:
            import threading

            self.computing = threading.Lock()

        def attempt(self, what: str) -> int:
            """How often this was called before, by whatever actor."""
            for n in range(1000):
                try:
                    (folder / f"{what}.{n}").touch(exist_ok=False)
                except FileExistsError:
                    continue
                return n
            raise AssertionError(what)

        def act(self, what: str, script: Sequence[str]) -> None:
            import os

            n = self.attempt(what)
            told = folder / "refused"
            match script[n] if n < len(script) else "ok":
                case "full" if told.exists():
                    from ray_sampler.storage.store import NoRoom

                    raise NoRoom("cannot write there: the disk is full")
                case "refused" if told.exists():
                    from ray_sampler.errors import RequestError

                    raise RequestError("cannot write there: permission denied")
                case "die":
                    os._exit(1)
                case "raise":
                    raise RuntimeError(f"no luck with {what}")
                case "hang":
                    time.sleep(600)
                case "join":
                    while not (folder / "start.1").exists():
                        time.sleep(0.05)
                case "slow":
                    time.sleep(1.5)

        def start(self) -> Any:
            self.act("start", starts)
            return SimpleNamespace(node_id=ray.get_runtime_context().get_node_id(), device="cpu", said=())

        def evaluations(self) -> int:
            return 0

        def work(self, packed: list[Any]) -> Any:
            start = packed[1]
            with self.computing:
                time.sleep(seconds)
                self.act(f"shard-{start}", script.get(start, ()))
            return SimpleNamespace(compute_s=1.0, upload_s=0.0, said=())

    return Scripted


class Listener:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.snapshots: list[Snapshot] = []

    def update(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def message(self, text: str, level: str = "info") -> None:
        self.messages.append(text)


class Story:
    """A dispatch of SHARDS to scripted actors, and what came of it."""

    def __init__(
        self,
        folder: Path,
        script: Script,
        starts: Sequence[str] = (),
        max_actors: int = 2,
        shard_timeout: float = 600.0,
        seconds: float = 0.0,
        late: Iterator[list[Task]] | None = None,
        cpus: int = 1,
    ) -> None:
        actor: Any = ray.remote(scripted_actor(folder, script, starts, seconds)).options(
            num_cpus=cpus, max_concurrency=10
        )
        self.pool = Pool(actor.remote, Fleet(0, cpus, max_actors), shard_timeout)
        self.tally = Tally(num_samples=48, reused=0)
        self.listener = Listener()
        self.results: list[int] = []

        def background() -> list[Task] | None:
            return None if late is None else next(late, None)

        self.dispatch = Dispatch(
            self.pool,
            SHARDS,
            [self.tally],
            self.listener,
            self.finished,
            background,
            1,
            DriverMetrics("a test"),
        )

    def finished(self, task: Task, result: Any) -> None:
        self.results.append(task.start)

    def run(self) -> dict[Task, str]:
        try:
            return self.dispatch.run()
        finally:
            self.pool.close()


def test_every_shard_is_finished_once(tmp_path):
    story = Story(tmp_path, {})
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert story.tally.rates.done == 48
    assert story.tally.failures == story.tally.retries == 0


def test_the_shards_of_a_dead_actor_go_to_others(tmp_path):
    story = Story(tmp_path, {8: ["die"], 24: ["die", "die"]})
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert story.tally.failures >= 2  # the run may end before it hears of a death beside a copy that came through
    assert any("lost an actor" in text for text in story.listener.messages)


def test_a_shard_that_kills_every_actor_is_given_up_and_the_others_are_kept(tmp_path):
    story = Story(tmp_path, {16: ["die"] * 100})
    given_up = story.run()
    assert list(given_up) == [Task(0, 16, 24)]
    assert sorted(story.results) == [0, 8, 24, 32, 40]
    assert DEATHS <= len(list(tmp_path.glob("shard-16.*"))) <= DEATHS + 1  # two actors may be at it when it is given up


def test_a_shard_that_fails_by_itself_is_tried_again(tmp_path):
    story = Story(tmp_path, {8: ["raise"] * (ATTEMPTS - 1)}, max_actors=1)  # a second might be at a copy already
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert story.tally.retries == ATTEMPTS - 1


def test_a_shard_that_always_fails_is_given_up_with_its_reason_and_the_others_are_kept(tmp_path):
    story = Story(tmp_path, {8: ["raise"] * 100}, max_actors=1)  # a second might be at a copy already
    assert story.run() == {Task(0, 8, 16): "no luck with shard-8"}
    assert sorted(story.results) == [0, 16, 24, 32, 40]
    assert len(list(tmp_path.glob("shard-8.*"))) == ATTEMPTS


@pytest.mark.parametrize(("answer", "said"), [("full", "the disk is full"), ("refused", "permission denied")])
def test_an_output_that_takes_nothing_for_long_ends_the_run_and_is_told_once(tmp_path, monkeypatch, answer, said):
    monkeypatch.setattr(dispatch, "REFUSED_S", 1.0)
    (tmp_path / "refused").touch()
    story = Story(tmp_path, {shard.start: [answer] * 1000 for shard in SHARDS}, max_actors=1, seconds=0.01)
    with pytest.raises(RunError, match=f"^cannot write there: {said}$"):
        story.run()
    assert sum(said in text for text in story.listener.messages) == 1


def test_an_output_that_takes_something_again_loses_no_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "REFUSED_S", 300.0)
    (tmp_path / "refused").touch()
    story = Story(tmp_path, {shard.start: ["full"] * 1000 for shard in SHARDS}, max_actors=1, seconds=0.01)

    def make_room(failures: int) -> None:
        if failures > 2 * ATTEMPTS * len(SHARDS):
            (tmp_path / "refused").unlink(missing_ok=True)

    story.dispatch.background = lambda: make_room(story.tally.failures)
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert len(list(tmp_path.glob("start.*"))) == 1  # nor is the actor blamed


def test_actors_that_never_start_stop_the_run_with_the_cause(tmp_path):
    story = Story(tmp_path, {}, starts=["raise"] * 100, max_actors=1)
    with pytest.raises(RunError, match=r"3 actors in a row could not start.*no luck with start"):
        story.run()
    assert len(list(tmp_path.glob("start.*"))) == START_FAILURES


def test_an_actor_that_does_not_start_is_replaced(tmp_path):
    story = Story(tmp_path, {}, starts=["raise", "die"], max_actors=1)
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]


def test_a_silent_actor_is_replaced_after_the_shard_timeout(tmp_path):
    story = Story(tmp_path, {16: ["hang"]}, max_actors=1, shard_timeout=4.0)
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert any("no sign of progress" in text for text in story.listener.messages)


def test_a_straggling_shard_is_computed_by_another_actor_too_and_counted_once(tmp_path):
    story = Story(tmp_path, {8: ["hang"]}, seconds=0.1)
    began = time.monotonic()
    assert story.run() == {}
    assert time.monotonic() - began < 300
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert story.tally.rates.done == 48
    assert story.tally.failures == 0


def test_a_shard_that_waited_behind_a_slow_one_is_not_computed_again_and_again(tmp_path):
    # Two actors compute the slow shard; the third one takes over the shard that waits behind it, and is idle then.
    story = Story(tmp_path, {0: ["slow", "slow"]}, max_actors=3, seconds=0.05, cpus=0)
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert story.tally.rates.done == max(s.finished for s in story.listener.snapshots) == 48
    assert max(len(list(tmp_path.glob(f"shard-{shard.start}.*"))) for shard in SHARDS) <= 2


def test_shards_that_turn_up_while_sampling_runs_are_computed_too(tmp_path):
    story = Story(tmp_path, {}, late=iter([[], [Task(0, 48, 56)]]))
    assert story.run() == {}
    assert sorted(story.results) == [*(shard.start for shard in SHARDS), 48]


def test_more_actors_than_there_is_room_for_are_asked_for_and_pend(tmp_path):
    story = Story(tmp_path, {0: ["join"]}, max_actors=3, seconds=1.2)
    assert story.run() == {}
    assert sorted(story.results) == [shard.start for shard in SHARDS]
    assert any(s.actors_pending == 1 and s.actors_ready == 2 for s in story.listener.snapshots)


RANGES = st.lists(st.integers(0, 300), max_size=10, unique=True).map(
    lambda ends: list(zip(sorted(ends)[::2], sorted(ends)[1::2], strict=False))
)
"""Missing ranges: sorted, without overlap."""


@given(RANGES, st.integers(1, 20))
def test_shards_make_up_the_missing_ranges_and_never_cross_a_multiple_of_the_shard_size(ranges, size):
    shards = list(tasks_of(ranges, size))
    assert [i for shard in shards for i in range(shard.start, shard.stop)] == [
        i for start, stop in ranges for i in range(start, stop)
    ]
    assert all(shard.start // size == (shard.stop - 1) // size for shard in shards)
