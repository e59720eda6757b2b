"""What dies, freezes or fails on the way costs time and no sample."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from ray._private.state import state as cluster_state
from safetensors.torch import save_file

from ray_sampler.cli import main
from ray_sampler.cluster.driver import REPAIR_ROUNDS, run
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, LONGER, flags_of, fragments, random_weights, savez, whole

pytestmark = pytest.mark.usefixtures("local_ray")

LONG_ARCHIVE = "samples_48x8x8x3.npz"


def actor_pids() -> list[int]:
    """Processes of the actors that live in the shared Ray."""
    return [
        actor["Pid"]
        for actor in cluster_state.actor_table(None).values()
        if actor["ActorClassName"] == "Worker" and actor["State"] == "ALIVE"
    ]


def once_there_are(count: int, output: Path, act: Callable[[], None]) -> threading.Thread:
    """Start a thread that calls `act` as soon as this number of fragments was written."""

    def watch() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if len(whole(output)) >= count:
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_an_actor_that_dies_or_freezes_is_replaced_and_costs_no_sample(configure, tmp_path, longer_samples, sent):
    output = tmp_path / "run"
    struck: list[int] = []

    def strike() -> None:
        struck.extend(actor_pids())
        os.kill(struck[0], sent)

    striker = once_there_are(2, output, strike)
    summary = run(configure(**LONGER, shard_timeout=10.0)).summary
    striker.join()
    assert len(struck) == 1
    assert (output / LONG_ARCHIVE).read_bytes() == savez(longer_samples)
    assert summary["failures"] == 1
    assert summary["computed"] == 48
    deadline = time.monotonic() + PATIENCE_S
    while psutil.pid_exists(struck[0]):
        assert time.monotonic() < deadline, "the process of the actor lives on"
        time.sleep(0.05)


@pytest.mark.slow
def test_many_fragments_that_are_spoilt_after_they_were_written_are_all_sampled_again(
    configure, tmp_path, longer_samples
):
    """More than there are repairs: when the merge meets one of them, all others are looked at."""
    output = tmp_path / "run"
    spoilt: list[str] = []

    def spoil() -> None:
        spoilt.extend(whole(output))
        for name in spoilt:
            os.truncate(output / "fragments" / name, 100)

    spoiler = once_there_are(REPAIR_ROUNDS + 3, output, spoil)
    summary = run(configure(**LONGER)).summary
    spoiler.join()
    assert (output / LONG_ARCHIVE).read_bytes() == savez(longer_samples)
    assert sorted(entry["name"] for entry in summary["rejected"]) == spoilt
    assert len(spoilt) > REPAIR_ROUNDS


def test_samples_that_come_out_as_nan_are_named_and_the_others_kept(configure, tmp_path, capsys):
    weights = random_weights()
    weights["label_emb.weight"][7] = torch.finfo(torch.float32).max  # finite, but no product of it is
    save_file(weights, tmp_path / "nan.safetensors")
    labels = ["1"] * 40
    labels[13] = labels[30] = "7"
    config = configure(model=str(tmp_path / "nan.safetensors"), labels=",".join(labels))
    assert main(["sample", *flags_of(config)]) == 1
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("ray-sampler: 2 shards could not be sampled")
    assert "samples 8 to 15: 13;" in last
    assert "samples 24 to 31: 30)" in last
    assert "Traceback" not in error
    assert [int(name[:12]) for name in fragments(tmp_path / "run")] == [0, 16, 32]
    assert not list((tmp_path / "run").glob("*.npz"))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_two_drivers_on_one_directory_end_with_the_same_archive(configure, tmp_path, samples):
    config = configure(shard_size=20, max_actors=2)  # two shards want one actor, which takes one of the two CPUs
    results: list[str] = []
    drivers = [threading.Thread(target=lambda: results.append(run(config).archive)) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert results == [str(tmp_path / "run" / ARCHIVE)] * 2
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
