"""What the pool asks of Ray, in one place: tests answer the same from nodes that die by a virtual clock."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from ray_sampler.cluster.private import cluster_state

GET_S = 0.1
"""Seconds in which a result is here that Ray says is here; one whose node is gone never comes."""

KNOCK_S = 0.5
"""Seconds in which a node that lives accepts a connection."""

LIVING = ("PENDING_CREATION", "ALIVE")
"""States of an actor that may have a process."""


class Calls(Protocol):
    """Handles have a method `remote` for each method of an actor, which returns a reference to its result."""

    def now(self) -> float:
        """Seconds of a clock that never goes back."""

    def wait(self, refs: Collection[Any], timeout: float) -> list[Any]:
        """The references whose results are there; waits up to `timeout` seconds for a first one."""

    def get(self, ref: Any) -> Any:
        """A result that is there.

        Raises:
            GetTimeoutError: it is not, after all.
            RayTaskError: the method raised.
            RayError: the actor is gone.
        """

    def kill(self, handle: Any) -> None:
        """End an actor."""

    def places(self, hellos: Collection[Any]) -> list[str | None]:
        """For each actor the id of the node on which it has a process, None where it waits for one.

        Args:
            hellos: a reference to a result of each, as Ray gives no handle's id.
        """

    def place(self, hello: Any) -> str | None:
        """Where an actor has or had a process; None where it never had one."""

    def draining(self) -> set[str]:
        """Ids of the nodes that are about to go."""

    def dead(self, nodes: Collection[str]) -> set[str]:
        """Those of the nodes that are gone or cut off."""


class RayCalls:
    """The calls of a connected Ray. No call blocks for more than a second, however many actors and nodes there are."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, refs: Collection[Any], timeout: float) -> list[Any]:
        if not refs:
            time.sleep(timeout)
            return []
        wanted = list(refs)
        done, _ = ray.wait(wanted, num_returns=len(wanted), timeout=0)
        if not done:
            done, _ = ray.wait(wanted, num_returns=1, timeout=timeout)
        return done

    def get(self, ref: Any) -> Any:
        return ray.get(ref, timeout=GET_S)

    def kill(self, handle: Any) -> None:
        with suppress(RayError):  # one whose creation was cancelled is gone already
            ray.kill(handle)

    def places(self, hellos: Collection[Any]) -> list[str | None]:
        """Two questions for all of them."""
        job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
        actors: dict[str, Any] = {}
        for living in LIVING:
            actors |= cluster_state.actor_table(None, job, living)
        return [place_in(actors.get(actor_of(hello))) for hello in hellos]

    def place(self, hello: Any) -> str | None:
        return place_in(cluster_state.actor_table(actor_of(hello)))

    def draining(self) -> set[str]:
        return set(cluster_state.get_draining_nodes())

    def dead(self, nodes: Collection[str]) -> set[str]:
        """Ray 2.60 reports the death of a node after tens of seconds; whether it still listens shows that at once."""
        if not nodes:
            return set()
        found = {node["NodeID"]: node for node in ray.nodes() if node["NodeID"] in nodes}
        alive = {name: node for name, node in found.items() if node["Alive"]}
        ports = {name: (node["NodeManagerAddress"], node["NodeManagerPort"]) for name, node in alive.items()}
        return found.keys() - listening(ports)


def actor_of(ref: Any) -> str:
    """The id of the actor whose result a reference is."""
    return str(ref.task_id().actor_id().hex())


def place_in(actor: Mapping[str, Any] | None) -> str | None:
    """The node of an actor that has a process: in Ray 2.60 one that queues at a node has an address, but no process."""
    return actor["Address"]["NodeID"] if actor and actor.get("Pid") else None


def listening(addresses: Mapping[str, tuple[str, int]]) -> set[str]:
    """Which of the addresses accept a connection, all asked at once."""
    accepted: set[str] = set()
    deadline = time.monotonic() + KNOCK_S
    with ExitStack() as opened, selectors.DefaultSelector() as selector:
        for name, (host, port) in addresses.items():
            with suppress(OSError):
                knocking = opened.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
                knocking.setblocking(False)
                knocking.connect_ex((host, port))
                selector.register(knocking, selectors.EVENT_WRITE, name)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                knocked: Any = key.fileobj
                if knocked.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    accepted.add(key.data)
    return accepted


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line: of a long account by Ray its last sentence, of ours all."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, WorkerCrashedError):  # of which Ray says where it would look itself
        return "its process was killed, perhaps by the system for lack of memory"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip() and not line.startswith((" ", "\t"))]
    if not lines:
        return type(cause).__name__
    return lines[-1].partition(" Worker exit detail:")[0] if isinstance(cause, RayError) else " ".join(lines)
