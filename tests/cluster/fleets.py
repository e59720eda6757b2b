"""Ray clusters on this machine whose nodes come, freeze, drain and die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import node_ip_address_from_perspective  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster
from ray.experimental import internal_kv

from tests.cluster.processes import PATIENCE_S
from tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
STORE_BYTES = 100_000_000
NODE: dict[str, Any] = {
    "object_store_memory": STORE_BYTES,
    "node_ip_address": node_ip_address_from_perspective(None),
}
"""Where this process has a Ray on loopback, as the shared one, its nodes would be there, where drivers do not look."""

HEALTH = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4, "health_check_timeout_ms": 2000}
"""A node that does not answer counts as dead after some 10 s, a third of what Ray gives it."""

UNWATCHED = HEALTH | {"health_check_failure_threshold": 10_000}
"""A node that does not answer never counts as dead: what becomes of it is for others to find out."""

OPEN = {"RAY_AUTH_MODE": "disabled"}
"""The autoscaler's head asks for no token; a process that started a local Ray asks for one, as do its children."""

FAKE_HEAD = "f" * 51 + "00000"
"""Node id under which Ray's fake provider knows the head."""


ATTEMPTS = 3
"""To start a node."""


class Fleet:
    """A head without CPUs, on which drivers run, and worker nodes of one CPU each."""

    def __init__(self, workers: int = 0, health: dict[str, int] = HEALTH) -> None:
        self.earlier = internal_kv.internal_kv_get_gcs_client()
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": health, **NODE},
        )
        self.address: str = self.cluster.address
        self.workers: list[Any] = []
        for _ in range(workers):
            self.add()

    def add(self) -> Any:
        """A new node; it is there when this returns."""
        for attempt in reversed(range(ATTEMPTS)):
            try:
                self.workers.append(self.cluster.add_node(num_cpus=1, **NODE))
                break
            except Exception:  # Ray's own class: its raylet has 30 s to start, which a busy machine may not give it
                if not attempt:
                    raise
        return self.workers[-1]

    def processes(self, node: Any) -> list[psutil.Process]:
        """The raylet of a node first, then all that it started, actors among them."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        return [raylet, *raylet.children(recursive=True)]

    def kill(self, node: Any) -> None:
        """Everything on a node dies at once, as when a spot instance is taken away."""
        doomed = self.processes(node)
        send(signal.SIGKILL, doomed)
        self.workers.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def behead(self, node: Any) -> None:
        """The raylet alone dies; what it started is left to notice that."""
        send(signal.SIGKILL, self.processes(node)[:1])
        self.workers.remove(node)

    def freeze(self, node: Any) -> list[psutil.Process]:
        """Everything on a node stops without a word, as in a partition; returns what to thaw."""
        frozen = self.processes(node)
        send(signal.SIGSTOP, frozen)
        return frozen

    def alive(self) -> set[str]:
        """Ids of the living nodes, the head's among them."""
        return {entry["NodeID"] for entry in self.cluster.global_state.node_table() if entry["Alive"]}

    def drain(self, node: Any, seconds: int = 300) -> None:
        """Announce that a node will go, as an autoscaler does when a spot instance is about to be taken away."""
        subprocess.run(
            [
                *RAY, "drain-node", "--address", self.address, "--node-id", node.node_id,
                "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                "--deadline-remaining-seconds", str(seconds),
            ],
            check=True, capture_output=True,
        )  # fmt: skip

    def close(self) -> None:
        self.cluster.global_state.disconnect()  # a client that outlives the head ends this process
        for node in [*self.workers, self.cluster.head_node]:
            self.cluster.remove_node(node, allow_graceful=False)
        # Ray keeps the last head that a process started as the one it asks; another one may be there again.
        internal_kv._internal_kv_reset()
        if self.earlier:
            internal_kv._initialize_internal_kv(self.earlier)


def send(sent: signal.Signals, processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(sent)


@dataclass
class Autoscaled:
    """A head with an autoscaler, whose nodes are all processes below it."""

    address: str
    head: psutil.Process

    def nodes(self) -> int:
        """How many there are, the head among them. A Ray client in this process would end it when the head goes."""
        raylets = 0
        for process in self.head.children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                raylets += process.name() == "raylet"
        return raylets


@contextmanager
def autoscaling(most: int) -> Iterator[Autoscaled]:
    """A head whose autoscaler starts and ends up to `most` nodes of one CPU on this machine."""
    [port] = free_ports(1)
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True) as home:
        file = Path(home) / "cluster.json"
        file.write_text(json.dumps(autoscaler_config(address, most)))
        outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment = outside | {
            **OPEN,
            "HOME": home,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD,
        }
        command = [
            *RAY, "start", "--head", "--block", "--num-cpus", "0", "--object-store-memory", str(STORE_BYTES),
            "--node-ip-address", "127.0.0.1", "--port", str(port), "--temp-dir", f"{home}/ray",
            "--include-dashboard", "false", "--autoscaling-config", str(file),
        ]  # fmt: skip
        log = Path(home) / "head.log"
        with log.open("wb") as sink:
            head = subprocess.Popen(
                command, cwd=home, env=environment, stdout=sink, stderr=sink, start_new_session=True
            )
        try:
            cluster = Autoscaled(address, psutil.Process(head.pid))
            deadline = time.monotonic() + PATIENCE_S
            while cluster.nodes() == 0:
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield cluster
        finally:
            started = psutil.Process(head.pid).children(recursive=True)
            head.terminate()  # with --block it ends what it started, but not the fake provider's nodes
            head.wait(PATIENCE_S)
            send(signal.SIGKILL, started)


STEPS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
"""On real machines commands are run in these."""


def autoscaler_config(address: str, most: int) -> dict[str, Any]:
    worker = {"CPU": 1, "object_store_memory": STORE_BYTES}
    return {
        "cluster_name": "test",
        "max_workers": most,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD,
            "gcs_address": address,
        },
        **{f"{step}_commands": [] for step in STEPS},
        "cluster_synced_files": [],
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
    }
