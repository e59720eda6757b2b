"""A bucket whose requests fail on purpose, for the tests' Ray as well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_sampler.storage.record import Samples
from tests.cluster.runs import savez
from tests.faults.proxy import FaultProxy
from tests.faults.servers import rclone
from tests.faults.sweep import Sweep, faulty_bucket


@pytest.fixture(scope="session")
def bucket(local_ray: None, aws_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultProxy]:
    """The proxy before a bucket that this process and the shared Ray's workers find."""
    if rclone() is None:
        pytest.skip("rclone is not installed")
    with faulty_bucket(tmp_path_factory.mktemp("faulty"), aws_config) as proxy:
        yield proxy


@pytest.fixture
def sweep(bucket: FaultProxy, checkpoint: Path, samples: Samples) -> Iterator[Sweep]:
    """Runs behind that proxy, of which none may end as it must not."""
    sweep = Sweep(bucket, checkpoint, savez(samples))
    yield sweep
    bucket.plan()
    assert sweep.swept.failures == []
