"""Google's and Azure's stores, by real emulators behind the proxy: what S3 is tested for, the same."""

from __future__ import annotations

import gc
import logging
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage import object_store, retry
from ray_sampler.storage.run_dir import RunDir
from tests.faults.clouds import CONTAINER, azurite_server, gcs_server, python_gcs_server, use_cloud
from tests.faults.lives import ARCHIVE, NAMES, live
from tests.faults.proxy import Fault, FaultProxy, Kind, Request, answer, once

PART = 2**20
CLOUDS = ("gcs", "azure")


@pytest.fixture(scope="module")
def gcs_endpoint() -> Iterator[str]:
    with gcs_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def gcs_python_endpoint() -> Iterator[str]:
    with python_gcs_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def azure_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azurite_server(tmp_path_factory.mktemp("azurite")) as endpoint:
        yield endpoint


@dataclass(frozen=True)
class Cloud:
    """A store behind a proxy."""

    name: str
    proxy: FaultProxy

    def url(self) -> str:
        protocol = "gs" if self.name.startswith("gcs") else "abfs"
        return f"{protocol}://{CONTAINER}/{uuid.uuid4().hex}"

    def answer(self, status: int, word: str, *methods: str, **more: object) -> Fault:
        form = "page" if word == "page" else "gcs" if self.name.startswith("gcs") else "azure"
        return answer(status, word, methods or None, form=form, **more)


@pytest.fixture(params=CLOUDS)
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    yield from connected(request, monkeypatch)


@pytest.fixture(params=["gcs_python", "azure"])
def interrupted_cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """Stores that know how far an upload came that was interrupted."""
    yield from connected(request, monkeypatch)


def connected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    endpoint = request.getfixturevalue(f"{request.param}_endpoint")
    for name, seconds in (("BACKOFF_S", 0.01), ("LONGEST_WAIT_S", 0.02), ("FIRST_LOOK_S", 0.01)):
        monkeypatch.setattr(retry, name, seconds)
    monkeypatch.setattr(object_store, "PART_BYTES", PART)
    with FaultProxy(endpoint) as proxy:
        use_cloud(monkeypatch, request.param, proxy.url)
        yield Cloud(request.param, proxy)


def test_a_run_lives(cloud: Cloud):
    life = live(cloud.url())
    assert (life.code, life.said) == (0, "")


def test_a_run_is_created_once(cloud: Cloud):
    run_dir = RunDir(cloud.url())
    assert run_dir._store.create("run.json", b"{}")
    # Past the look that finds it, the condition itself must hold.
    with pytest.raises(FileExistsError):
        run_dir._store._pipe("run.json", b"[]", create=True)  # type: ignore[union-attr]
    assert run_dir.create_run({"seed": 2}) == {}
    run_dir.replace_run({"seed": 3})
    assert run_dir.read_run() == {"seed": 3}


@pytest.mark.parametrize("name", ["a#b?c", "a%20b c", "ü&é+"])
def test_a_url_of_odd_characters_is_written_read_and_printed_as_it_is(cloud: Cloud, name: str):
    url = f"{cloud.url()}/{name}"
    assert live(url).code == 0
    run_dir = RunDir(url)
    assert run_dir.path_of(ARCHIVE) == f"{url}/{ARCHIVE}"
    assert run_dir.has(ARCHIVE)
    parent = RunDir(url.rpartition("/")[0])
    assert [entry.name for entry in parent._store.list("")] == [name]


@pytest.mark.parametrize("kind", ["500", "503", "reset", "reset upload", "lost", "truncated"])
def test_an_error_that_passes_is_not_seen(interrupted_cloud: Cloud, kind: Kind):
    methods = [(method, number) for method in ("GET", "PUT", "POST", "DELETE") for number in (1, 4)]
    interrupted_cloud.proxy.plan(*(Fault(kind, number, number, operations=[method]) for method, number in methods))
    life = live(interrupted_cloud.url())
    assert (life.code, life.said) == (0, "")
    assert interrupted_cloud.proxy.faults[kind] >= 3


@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "HEAD"])
def test_a_login_page_is_not_an_answer(cloud: Cloud, method: str):
    url = cloud.url()
    assert live(url).code == 0
    cloud.proxy.plan(answer(200, "", [method], form="login"))
    life = live(url)
    assert bool(life.code) == bool(cloud.proxy.failed)
    if method == "GET":
        with pytest.raises((RequestError, RunError), match="cannot list"):
            RunDir(url).fragments.list()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("kind", ["500", "503", "reset", "reset upload", "lost", "truncated"])
def test_an_archive_of_several_parts_is_whole_though_any_request_of_it_fails(
    interrupted_cloud: Cloud, kind: Kind, number: int
):
    run_dir = RunDir(interrupted_cloud.url())
    data = os.urandom(3 * PART + 12345)
    interrupted_cloud.proxy.plan(*(once(kind, number, [method]) for method in ("PUT", "POST", "GET")))
    run_dir.write_archive(ARCHIVE, (data[i : i + 300_000] for i in range(0, len(data), 300_000)), len(data))
    with run_dir.open_file(ARCHIVE) as opened:
        assert b"".join(iter(lambda: opened(500_000), b"")) == data


def test_a_tenth_of_all_requests_may_fail(interrupted_cloud: Cloud):
    interrupted_cloud.proxy.plan(
        Fault("503", probability=0.05), Fault("reset", probability=0.03), Fault("lost", probability=0.03)
    )
    run_dir = RunDir(interrupted_cloud.url())
    data = os.urandom(12 * PART + 1)
    for _ in range(3):
        assert live(interrupted_cloud.url()).code == 0
        run_dir.write_archive(ARCHIVE, [data], len(data))
        assert run_dir.read_file(ARCHIVE) == data
    assert sum(interrupted_cloud.proxy.faults.values()) > 3


@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_a_staged_archive_is_there_whole_or_not_at_all(cloud: Cloud, chunks: int):
    run_dir = RunDir(cloud.url())
    run_dir.write_file(ARCHIVE, b"old")

    def stage(error: Exception | None) -> None:
        def given() -> Iterator[bytes]:
            for i in range(chunks):
                yield bytes([i]) * PART
            assert run_dir.read_file(ARCHIVE) == b"old"
            if error:
                raise error

        run_dir.write_archive(ARCHIVE, given(), chunks * PART)

    with pytest.raises(ValueError, match="stop"):
        stage(ValueError("stop"))
    gc.collect()
    assert run_dir.read_file(ARCHIVE) == b"old"
    stage(None)
    assert run_dir.read_file(ARCHIVE) == b"".join(bytes([i]) * PART for i in range(chunks))


def test_a_listing_of_several_pages_is_whole_though_a_page_fails(cloud: Cloud, monkeypatch):
    from ray_sampler.storage import azure_store

    monkeypatch.setattr(azure_store, "NAMES_PER_PAGE", 3)
    run_dir = RunDir(cloud.url())
    for name in "abcdefgh":
        run_dir.write_file(name, b"x")
    cloud.proxy.plan(once("503", 2, ["GET"]))
    assert sorted(entry.name for entry in run_dir._store.list("")) == list("abcdefgh")


REFUSALS = [
    ("403", 403, {"gcs": "forbidden", "azure": "AuthorizationFailure"}, "permission denied"),
    ("a signature without the right", 403, {"azure": "AuthorizationPermissionMismatch"}, "permission denied"),
    ("a firewall", 403, {"azure": "AuthorizationFailure"}, "firewall"),
    ("an expired signature", 403, {"azure": "AuthenticationFailed"}, "have expired"),
    ("401", 401, {"azure": "InvalidAuthenticationInfo"}, "have expired"),
    ("no bucket", 404, {"gcs": "The specified bucket does not exist.", "azure": "ContainerNotFound"}, "its bucket"),
    ("a policy that keeps what is there", 409, {"azure": "BlobImmutableDueToPolicy"}, "a retention policy"),
    ("a retention period", 403, {"gcs": "retentionPolicyNotMet"}, "a retention policy"),
    ("no public access", 409, {"azure": "PublicAccessNotPermitted"}, "the credentials are wrong"),
    ("requester pays", 400, {"gcs": "Bucket is a requester pays bucket but no user project provided."}, "FSSPEC_GS"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "status", "words", "said", "method"),
    [(*case, None) for case in REFUSALS] + [(*REFUSALS[0], "PUT")],
    ids=[*(case[0] for case in REFUSALS), "403 of writes"],
)
def test_a_refusal_is_told_at_once_with_exit_code_2(cloud: Cloud, name, status, words, said, method, caplog, capfd):
    if cloud.name not in words:
        pytest.skip("another store's word")
    methods = [] if method is None else ["POST"] if cloud.name == "gcs" else ["PUT"]
    url = cloud.url()
    store = RunDir(url)._store
    if cloud.name == "gcs":  # an emulator has no users
        store.filesystem.credentials.credentials = object()  # type: ignore[union-attr]
        store.filesystem.credentials.apply = lambda out: None  # type: ignore[union-attr]
    cloud.proxy.plan(cloud.answer(status, words[cloud.name], *methods))
    with caplog.at_level(logging.WARNING):
        life = live(url)
    assert (life.code, life.computed) == (2, False), life.said
    assert said in life.said
    assert sum(cloud.proxy.failed.values()) <= 2  # the second of an upload that is begun, refused and given up
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


def test_without_a_right_to_delete_a_run_ends_well(cloud: Cloud, caplog):
    word = "forbidden" if cloud.name == "gcs" else "AuthorizationPermissionMismatch"
    cloud.proxy.plan(cloud.answer(403, word, "DELETE"))
    assert live(cloud.url()).code == 0
    assert "could not be deleted" in caplog.text
    ours = [record for record in caplog.records if record.name.startswith("ray_sampler")]
    assert not any(record.exc_info or "Traceback" in record.getMessage() for record in ours)


@pytest.mark.parametrize(("status", "word"), [(408, "page"), (429, "Odd"), (500, "page"), (502, "Odd"), (520, "page")])
def test_the_status_decides_what_is_tried_again(interrupted_cloud: Cloud, status: int, word: str, caplog):
    faults = [interrupted_cloud.answer(status, word, method) for method in ("GET", "PUT", "POST")]
    interrupted_cloud.proxy.plan(*(Fault(**vars(fault) | {"first": 2, "last": 2}) for fault in faults))
    assert live(interrupted_cloud.url()).code == 0
    assert caplog.text.count("follows in") >= 2


def test_google_s_limit_of_requests_passes_or_is_told(gcs_endpoint: str, monkeypatch):
    monkeypatch.setattr(retry, "BACKOFF_S", 0.01)
    with FaultProxy(gcs_endpoint) as proxy:
        use_cloud(monkeypatch, "gcs", proxy.url)
        cloud = Cloud("gcs", proxy)
        limited = cloud.answer(403, "rateLimitExceeded")
        proxy.plan(Fault(**vars(limited) | {"first": 2, "last": 4}))
        assert live(cloud.url()).code == 0
        proxy.plan(limited)
        life = live(cloud.url())
        assert (life.code, "more often than it allows" in life.said) == (1, True), life.said


def test_an_upload_that_the_store_drops_is_made_anew(cloud: Cloud, caplog):
    def commits_the_archive(request: Request) -> bool:
        return cloud.name == "gcs" or (ARCHIVE in request[1] and "comp=blocklist" in request[1])

    number = 2 if cloud.name == "gcs" else 1  # the first upload is a trial
    status, word = (410, "gone") if cloud.name == "gcs" else (400, "InvalidBlockList")
    dropped = cloud.answer(status, word, "PUT", when=commits_the_archive)
    cloud.proxy.plan(Fault(**vars(dropped) | {"first": number, "last": number}))
    life = live(cloud.url())
    assert (life.code, life.said) == (0, "")
    assert "the archive is written again" in caplog.text


@pytest.mark.parametrize("status", [503, 500])
def test_an_error_that_lasts_is_told_after_six_attempts(cloud: Cloud, status: int, caplog):
    cloud.proxy.plan(cloud.answer(status, "ServerBusy"))
    life = live(cloud.url())
    assert (life.code, "run the same command again" in life.said) == (1, True), life.said
    assert sum(cloud.proxy.requests.values()) == retry.ATTEMPTS
    assert caplog.text.count("follows in") == retry.ATTEMPTS - 1
    assert "Traceback" not in caplog.text


def test_a_full_store_is_told(cloud: Cloud):
    cloud.proxy.plan(cloud.answer(507, "InsufficientStorage", "PUT", "POST"))
    life = live(cloud.url())
    assert (life.code, "full" in life.said) == (1, True), life.said


def test_a_blob_in_cold_storage_is_sampled_again():
    """See the same test of S3: the word alone differs."""
    from ray_sampler.storage.failures import StoreError, failure
    from ray_sampler.storage.store import UnreadableFile

    assert isinstance(failure(StoreError(409, "BlobArchived"), "read", "abfs://c/x"), UnreadableFile)


def test_a_moved_fragment_is_whole_in_its_new_place(cloud: Cloud):
    run_dir = RunDir(cloud.url())
    run_dir.fragments.write(NAMES[0], b"damaged")
    cloud.proxy.plan(once("lost", 1, ["DELETE"]), once("503", 1, ["PUT", "POST"]))
    run_dir.fragments.reject(NAMES[0].filename, "first")
    assert run_dir.fragments.list().fragments == []
    assert run_dir._store.read(f"rejected/{NAMES[0].filename}") == b"damaged"
    assert {entry.name for entry in run_dir._store.list("rejected")} == {
        NAMES[0].filename,
        f"{NAMES[0].filename}.reason.txt",
    }


def test_an_upload_whose_parts_are_gone_is_not_an_archive(cloud: Cloud):
    run_dir = RunDir(cloud.url())
    run_dir.write_file(ARCHIVE, b"old")
    fault = cloud.answer(404 if cloud.name == "gcs" else 400, "InvalidBlockList", "PUT")
    cloud.proxy.plan(Fault(**vars(fault) | {"first": 3}))
    with pytest.raises((RunError, RequestError)):
        run_dir.write_archive(ARCHIVE, [os.urandom(2 * PART + 1)], 3 * PART)
    cloud.proxy.plan()
    assert run_dir.read_file(ARCHIVE) == b"old"
