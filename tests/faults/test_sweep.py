"""Whichever storage request of a run fails, the run ends in the same archive, at once or when it is given again."""

from __future__ import annotations

import pytest

from ray_sampler.cluster import dispatch
from tests.faults.proxy import Fault, once
from tests.faults.sweep import PASSING, Sweep

OPERATIONS = (
    "GetObject",
    "ListObjectsV2",
    "PutObject",
    "DeleteObject",
    "HeadObject",
    "CreateMultipartUpload",
    "UploadPart",
    "CompleteMultipartUpload",
)
"""All that a run asks for, but the listing of abandoned uploads, which it can do without."""


@pytest.mark.slow
def test_a_run_succeeds_though_the_first_request_of_each_operation_fails(sweep: Sweep):
    kinds = [PASSING[i % len(PASSING)] for i in range(len(OPERATIONS))]
    sweep.passing(*(once(kind, 1, [operation]) for kind, operation in zip(kinds, OPERATIONS, strict=True)))
    assert sweep.swept.failed == dict.fromkeys(OPERATIONS, 1)
    assert set(sweep.swept.faults) == set(PASSING)


@pytest.mark.slow
def test_a_run_that_ends_at_a_lasting_error_continues_when_it_is_over(sweep: Sweep, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "REFUSED_S", 2.0)
    sweep.lasting(
        *(Fault("403", 1, operations=[operation]) for operation in OPERATIONS if operation != "DeleteObject"),
        *(Fault("403", number, operations=["PutObject"]) for number in (2, 7)),
        Fault("403", 9, operations=["GetObject"]),
        Fault("403", 1, operations=["DeleteObject"]),  # which ends no run
    )
    assert set(OPERATIONS) <= set(sweep.swept.failed)
    assert sweep.swept.exits[0] < 3
