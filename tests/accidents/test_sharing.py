"""Runs beside others: in notebooks, threads and forks of one process, and on nodes where something else computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from ray_sampler.storage.record import Samples
from tests.accidents.test_running import environment, sample
from tests.cluster.processes import PATIENCE_S
from tests.cluster.runs import ARCHIVE, SMALL, TINY, savez

pytestmark = pytest.mark.accidents


def carried_out(
    script: str, folder: Path, *arguments: str, log: int | IO[str] = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """A script of Python that ran in `folder`, in a separate session; `log` takes its standard error."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=log, text=True, timeout=PATIENCE_S,
        start_new_session=True,
    )  # fmt: skip


NOTEBOOK = """
import os, signal, sys, threading, time
import psutil, ray
from ray_sampler import RunConfig, run

processes, times = map(int, sys.argv[1:])
over, init = threading.Event(), ray.init

def interrupt():
    while len(psutil.Process().children(recursive=True)) < processes:
        time.sleep(0.01)
    for _ in range(times):
        os.killpg(0, signal.SIGINT)
        time.sleep(1)
    over.set()

def still_starting(**flags):
    init(**flags)
    over.wait()

ray.init = still_starting
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests may have SIGINT ignored
threading.Thread(target=interrupt, daemon=True).start()
result = None
while not result:
    try:
        result = run(RunConfig(output="run", model={model!r}, **{flags}))
    except KeyboardInterrupt:
        print("interrupted", [" ".join(p.cmdline())[:80] for p in psutil.Process().children(recursive=True)])
print("archive", result.archive, psutil.Process().children(recursive=True))
"""


@pytest.mark.parametrize(("processes", "times"), [(1, 1), (3, 1), (1, 2)])
def test_an_interrupted_cell_leaves_no_process_and_runs_again(
    processes: int, times: int, tmp_path: Path, checkpoint: Path
):
    """A notebook's kernel lives on, and the interrupt goes to its whole process group.

    Whoever interrupts it again does not wait until its Ray is gone, but the next run does.
    """
    script = NOTEBOOK.format(model=str(checkpoint), flags=TINY | SMALL)
    done = carried_out(script, tmp_path, str(processes), str(times))
    assert done.returncode == 0, done.stderr
    *first, last = [line for line in done.stdout.splitlines() if line.startswith(("interrupted [", "archive "))]
    assert 1 <= len(first) <= times
    assert times > 1 or first == ["interrupted []"]
    assert last.startswith("archive ")
    assert last.endswith(" []")


# Threads and copies.

THREADS = """
import threading
from ray_sampler import RunConfig, run
import ray

results = {{}}
def fill(name, num_samples):
    results[name] = run(RunConfig(output=name, model={model!r}, **({flags} | {{"num_samples": num_samples}})))

threads = [threading.Thread(target=fill, args=each) for each in (("a", 8), ("b", 40), ("c", 200))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sorted((name, result.summary["num_samples"]) for name, result in results.items()), ray.is_initialized())
"""


def test_runs_in_threads_share_one_ray_and_all_finish(tmp_path: Path, checkpoint: Path):
    script = THREADS.format(model=str(checkpoint), flags=TINY | SMALL)
    done = carried_out(script, tmp_path)
    assert done.stdout == "[('a', 8), ('b', 40), ('c', 200)] False\n", done.stderr


FORKED = """
import multiprocessing
from ray_sampler import RequestError, RunConfig, run

def fill(name):
    try:
        run(RunConfig(output=name, model={model!r}, **{flags}))
    except RequestError as error:
        print(error, flush=True)

if __name__ == "__main__":
    fill("a")
    process = multiprocessing.get_context("fork").Process(target=fill, args=("b",))
    process.start()
    process.join({patience})
    print(process.exitcode)
    process.kill()
"""


def test_a_run_in_a_fork_of_a_process_that_has_used_ray_is_refused(tmp_path: Path, checkpoint: Path):
    script = FORKED.format(patience=PATIENCE_S, model=str(checkpoint), flags=TINY | SMALL)
    done = carried_out(script, tmp_path)
    refusal, code = done.stdout.splitlines()
    assert "spawn" in refusal
    assert code == "0"


HELD = """
import threading, time
import ray
from ray_sampler import RunConfig, run
from ray_sampler.cluster import dispatch

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")

@ray.remote(num_cpus=1)
class Other:
    def there(self): return True

others = [Other.remote() for _ in range({held})]
ray.get([other.there.remote() for other in others])

def make_room():
    while {said!r} not in open("log").read():
        time.sleep(0.1)
    ray.kill(others[0])

if {held} == 2:
    dispatch.PLACE_S = 3.0
    threading.Thread(target=make_room, daemon=True).start()
result = run(RunConfig(output="run", model={model!r}, **{flags}))
print(result.summary["num_samples"])
"""


NO_ROOM = "an actor asks for 1 CPU; the whole cluster has 0 CPUs free"


@pytest.mark.parametrize("held", [1, 2])
def test_one_actor_fits_beside_whatever_else_a_node_does(held: int, tmp_path: Path, checkpoint: Path, samples: Samples):
    """Where nothing is free, the run reports it, waits, and continues when something is."""
    script = HELD.format(held=held, said=NO_ROOM, model=str(checkpoint), flags=TINY | SMALL | {"max_actors": 1})
    with (tmp_path / "log").open("w") as log:
        done = carried_out(script, tmp_path, log=log)
    said = (tmp_path / "log").read_text()
    assert done.stdout == "40\n", said
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
    assert (NO_ROOM in said) == (held == 2)


def test_several_batches_at_a_time_have_the_same_bytes(tmp_path: Path, checkpoint: Path, samples: Samples):
    done = sample(tmp_path, checkpoint, "--cpus_per_actor", str(min(2, len(os.sched_getaffinity(0)))))
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "run" / ARCHIVE).read_bytes() == savez(samples)
