"""An actor whose disk hides for a while what the driver has just written."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_sampler.cluster.members import Ready, Waiting
from ray_sampler.cluster.pool import Pool
from ray_sampler.cluster.session import Fleet
from ray_sampler.cluster.worker import HiddenError, prove_access
from ray_sampler.errors import RunError
from ray_sampler.storage.run_dir import RunDir


def test_one_look_says_what_will_be_waited_for_and_more_looks_give_up(tmp_path: Path) -> None:
    run_dir = RunDir(str(tmp_path / "run"))
    with pytest.raises(HiddenError, match=r"does not see yet .*/run; it looks again for up to 75 s"):
        prove_access(run_dir, "driver-1", 0.0)
    with pytest.raises(RunError, match="give an --output that every node shares") as gave_up:
        prove_access(run_dir, "driver-1", 0.5)
    assert not isinstance(gave_up.value, HiddenError)
    threading.Timer(0.5, run_dir.probe_write, ["driver-1"]).start()
    prove_access(run_dir, "driver-1", 20.0)


@ray.remote(num_cpus=0)
class Late:
    """An actor that sees its output at the second attempt."""

    def start(self, patience_s: float = 0.0) -> Any:
        from types import SimpleNamespace

        if not patience_s:
            raise HiddenError("node a does not see yet what the driver wrote")
        return SimpleNamespace(
            node_id=ray.get_runtime_context().get_node_id(), device="cpu", numerics_key="a key", said=()
        )


@pytest.mark.usefixtures("local_ray")
def test_the_pool_says_that_an_actor_waits_and_keeps_it() -> None:
    pool = Pool(Late.remote, Fleet(0, 1, 1), 60.0)  # type: ignore[attr-defined]
    pool.scale(1, keep=1)
    try:
        events: list[Any] = []
        while not any(isinstance(event, Ready) for event in events):
            events += pool.wait(10.0)
    finally:
        pool.close()
    assert [type(event) for event in events] == [Waiting, Ready]
    assert events[0].reason == "node a does not see yet what the driver wrote"
