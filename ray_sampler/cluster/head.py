"""The program of the process that holds a local Ray: it prints the address, and ends all of it when its input ends.

Its input is a pipe that the driver holds open, so no local Ray outlives its driver, however that one ends. It is
started as a file, with the number of CPUs, and imports nothing of this package.
"""

import os
import signal
import sys
import threading
from contextlib import suppress

import psutil


def end_with_the_driver() -> None:
    sys.stdin.buffer.read()
    for process in psutil.Process().children(recursive=True):  # Ray puts each worker into a separate group
        with suppress(psutil.Error):
            process.kill()
    os.killpg(0, signal.SIGKILL)


def hold(num_cpus: int) -> None:
    waiting = threading.Thread(target=end_with_the_driver, daemon=True)
    waiting.start()
    import ray  # after the thread: it takes a second

    ray.init(address="local", include_dashboard=False, num_cpus=num_cpus, log_to_driver=False, logging_level=40)
    print(f"ray is at {ray.get_runtime_context().gcs_address}", flush=True)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # which are not read any more
        os.dup2(null, descriptor)
    waiting.join()


if __name__ == "__main__":
    try:
        hold(int(sys.argv[1]))
    except BaseException as error:  # Ray raises SystemExit too
        sys.exit(f"ray failed: {str(error).strip() or type(error).__name__}")
