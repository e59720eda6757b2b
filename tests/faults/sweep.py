"""Fail the n-th storage request of a run, for every n: as an error that passes, and as one that lasts.

An error that passes must not be seen in the outcome. One that lasts must end the run with exit code 1 or 2 and one
sentence, or not matter; the same command, given again when it is over, must end in the same archive.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_sampler.cli import main
from ray_sampler.cluster.session import connect
from tests.cluster.runs import ARCHIVE, flags_of, sampled, savez, small
from tests.faults.proxy import Fault, FaultProxy, Kind, once
from tests.faults.servers import BUCKET, KEY, REGION, SECRET, client, rclone_server

PASSING: tuple[Kind, ...] = ("503", "500", "reset", "reset upload", "lost", "truncated")
PATIENCE_S = 300.0
"""A run that lasts longer counts as stalled."""


@dataclass
class Swept:
    """What failed, and what became of it."""

    runs: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    """Requests that were made to fail, by operation."""
    faults: Counter[str] = field(default_factory=Counter)
    """The same, by kind."""
    exits: Counter[int] = field(default_factory=Counter)
    """Exit codes of the runs with an error that lasts."""
    longest_s: float = 0.0
    """Of a run."""
    failures: list[str] = field(default_factory=list)
    """What must not be."""


def write_config(path: Path, endpoint: str) -> None:
    """Let whoever has AWS_CONFIG_FILE at `path` find a server: processes that started before it, too."""
    path.write_text(
        f"[default]\nregion = {REGION}\nendpoint_url = {endpoint}\n"
        f"aws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
    )


@contextlib.contextmanager
def faulty_bucket(folder: Path, config: Path) -> Iterator[FaultProxy]:
    """A proxy before rclone's server of `folder`, which this process and those with the same `config` find."""
    import s3fs

    with rclone_server(folder) as upstream, FaultProxy(upstream) as proxy:
        write_config(config, proxy.url)
        earlier = os.environ.get("AWS_CONFIG_FILE")
        os.environ["AWS_CONFIG_FILE"] = str(config)
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield proxy
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            if earlier is None:
                del os.environ["AWS_CONFIG_FILE"]
            else:
                os.environ["AWS_CONFIG_FILE"] = earlier


class Sweep:
    """Small runs of `checkpoint` into a bucket behind `proxy`, in this process and its Ray."""

    def __init__(self, proxy: FaultProxy, checkpoint: Path, expected: bytes, **flags: Any) -> None:
        self.proxy = proxy
        self.checkpoint = checkpoint
        self.expected = expected
        """Bytes of the archive that each must end in."""
        self.flags = flags
        self.swept = Swept()

    def output(self) -> str:
        """The URL of a new run directory."""
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def run(self, output: str, what: str) -> int | None:
        """Give the command; returns its exit code, None where it ended as none may, which is noted."""
        flags = flags_of(small(self.checkpoint, output, progress="none", **self.flags))
        said = io.StringIO()
        began = time.monotonic()
        code: int | None = None
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = main(["sample", *flags])
        except Exception as error:  # a traceback is what no user may see, of whatever kind
            self.swept.failures.append(f"{what}: {type(error).__name__}: {error}")
        lasted = time.monotonic() - began
        self.swept.runs += 1
        self.swept.longest_s = max(self.swept.longest_s, lasted)
        sentences = [line for line in said.getvalue().splitlines() if line.startswith("ray-sampler: ")]
        if code is not None and (code not in (0, 1, 2) or len(sentences) != (code != 0) or lasted > PATIENCE_S):
            self.swept.failures.append(f"{what}: exit code {code} after {lasted:.0f} s: {said.getvalue()[-500:]}")
        return code

    def check(self, output: str, what: str) -> None:
        """Note an archive that is not the expected one."""
        key = f"{output.removeprefix(f's3://{BUCKET}/')}/{ARCHIVE}"
        store = client(self.proxy.upstream.geturl())
        if store.get_object(Bucket=BUCKET, Key=key)["Body"].read() != self.expected:
            self.swept.failures.append(f"{what}: another archive")

    def collect(self) -> None:
        """End the plan, and add up what it did."""
        self.proxy.plan()
        self.swept.requests += self.proxy.requests
        self.swept.failed += self.proxy.failed
        self.swept.faults += self.proxy.faults
        self.proxy.clear()

    def passing(self, *faults: Fault) -> None:
        """A run during which `faults` pass."""
        what, output = f"passing {faults}", self.output()
        self.proxy.plan(*faults)
        code = self.run(output, what)
        self.collect()
        if code != 0:
            self.swept.failures.append(f"{what}: exit code {code}")
        else:
            self.check(output, what)

    def lasting(self, *sequence: Fault) -> None:
        """Runs into one directory, each with an error that lasts, then one without."""
        what, output = f"lasting {sequence}", self.output()
        for fault in sequence:
            self.proxy.plan(fault)
            code = self.run(output, what)
            self.collect()
            if code is not None:
                self.swept.exits[code] += 1
            if code == 0:
                self.check(output, what)
        if self.run(output, f"{what}, then none") == 0:
            self.check(output, what)
        else:
            self.swept.failures.append(f"{what}: it did not continue when the error was over")
        self.collect()

    def requests_of_a_run(self) -> int:
        """How many requests an undisturbed run makes."""
        self.passing()
        return self.swept.requests.total()


def sweep(checkpoint: Path, folder: Path, seed: int = 0, every: int = 1, minutes: float | None = None) -> Swept:
    """Fail the n-th request for n = 1, 1 + every, ...: once as an error that passes, once as one that lasts.

    The kinds of those that pass are drawn from `seed`. Those that last are refusals, which end a run at once; every
    tenth is a 503, which ends it when all attempts are made. A separate Ray is started, so none may be connected.

    Args:
        checkpoint: weights of the small run, as `random_weights` gives them.
        folder: an empty one, for the bucket.
        minutes: when to stop, whatever n has come to.
    """
    request = small(checkpoint, None)
    chance = random.Random(seed)
    began = time.monotonic()
    with faulty_bucket(folder / "bucket", folder / "aws") as proxy, connect(None):
        sweeper = Sweep(proxy, checkpoint, savez(sampled(request)))
        for number in range(1, sweeper.requests_of_a_run() + 1, every):
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                break
            sweeper.passing(once(chance.choice(PASSING), number))
            sweeper.lasting(Fault("503" if number % 10 == 0 else "403", number))
    return sweeper.swept
