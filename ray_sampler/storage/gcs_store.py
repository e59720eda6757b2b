"""A bucket of Google Cloud Storage, by the requests of its JSON interface.

gcsfs finds the credentials, as its users expect. Each request is sent once: ours are tried again.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import urllib.parse
import urllib.request
import weakref
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import aiohttp
import fsspec
import google.auth
import google.auth.exceptions
import google.auth.transport.requests
import yarl
from fsspec.asyn import sync
from fsspec.implementations.http import get_client

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.bucket_store import BucketStore, Object, Page, Version
from ray_sampler.storage.failures import AGAIN, ForeignAnswer, StoreError, failure, field_of, is_passing, status

# It logs tracebacks, which are for those who set logging up, and not for standard error.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=20)
"""Seconds; large parts over slow lines take as long as they take, as long as they move."""

HOST = "storage.googleapis.com"
LOOKS_S = 15.0
"""How long credentials are looked for: a metadata server that does not answer would hold a run for minutes."""

SCOPE = "https://www.googleapis.com/auth/devstorage.full_control"


class Once:
    """Keeps aiohttp from sending a request again by itself where a connection breaks: a part must not come twice."""

    def __init__(self) -> None:
        self.sent = False

    async def __call__(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        """Send it. Raises ServerDisconnectedError: it was sent before."""
        if self.sent:
            raise aiohttp.ServerDisconnectedError
        self.sent = True
        return await send(request)


class Answer(NamedTuple):
    """What came back of a request."""

    status: int
    headers: Mapping[str, str]
    """By name, in whatever case."""
    body: bytes


class Upload:
    """An upload that is being made. Only its last part may have any size, so one is held back."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.offset = 0
        """Bytes that the store has taken."""
        self.held = b""
        self.number = 0
        """Of the part that is held."""
        self.doubtful = False
        """Whether a request failed, so that the store must be asked how far it came."""


class GcsStore(BucketStore):
    """A folder in a bucket; every request that fails for the moment is tried again."""

    parts_at_once = 1  # they must follow each other

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(filesystem, root, url)
        self.bucket, _, self.prefix = root.partition("/")
        self.session: aiohttp.ClientSession = sync(filesystem.loop, get_client, **filesystem.session_kwargs)
        weakref.finalize(self, filesystem.close_session, filesystem.loop, self.session)

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        data: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        accept: Sequence[int] = (),
    ) -> Answer:
        """One request; `path` begins at the server, or is a whole address.

        Raises:
            FileNotFoundError: it was answered with 404 or 410.
            StoreError: it was refused otherwise, with no status in `accept`.
        """
        filesystem = self.filesystem

        async def made() -> Answer:
            address = path if path.startswith("http") else filesystem.base.removesuffix("/storage/v1/") + path
            payer = filesystem.requester_pays
            pays = {"userProject": payer if isinstance(payer, str) else filesystem.project} if payer else {}
            parameters = urllib.parse.urlencode({**(query or {}), **pays})
            signed = dict(headers or {})
            filesystem.credentials.apply(signed)
            joined = f"{address}{'&' if '?' in address else '?'}{parameters}" if parameters else address
            async with self.session.request(
                method,
                yarl.URL(joined, encoded=True),
                data=data,
                headers=signed,
                timeout=TIMEOUT,
                middlewares=(Once(),),
            ) as response:
                return Answer(response.status, response.headers, await response.read())

        answer = sync(filesystem.loop, made)
        if answer.status < 300 or answer.status in accept:
            return answer
        word = reason_of(answer.body)
        if answer.status in (404, 410) and word != "NoSuchBucket":  # 410 of an upload that the store has dropped
            raise FileNotFoundError(word)
        raise StoreError(answer.status, word)

    def _failure(self, error: BaseException, action: str, url: str) -> RequestError | RunError:
        if status(error) in (401, 403) and not is_passing(error) and self.filesystem.credentials.credentials is None:
            return RequestError(
                f"cannot {action} {url}: no credentials were found; log in with "
                "`gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS"
            )
        return failure(error, action, url)

    def _object(self, key: str) -> str:
        return f"/storage/v1/b/{self.bucket}/o/{urllib.parse.quote(key, safe='')}"

    def _pipe(self, path: str, data: bytes, create: bool = False) -> None:
        boundary = secrets.token_hex(16)
        about = json.dumps({"name": self._key(path)}).encode()
        parts = ((b"application/json; charset=UTF-8", about), (b"application/octet-stream", data))
        lines = [b"--%s\r\nContent-Type: %s\r\n\r\n%s\r\n" % (boundary.encode(), kind, part) for kind, part in parts]
        try:
            answer = self._request(
                "POST",
                f"/upload/storage/v1/b/{self.bucket}/o",
                {"uploadType": "multipart"} | ({"ifGenerationMatch": "0"} if create else {}),
                b"".join(lines) + f"--{boundary}--\r\n".encode(),
                {"Content-Type": f"multipart/related; boundary={boundary}"},
            )
            field_of(parsed(answer), "name")
        except StoreError as error:
            if create and error.status == 412:
                raise FileExistsError(error.error_code) from None
            raise

    def _fetch(self, path: str) -> bytes:
        answer = self._request("GET", self._object(self._key(path)), {"alt": "media"})
        field_of(answer.headers, "x-goog-hash")
        return answer.body

    def _request_read(self, key: str, start: int, stop: int, version: Version) -> bytes:
        query = {"alt": "media", "generation": version.tag}
        return self._request("GET", self._object(key), query, headers={"Range": f"bytes={start}-{stop - 1}"}).body

    def _request_version(self, key: str) -> Version:
        found = parsed(self._request("GET", self._object(key)))
        return Version(int(field_of(found, "size")), field_of(found, "generation"))

    def _request_page(self, prefix: str, by_folder: bool, marker: str | None) -> Page:
        query = {"prefix": prefix, "fields": "kind,nextPageToken,prefixes,items(name,updated)"}
        query |= ({"delimiter": "/"} if by_folder else {}) | ({"pageToken": marker} if marker else {})
        try:
            page = parsed(self._request("GET", f"/storage/v1/b/{self.bucket}/o", query))
        except FileNotFoundError:
            raise StoreError(404, "NoSuchBucket") from None
        field_of(page, "kind")
        objects = [Object(item["name"], unix_time(item["updated"])) for item in page.get("items", [])]
        return Page(objects, page.get("prefixes", []), page.get("nextPageToken"))

    def _request_delete(self, key: str) -> None:
        self._request("DELETE", self._object(key))

    def _request_upload(self, key: str) -> Upload:
        query = {"uploadType": "resumable", "name": key}
        answer = self._request("POST", f"/upload/storage/v1/b/{self.bucket}/o", query)
        return Upload(field_of(answer.headers, "location"))

    def _request_part(self, key: str, upload: Upload, number: int, data: bytes) -> None:
        if number > upload.number:
            self._send(upload, last=False)
            upload.held, upload.number = data, number

    def _request_complete(self, key: str, upload: Upload, parts: Sequence[None]) -> None:
        self._send(upload, last=True)

    def _send(self, upload: Upload, last: bool) -> None:
        """Send what is held, all of it; `last` says that nothing follows.

        After a failed request the store is asked how far it came: what it took is not sent again.
        """
        while upload.held or last:
            if upload.doubtful:
                headers, data = {"Content-Range": "bytes */*"}, b""
            else:
                end = upload.offset + len(upload.held)
                sent = f"bytes {upload.offset}-{end - 1}" if upload.held else "bytes *"
                headers, data = {"Content-Range": f"{sent}/{end if last else '*'}"}, upload.held
                upload.doubtful = True
            answer = self._request("PUT", upload.address, data=data, headers=headers, accept=(308,))
            upload.doubtful = False
            if answer.status != 308:  # the object is there
                field_of(parsed(answer), "name")
                upload.held = b""
                return
            ranges = answer.headers.get("range", "")
            taken = int(ranges.rpartition("-")[2]) + 1 if ranges else 0
            if taken < upload.offset or (last and not upload.held):
                raise StoreError(503, "UploadLost")
            upload.held, upload.offset = upload.held[taken - upload.offset :], taken

    def _request_abort(self, key: str, upload: Upload) -> None:
        self._request("DELETE", upload.address, accept=(499,))


def reason_of(body: bytes) -> str:
    """Google's word for a refusal: the reason in its JSON, or what its text is known by; "" if there is none."""
    text = body.decode("utf-8", "replace")
    if "bucket does not exist" in text:
        return "NoSuchBucket"
    if "requester pays" in text.lower():
        return "RequesterPays"
    try:
        error = json.loads(text)["error"]
        return str(error["errors"][0]["reason"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""


def parsed(answer: Answer) -> Mapping[str, Any]:
    """The JSON of an answer; one that is cut short is as good as none."""
    try:
        return dict(json.loads(answer.body))
    except (ValueError, TypeError):
        raise ForeignAnswer("the answer is not JSON") from None


def unix_time(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def credential_option() -> dict[str, Any]:
    """How gcsfs is to find credentials, unless fsspec's configuration sets it: as it would by itself, but quickly.

    By itself it asks for the metadata server of a Google machine twice, the second time for more than a minute.
    """
    if is_configured("token"):
        return {}
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return {"token": "anon"}
    require_name_service()
    found = found_credentials()
    if found is None:
        raise RequestError(
            f"no credentials were found for Google Cloud Storage within {LOOKS_S:.0f} s; log in with "
            "`gcloud auth application-default login`, or name a key file in GOOGLE_APPLICATION_CREDENTIALS"
        )
    if found:
        return {"token": "google_default"}
    return {"token": "cache" if os.path.exists(os.path.expanduser("~/.gcs_tokens")) else "anon"}


def is_configured(option: str) -> bool:
    """Whether fsspec's configuration sets this option of gcsfs."""
    return any(option in fsspec.config.conf.get(protocol, {}) for protocol in ("gs", "gcs"))


def require_name_service() -> None:
    """Raises RunError: the store's name has no address here. Each request would be tried again for half a minute."""
    if urllib.request.getproxies() or is_configured("endpoint_url"):  # a proxy may be what looks names up
        return
    try:
        socket.getaddrinfo(HOST, 443)
    except OSError:
        raise RunError(
            f"the name {HOST} cannot be looked up; check the network and its name service (DNS), then {AGAIN}"
        ) from None


def found_credentials() -> bool | None:
    """Whether Google's library finds credentials that give access; None where it is still looking after LOOKS_S."""
    results: list[bool] = []

    def look() -> None:
        try:
            credentials, _ = google.auth.default(scopes=[SCOPE])
            if not credentials.valid:
                credentials.refresh(google.auth.transport.requests.Request())  # type: ignore[no-untyped-call]
        except google.auth.exceptions.GoogleAuthError:
            results.append(False)
        else:
            results.append(True)

    looking = threading.Thread(target=look, name="credentials", daemon=True)
    looking.start()
    looking.join(LOOKS_S)
    return results[0] if results else None
