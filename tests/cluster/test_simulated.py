"""What becomes of shards, actors and nodes when things go wrong, on a cluster by a virtual clock."""

from __future__ import annotations

import itertools
import socket
from collections import deque
from typing import Any

import pytest

from ray_sampler.cluster import calls, dispatch
from ray_sampler.cluster.worker import Task
from ray_sampler.errors import RunError
from ray_sampler.sampling.engine import NonFiniteError
from tests.cluster.simulated import Play
from tests.simulation.cluster import Actor, Ref, Simulated


def shards(count: int) -> list[Task]:
    return [Task(0, i, i + 8) for i in range(0, 8 * count, 8)]


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "why_unplaced", lambda fleet: "nothing is free")


def test_a_shard_that_kills_its_node_is_given_up_after_three_and_costs_no_other_shard() -> None:
    killer = Task(0, 16, 24)
    cluster = Simulated(2, lambda task, actor: "node dies" if task == killer else "ok", more=True)
    play = Play(cluster, shards(12), max_actors=2)
    assert list(play.run()) == [killer]
    assert sorted(play.finished) == [task for task in shards(12) if task != killer]
    # Twice while others still finish, and then three in a row.
    assert len(cluster.lost_nodes) <= 5


def test_a_suspect_waits_until_all_others_were_tried() -> None:
    killer = Task(0, 0, 8)
    cluster = Simulated(1, lambda task, actor: "die" if task == killer else "ok")
    play = Play(cluster, shards(10), max_actors=1)
    assert list(play.run()) == [killer]
    order = [task for _, task, _ in cluster.given]
    assert set(order[: order.index(killer, 1)]) == set(shards(10))
    assert order.count(killer) == 5


def test_nodes_that_go_by_themselves_cost_no_shard() -> None:
    numbers = itertools.count(1)
    cluster = Simulated(4, lambda task, actor: "node dies" if next(numbers) % 3 == 0 else "ok", more=True)
    play = Play(cluster, shards(200), max_actors=4)
    assert play.run() == {}
    assert sorted(play.finished) == shards(200)
    assert len(cluster.lost_nodes) > 60


@pytest.mark.parametrize("outcome", ["die", "node dies"])
def test_where_every_shard_kills_the_run_stops_soon(outcome: str) -> None:
    cluster = Simulated(2, lambda task, actor: outcome, more=True)
    with pytest.raises(RunError, match="25 actors died one after another with no shard finished between"):
        Play(cluster, shards(10_000), max_actors=2).run()
    assert len(cluster.asked) <= 60


def test_many_actors_that_are_lost_at_once_do_not_stop_the_run() -> None:
    cluster = Simulated(100, more=True, seconds=100.0)
    cluster.later(50.0, lambda: cluster.lose(*sorted(cluster.nodes)[:90]))
    play = Play(cluster, shards(400), max_actors=100)
    assert play.run() == {}
    assert len(play.finished) == 400


@pytest.mark.parametrize("outcome", [RuntimeError("no luck"), "die", "node dies"])
def test_three_starts_that_fail_with_nothing_finished_stop_the_run(outcome: Any) -> None:
    cluster = Simulated(1, starts=lambda node: outcome, more=True)
    with pytest.raises(RunError, match="3 actors in a row could not start; the last one said: "):
        Play(cluster, shards(10), max_actors=1).run()
    assert len(cluster.asked) == 3


def test_three_broken_machines_of_a_hundred_do_not_stop_a_run() -> None:
    broken = ("node 0", "node 1", "node 2")
    cluster = Simulated(100, starts=lambda node: RuntimeError("no driver") if node in broken else "ok", seconds=100.0)
    play = Play(cluster, shards(400), max_actors=100)
    assert play.run() == {}
    assert len(play.finished) == 400


def test_a_hundred_machines_that_are_all_broken_stop_it() -> None:
    cluster = Simulated(100, starts=lambda node: RuntimeError("no driver"))
    with pytest.raises(RunError, match="actors in a row could not start; the last one said: no driver"):
        Play(cluster, shards(400), max_actors=100).run()
    assert len(cluster.asked) == 100


def test_one_machine_on_which_every_shard_fails_does_not_stop_a_run_of_a_hundred() -> None:
    tried = itertools.count()

    def work(task: Task, actor: Actor) -> Any:
        return RuntimeError("a broken card") if actor.node == "node 5" and next(tried) < 14 else "ok"

    cluster = Simulated(100, work, seconds=10.0)
    play = Play(cluster, shards(400), max_actors=100)
    cluster.duration = lambda actor, task: 1.0 if actor.node == "node 5" else 1000.0  # type: ignore[method-assign]
    given_up = play.run()
    assert len(given_up) + len(play.finished) == 400
    assert next(tried) > 14


def test_an_actor_computes_others_where_the_next_shard_failed_on_it() -> None:
    cluster = Simulated(2)
    failed, other, *rest = shards(4)
    play = Play(cluster, [], max_actors=2)
    play.pool.scale(2, keep=2)
    while len(play.pool.ready) < 2:
        play.pool.wait(1.0)
    idle, busy = play.pool.ready
    for task in rest:
        play.pool.submit(busy, task)
    play.pool.shunned[failed] = idle
    assert play.pool.assign(deque([failed, other]), set()) == [other]


def test_actors_that_fall_with_one_node_before_they_start_are_one_failure() -> None:
    cluster = Simulated(8, more=True)
    cluster.later(2.0, lambda: cluster.lose(*cluster.nodes))
    play = Play(cluster, shards(40), max_actors=8)
    assert play.run() == {}


def test_starts_that_keep_failing_on_a_node_back_off_while_others_work() -> None:
    cluster = Simulated(2, starts=lambda node: RuntimeError("no driver") if node == "node 1" else "ok")
    play = Play(cluster, shards(200), max_actors=2)
    assert play.run() == {}
    assert cluster.clock > 1900
    assert len(cluster.asked) < 45  # a minute apart, in half an hour


def test_at_the_end_a_draining_actor_is_not_replaced() -> None:
    cluster = Simulated(3, more=True)

    def leave() -> None:
        cluster.leaving = {"node 0", "node 1"}

    cluster.later(6.0, leave)
    play = Play(cluster, shards(6), max_actors=3)
    assert play.run() == {}
    assert len(cluster.asked) == 3


def test_a_straggler_is_not_copied_to_a_node_that_is_about_to_go() -> None:
    late = Task(0, 0, 8)
    cluster = Simulated(2)
    play = Play(cluster, [late], max_actors=2)
    play.pool.scale(2, keep=2)
    while len(play.pool.ready) < 2:
        play.pool.wait(1.0)
    play.pool.submit(play.pool.ready[0], late)
    play.pool.durations.append(1.0)
    cluster.clock += 5.0
    assert play.pool.straggler({late: 1}, ()) == late
    assert len(play.pool.idle()) == 1
    cluster.leaving = {"node 1"}
    play.pool.look_around()
    assert play.pool.idle() == []


def test_idle_actors_go_while_old_fragments_are_checked_and_the_loop_waits_for_the_checks() -> None:
    cluster = Simulated(8)
    checks = [Ref(at=1000.0), Ref(at=2000.0)]
    turns = 0
    sizes: list[int] = []

    def background() -> list[Task] | None:
        nonlocal turns
        turns += 1
        if not play.dispatch.queue and not play.dispatch.copies:
            sizes.append(len(play.pool.members))
        open_ = [check for check in checks if check.at > cluster.clock]
        checks[:] = open_
        return [] if open_ else None

    play = Play(cluster, shards(40), max_actors=8, background=background, checks=lambda: checks)
    assert play.run() == {}
    assert cluster.clock >= 2000.0
    assert sizes[-1] == 1
    assert turns < 2200


def test_values_that_are_not_finite_are_computed_once_more_by_another_actor() -> None:
    broken, always = Task(0, 8, 16), Task(0, 24, 32)

    def work(task: Task, actor: Actor) -> Any:
        bad = task == always or (task == broken and actor is cluster.given[0][2])
        return NonFiniteError("NaN") if bad else "ok"

    for actors in (1, 3):
        cluster = Simulated(1, work) if actors == 1 else Simulated(3, work)
        play = Play(cluster, shards(6), max_actors=actors)
        assert play.run() == {always: "NaN"}
        assert broken in play.finished
        for task in (broken, always):
            tried = [actor for _, given, actor in cluster.given if given == task]
            assert len(tried) == len(set(tried)) <= 2
        assert len([given for _, given, _ in cluster.given if given == always]) == 2


@pytest.mark.parametrize("asked", [True, False])
def test_the_traceback_of_what_fails_on_an_actor_is_shown_where_it_is_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SAMPLER_DEBUG", "1" if asked else "")
    cluster = Simulated(1, lambda task, actor: ZeroDivisionError("of our own"))
    play = Play(cluster, shards(1), max_actors=1)
    assert list(play.run().values()) == ["of our own"]
    assert ("the actor's own traceback" in capsys.readouterr().err) == asked


def test_a_model_that_gives_nothing_but_nan_stops_the_run() -> None:
    cluster = Simulated(1, lambda task, actor: NonFiniteError("NaN"))
    with pytest.raises(RunError, match="shards failed 50 times and none was finished"):
        Play(cluster, shards(10_000), max_actors=1).run()


def test_what_is_to_be_done_before_the_first_shard_is_done_once_an_actor_is_ready() -> None:
    cluster = Simulated(2)
    done: list[tuple[float, int]] = []
    play = Play(cluster, shards(4), max_actors=2, on_ready=lambda: done.append((cluster.clock, len(cluster.given))))
    assert play.run() == {}
    assert done == [(5.0, 0)]
    failing = Play(
        Simulated(1, starts=lambda node: "die"), shards(4), max_actors=1, on_ready=lambda: done.append((0, 0))
    )
    with pytest.raises(RunError):
        failing.run()
    assert len(done) == 1


def test_where_all_pending_actors_are_is_one_question() -> None:
    cluster = Simulated(1)
    play = Play(cluster, shards(400), max_actors=100)
    play.pool.scale(100, keep=100)
    before = cluster.place_calls
    play.pool.look_around()
    assert (len(play.pool.members), cluster.place_calls - before) == (100, 1)


def test_whether_the_nodes_of_lost_actors_live_is_one_question() -> None:
    cluster = Simulated(50)
    play = Play(cluster, shards(400), max_actors=50)
    cluster.later(14.0, lambda: cluster.lose(*sorted(cluster.nodes)[:40]))
    cluster.later(14.0, lambda: setattr(cluster, "more", True))
    assert play.run() == {}
    assert cluster.dead_calls == 1


def test_only_addresses_that_accept_a_connection_are_of_nodes_that_live() -> None:
    with socket.create_server(("127.0.0.1", 0)) as living, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert calls.listening({"living": living.getsockname(), "closed": closed.getsockname()}) == {"living"}
    assert calls.listening({}) == set()
