"""What S3 and the stores that speak its protocol answer: one table of answers, exit codes and words."""

from __future__ import annotations

import logging
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ray_sampler.storage import retry
from tests.faults.lives import live
from tests.faults.proxy import Fault, FaultProxy, Request, answer
from tests.faults.servers import BUCKET, KEY, SECRET
from tests.storage.conftest import moto_endpoint, use_endpoint

__all__ = ["moto_endpoint"]

WRITES = ("PutObject", "CreateMultipartUpload", "UploadPart")


@dataclass(frozen=True)
class Case:
    """A store's answer, and what a run must make of it."""

    name: str
    faults: tuple[Fault, ...]
    code: int
    """Exit code."""
    word: str = ""
    """In the sentence, or in the log where the code is 0."""
    environment: tuple[tuple[str, str], ...] = ()
    most: int | None = None
    """Failed requests that there may be, at most."""


def query_of(request: Request) -> dict[str, list[str]]:
    return urllib.parse.parse_qs(urllib.parse.urlsplit(request[1]).query, keep_blank_values=True)


def without_slash(request: Request) -> bool:
    return not query_of(request).get("prefix", [""])[0].endswith("/")


def conditional(request: Request) -> bool:
    return "If-None-Match" in request[2]


def checksummed(request: Request) -> bool:
    """Whether a request has a checksum that only newer clients send."""
    names = {name.lower() for name in request[2]}
    return request[0] in ("PUT", "POST") and any(
        name.startswith(("x-amz-checksum", "x-amz-sdk-checksum", "x-amz-trailer")) for name in names
    )


def passing(status: int, word: str, page: bool = False) -> Case:
    """One such answer to each operation."""
    operations = ("PutObject", "GetObject", "ListObjectsV2", "HeadObject", *WRITES[1:], "CompleteMultipartUpload")
    form = "page" if page else "s3"
    faults = tuple(
        Fault("answer", 1, 1, operations=[each], status=status, word=word, form="page" if page else "s3")
        for each in operations
    )
    return Case(f"one {status} {word or form}", faults, 0, "follows in")


def hidden(first: int, last: int) -> tuple[Fault, ...]:
    """Reads from the first to the last that find nothing."""
    return (Fault("answer", first, last, operations=["GetObject"], status=404, word="NoSuchKey"),)


def lost_upload(operation: str) -> Fault:
    """Of the archive: the first upload is a trial."""
    return Fault("answer", 2, 2, operations=[operation], status=404, word="NoSuchUpload")


LOGIN = {
    "ListObjectsV2": (1, 3),
    "PutObject": (3,),
    "CreateMultipartUpload": (1,),
    "UploadPart": (2,),
    "CompleteMultipartUpload": (2,),
    "GetObject": (5,),
    "HeadObject": (1,),
}
"""Which of the requests a network answers by its login page."""

WRONG_KEY = "the credentials are wrong or have expired"

CASES = [
    # House-keeping.
    Case(
        "no right to delete",
        (answer(403, "AccessDenied", ["DeleteObject"]),),
        0,
        "probes could not be deleted",
    ),
    Case("a prefix must end in a slash", (answer(400, "InvalidRequest", ["ListObjectsV2"], when=without_slash),), 0),
    Case("uploads are not listed", (answer(501, "NotImplemented", ["ListMultipartUploads"]),), 0),
    Case("uploads may not be listed", (answer(403, "AccessDenied", ["ListMultipartUploads"]),), 0),
    # What passes, whatever its word.
    passing(503, "SlowDownRead"),
    passing(503, "ServerBusy"),
    passing(500, "InternalServerError"),
    passing(429, "TooManyRequestsForThisBucket"),
    passing(408, "Slow"),
    passing(425, "Early"),
    passing(599, "Odd"),
    *(passing(status, "", page=True) for status in (408, 502, 520)),
    Case("503 that lasts", (answer(503, "SlowDownRead"),), 1, "run the same command again", most=retry.ATTEMPTS),
    Case("520 that lasts", (answer(520, "", form="page"),), 1, "520", most=retry.ATTEMPTS),
    *(
        Case(f"{operation} finds no upload any more", (lost_upload(operation),), 0, "the archive is written again")
        for operation in ("UploadPart", "CompleteMultipartUpload")
    ),
    # Conditions and checksums.
    Case("conditions are refused with 400", (answer(400, "InvalidArgument", ["PutObject"], when=conditional),), 0),
    Case("conditions are not implemented", (answer(501, "NotImplemented", ["PutObject"], when=conditional),), 0),
    *(
        Case(
            f"checksums are refused with {status}",
            (answer(status, word, when=checksummed),),
            2,
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required",
        )
        for status, word in (
            (400, "XAmzContentSHA256Mismatch"),
            (411, "MissingContentLength"),
        )
    ),
    Case(
        "checksums are refused, and turned off",
        (answer(400, "InvalidArgument", WRITES, when=checksummed),),
        0,
        environment=(("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required"),),
    ),
    # Names that appear later.
    Case("a new name is hidden for a while", hidden(2, 5), 0, "not visible yet"),
    # Rights, tried before anything is computed.
    *(
        Case(f"no right to {operation}", (answer(403, "AccessDenied", [operation]),), 2, "permission denied", most=1)
        for operation in ("GetObject", "PutObject", "ListObjectsV2", "CreateMultipartUpload", "UploadPart")
    ),
    Case(
        "nothing may be replaced",
        (Fault("answer", 3, operations=["PutObject"], status=403, word="AccessDenied"),),
        2,
        "none replaced",
    ),
    Case("an unknown key", (answer(403, "InvalidAccessKeyId"),), 2, WRONG_KEY, most=1),
    Case("an expired token", (answer(400, "ExpiredToken"),), 2, WRONG_KEY, most=1),
    Case("401", (answer(401, "Unauthorized"),), 2, WRONG_KEY, most=1),
    Case("no such bucket", (answer(404, "NoSuchBucket"),), 2, "its bucket does not exist", most=1),
    # Causes and remedies.
    Case("a clock that is wrong", (answer(403, "RequestTimeTooSkewed"),), 2, "clock", most=1),
    Case("a full bucket", (answer(507, "InsufficientStorage", WRITES),), 1, "full", most=1),
    Case("a full disk of MinIO", (answer(507, "XMinioStorageFull", WRITES),), 1, "full", most=1),
    Case("a quota", (answer(403, "QuotaExceeded", WRITES),), 1, "quota", most=1),
    Case("another region", (answer(400, "AuthorizationHeaderMalformed"),), 2, "AWS_DEFAULT_REGION"),
    Case("a bucket that has moved", (answer(301, "PermanentRedirect", ["GetObject"]),), 2, "AWS_DEFAULT_REGION"),
    Case("a key that is disabled", (answer(400, "KMS.DisabledException", WRITES),), 2, "key that encrypts", most=2),
    Case("no store: pages", (answer(200, "", form="page"),), 1, "AWS_ENDPOINT_URL", most=retry.ATTEMPTS),
    *(
        Case(
            f"a page in place of the answer to {operation} {number}",
            (Fault("answer", number, number, operations=[operation], status=200, form="page"),),
            0,
            "follows in",
        )
        for operation, number in (("GetObject", 2), ("GetObject", 5), ("HeadObject", 2))
    ),
    *(
        Case(
            f"a login page in place of the answer to {operation} {number}",
            (Fault("answer", number, number, operations=[operation], status=200, form="login"),),
            0,
            "follows in",
        )
        for operation, numbers in LOGIN.items()
        for number in numbers
    ),
    Case("no store: login pages", (answer(200, form="login"),), 1, "login page", most=retry.ATTEMPTS),
    *(
        Case(f"login pages to {method}s", (answer(200, "", [method], form="login"),), 1, "login page")
        for method in ("GET", "PUT", "HEAD")
    ),
    Case("no store: 404 pages", (answer(404, "", form="page"),), 2, "correct the URL"),
    Case("no store: 405 pages", (answer(405, "", ["PUT"], form="page"),), 2, "AWS_ENDPOINT_URL"),
]


@pytest.fixture
def proxy(moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(retry, "FIRST_LOOK_S", 0.01)
    monkeypatch.setattr(retry, "HIDDEN_S", 30.0)
    with FaultProxy(moto_endpoint) as proxy:
        use_endpoint(monkeypatch, proxy.url)
        yield proxy


def new_url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_answer_has_its_exit_code_and_its_words(case: Case, proxy: FaultProxy, monkeypatch, caplog):
    for name, value in case.environment:
        monkeypatch.setenv(name, value)
    proxy.plan(*case.faults)
    with caplog.at_level(logging.WARNING):
        life = live(new_url())
    assert (life.code, life.said if life.code != case.code else "") == (case.code, "")
    assert case.word in (life.said if case.code else caplog.text)
    assert "\n" not in life.said
    assert not {KEY, SECRET} & {word.strip("'\".,()") for word in f"{life.said} {caplog.text}".split()}
    assert life.computed == (case.code == 0)
    assert "Traceback" not in caplog.text
    if case.code == 0 and case.name not in ("a prefix must end in a slash", "checksums are refused, and turned off"):
        assert proxy.failed
    if case.most is not None:
        assert sum(proxy.failed.values()) <= case.most
