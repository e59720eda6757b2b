"""An interrupted run ends within seconds, whatever its bucket does."""

from __future__ import annotations

import signal
import time
import uuid
from pathlib import Path

import pytest

from tests.cluster.processes import PROMPT_S, session_is_gone, started, wait_for
from tests.cluster.runs import LONGER
from tests.conftest import Configure
from tests.faults.proxy import Fault, FaultProxy
from tests.faults.servers import BUCKET, environment, rclone, rclone_server

pytestmark = [pytest.mark.accidents, pytest.mark.skipif(rclone() is None, reason="rclone is not installed")]


@pytest.mark.parametrize("signals", [1, 2])
def test_a_run_whose_bucket_stalls_ends_within_seconds_of_a_signal(configure: Configure, tmp_path: Path, signals: int):
    output, log = f"s3://{BUCKET}/{uuid.uuid4().hex}", tmp_path / "log"
    config = configure(output=output, **LONGER | {"num_samples": 4000})
    with (
        rclone_server(tmp_path / "bucket") as upstream,
        FaultProxy(upstream) as proxy,
        started(config, log, environment(proxy.url)) as process,
    ):
        wait_for(lambda _: proxy.requests["PutObject"] > 6, Path(output), process, log)
        proxy.plan(Fault("stall", seconds=300))
        wait_for(lambda _: proxy.faults["stall"] > 0, Path(output), process, log)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        assert process.wait(PROMPT_S) == 130
        assert session_is_gone(process.pid)
    assert [line for line in log.read_text().splitlines() if line.startswith("ray-sampler: ")] == [
        "ray-sampler: interrupted; finished samples are kept: run the same command again to resume"
    ]
