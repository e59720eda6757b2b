"""Ray is found, started or refused as the request says; actors share a machine fairly."""

from __future__ import annotations

import psutil
import pytest
import ray

from ray_sampler.cluster.session import Fleet, check_own, gpus_per_actor, joins_cluster, plan_fleet
from ray_sampler.config import FleetOptions, RunConfig
from ray_sampler.errors import RequestError

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.mark.parametrize(
    ("max_actors", "shards", "local", "fleet"),
    [
        (None, 100, True, Fleet(0, 1, 2)),  # an actor a core
        (1, 100, True, Fleet(0, 2, 1)),  # one actor has both cores
        (8, 100, True, Fleet(0, 1, 2)),  # no more than there are cores
        (None, 1, True, Fleet(0, 1, 1)),
        (None, 100, False, Fleet(0, 1, 100)),  # a cluster may grow
        (8, 100, False, Fleet(0, 1, 8)),
        (1, 100, False, Fleet(0, 1, 1)),  # others may hold its other cores
    ],
)
def test_cpu_actors_split_the_two_cores_of_a_machine_fairly(max_actors, shards, local, fleet):
    assert plan_fleet(FleetOptions(max_actors=max_actors), 0.0, shards, local) == fleet


def test_gpu_actors_of_a_cluster_may_pend(local_ray):
    assert plan_fleet(FleetOptions(), 1.0, 50, local=False) == Fleet(1.0, 1, 50)
    assert plan_fleet(FleetOptions(max_actors=4), 0.5, 50, local=False) == Fleet(0.5, 1, 4)


def test_gpus_are_used_where_there_are_some_unless_the_request_says_otherwise():
    assert gpus_per_actor(FleetOptions()) == (1.0 if ray.cluster_resources().get("GPU") else 0.0)
    assert gpus_per_actor(FleetOptions(gpus_per_actor=0.5)) == 0.5


def test_a_started_ray_is_joined():
    assert joins_cluster(None)


def test_a_ray_of_our_own_is_reachable_from_this_machine_only():
    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"
    listening = [
        each.laddr.ip
        for process in psutil.Process().children(recursive=True)
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    assert listening


@pytest.mark.parametrize("gpus", [1, 2, 0.6])
def test_gpus_that_cannot_come_to_our_own_ray_are_a_wrong_request(gpus: float, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(RequestError, match="this machine has 0 usable GPUs"):
        check_own(RunConfig(gpus_per_actor=gpus))
    with pytest.raises(RequestError, match="Ray finds 0 GPUs"):  # where torch sees one and Ray does not
        plan_fleet(RunConfig(gpus_per_actor=gpus), gpus, 10, local=True)
    assert plan_fleet(RunConfig(gpus_per_actor=gpus), gpus, 10, local=False).max_actors == 10


@pytest.mark.parametrize(("gpus", "there", "actors"), [(0.6, 2, 2), (0.5, 2, 4), (1, 3, 3), (2, 5, 2), (0.3, 1, 3)])
def test_a_fraction_of_a_gpu_lies_on_one_card(gpus: float, there: int, actors: int, monkeypatch):
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": float(there), "CPU": 8.0})
    assert plan_fleet(RunConfig(), gpus, 100, local=True).max_actors == actors


def test_an_actor_has_the_cpus_that_are_asked_for():
    assert plan_fleet(RunConfig(cpus_per_actor=2), 0.0, 100, local=True) == Fleet(0, 2, 1)
    assert plan_fleet(RunConfig(cpus_per_actor=1), 0.0, 100, local=True) == Fleet(0, 1, 2)
    assert plan_fleet(RunConfig(cpus_per_actor=3, max_actors=5), 0.0, 100, local=False) == Fleet(0, 3, 5)
    assert plan_fleet(RunConfig(cpus_per_actor=4), 1.0, 100, local=False) == Fleet(1.0, 4, 100)
    with pytest.raises(RequestError, match="--cpus_per_actor is 100000"):
        check_own(RunConfig(cpus_per_actor=100_000))
    with pytest.raises(RequestError, match="--cpus_per_actor is 0"):
        RunConfig(cpus_per_actor=0).check()
