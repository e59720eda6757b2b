"""What a store's answer means: whether it is transient, and its cause and remedy in one sentence.

The HTTP status decides. The store's error code only refines that, since each store has different codes.
"""

from __future__ import annotations

import errno
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.store import NoRoom, UnreadableFile

FAMILIES = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.parsers", "ResponseParserError"),
    ("aiohttp", "ClientError"),
    ("asyncio", "TimeoutError"),
    ("azure.core.exceptions", "AzureError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "NonRetryableError"),
    ("requests.exceptions", "RequestException"),
    ("httpx", "HTTPError"),  # of Hugging Face's file system, as the next
    ("httpx2", "HTTPError"),
)
"""What stores raise beside OSError, by module; a module that is not loaded raises nothing."""

PASSING_STATUS = {408, 425, 429}
LASTING_STATUS = {501, 507}
"""Of those from 500 on, which pass otherwise: the server does not know the request, or is full."""

PASSING_KINDS = {
    "HTTPClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ClientConnectionError",
    "ClientPayloadError",
    "ServiceRequestError",
    "ServiceResponseError",
    "IncompleteReadError",
    "TransportError",
    "FSTimeoutError",
    "ResponseParserError",
    "ChunkedEncodingError",
    "ConnectionError",
    "Timeout",
}
PASSING_WORDS = {"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "Throttling", "OperationAborted"}
PASSING_WORDS |= {"ConditionalRequestConflict", "ThrottlingException", "TooManyRequests", "RequestLimitExceeded"}
PASSING_WORDS |= {"rateLimitExceeded", "userRateLimitExceeded"}  # which Google says with 403 too
PASSING_WORDS |= {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "Md5Mismatch"}  # damaged on its way
LASTING_WORDS = {"NotImplemented", "QuotaExceeded", "quotaExceeded", "XMinioStorageFull", "InsufficientStorage"}
LASTING_WORDS |= {"StorageFull"}
PASSING_ERRNOS = {errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, getattr(errno, "EREMOTEIO", errno.EAGAIN)}
LASTING_KINDS = {"SSLError", "ClientSSLError", "ClientConnectorCertificateError", "CertificateError"}

NO_BUCKET_WORDS = {"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted", "NoSuchContainer"}
COLD_WORDS = {"InvalidObjectState", "BlobArchived", "BlobBeingRehydrated"}
NO_KEY_KINDS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "GoogleAuthError",
    "ProfileNotFound",
    "ClientAuthenticationError",
}
"""Where no answer came with them, no request was sent."""
INVALID_KINDS = {"ValueError", "ParamValidationError", "EndpointResolutionError"}
"""Of what was refused before it was sent; botocore gives some of it as a bare ValueError, with the address in it."""


class StoreError(OSError):
    """A store's refusal of one request."""

    def __init__(self, status: int, word: str = "") -> None:
        super().__init__(f"{status} {word}".strip())
        self.status = status
        self.error_code = word
        """The store's own word for it."""

    def __reduce__(self) -> tuple[type[StoreError], tuple[int, str]]:
        return StoreError, (self.status, self.error_code)


class ForeignAnswer(ConnectionError):
    """The answer is not from a store, but perhaps from a proxy or a network that wants a login; retrying may help."""


def field_of(answer: Mapping[str, Any], name: str) -> str:
    """A field that every such answer of a store has. Raises ForeignAnswer: it is missing."""
    if name not in answer:
        raise ForeignAnswer(f"the answer has no {name}")
    return str(answer[name])


class Cause(NamedTuple):
    """How a failure is recognised, and what is said of it."""

    sentence: str
    error: type[RequestError] | type[RunError] = RequestError
    """RequestError where only the user can mend it, RunError where the store failed."""
    words: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    statuses: frozenset[int] = frozenset()
    errnos: frozenset[int] = frozenset()


AGAIN = "run the same command again"

ENDPOINTS = {
    **dict.fromkeys(("s3", "s3a"), "AWS_ENDPOINT_URL"),
    **dict.fromkeys(("gs", "gcs"), "STORAGE_EMULATOR_HOST"),
    **dict.fromkeys(("abfs", "abfss", "az"), "AZURE_STORAGE_ACCOUNT_NAME"),
}
"""The variable that says where a store is, by protocol."""

CAUSES = (
    Cause("its bucket does not exist; create it or correct the URL", words=frozenset(NO_BUCKET_WORDS)),
    Cause(
        "the store's certificate is not trusted; name the file of your own authority's certificates in AWS_CA_BUNDLE "
        "(S3) or SSL_CERT_FILE (others), or correct the endpoint",
        kinds=frozenset(LASTING_KINDS),
    ),
    Cause(
        "this machine's clock differs from the store's by more than the store allows; set it, as by NTP",
        words=frozenset({"RequestTimeTooSkewed", "RequestInTheFuture"}),
    ),
    Cause(
        f"the bucket is full or its quota is used up; make room and {AGAIN}",
        NoRoom,
        words=frozenset({*LASTING_WORDS} - {"NotImplemented"} | {"StorageCapExceeded"}),
        statuses=frozenset({507}),
        errnos=frozenset({errno.ENOSPC, errno.EDQUOT}),
    ),
    Cause(
        f"the store is asked more often than it allows; wait a while, or use fewer actors, and {AGAIN}",
        RunError,
        words=frozenset({"rateLimitExceeded", "userRateLimitExceeded"}),
    ),
    Cause(
        "a retention policy or a hold keeps what is there from being replaced; choose a bucket without one",
        words=frozenset({"BlobImmutableDueToPolicy", "BlobImmutableDueToLegalHold", "ObjectLocked"})
        | frozenset({"retentionPolicyNotMet", "objectUnderActiveHold"}),
    ),
    Cause(
        "the bucket lies in another region than the one that was asked; set AWS_DEFAULT_REGION to the bucket's, or "
        "AWS_ENDPOINT_URL to that region's address",
        words=frozenset({"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed"})
        | frozenset({"IllegalLocationConstraintException", "InvalidRegion"}),
        statuses=frozenset({301, 302, 307, 308}),
    ),
    Cause(
        "the bucket bills whoever reads it (requester pays); agree with FSSPEC_S3='{\"requester_pays\": true}' or "
        'FSSPEC_GS=\'{"requester_pays": "PROJECT"}\'',
        words=frozenset({"UserProjectMissing", "RequesterPays"}),
    ),
    Cause(
        "the key that encrypts the bucket may not be used by these credentials, or is disabled",
        words=frozenset({"KMS.DisabledException", "KMS.NotFoundException", "KMS.KMSInvalidStateException"})
        | frozenset({"KMS.InvalidKeyUsageException", "KMS.AccessDeniedException"}),
    ),
    Cause(
        "the credentials are wrong or have expired; renew them",
        words=frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
        | frozenset({"AuthenticationFailed", "InvalidAuthenticationInfo", "TokenRefreshRequired"})
        | frozenset({"PublicAccessNotPermitted"}),
        kinds=frozenset({"RefreshError", "NonRetryableError"}),
        statuses=frozenset({401}),
    ),
    Cause(
        "the bucket's name or the store's address is invalid; correct the URL or the endpoint, neither of which may "
        "hold a credential",
        kinds=frozenset(INVALID_KINDS),
    ),
)


def families() -> tuple[type[BaseException], ...]:
    """The exceptions by which the loaded stores report a failure."""
    loaded = ((sys.modules.get(module), name) for module, name in FAMILIES)
    return (OSError, ValueError, *(getattr(module, name) for module, name in loaded if module is not None))


def kinds(error: BaseException) -> set[str]:
    """The names of an exception's classes."""
    return {kind.__name__ for kind in type(error).__mro__}


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, the libraries' own ways of saying so among them."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen and len(seen) < 10:
        seen.append(cause)
        yield cause
        inner = [getattr(cause, name, None) for name in ("inner_exception", "certificate_error", "os_error", "reason")]
        inner += [(getattr(cause, "kwargs", None) or {}).get("error"), *cause.args]
        cause = cause.__cause__ or next((each for each in inner if isinstance(each, BaseException)), None)


def garbled(error: BaseException) -> bool:
    """Whether the HTTP answer was incomplete or malformed, to which aiohttp gives status 400."""
    return any("HttpProcessingError" in kinds(each) for each in chain(error))


def code(error: BaseException) -> str:
    """The store's own word for a failure, as NoSuchBucket, or its status, as 503; "" if it has none."""
    if garbled(error):
        return ""
    for cause in chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        for attribute in ("error_code", "code", "status_code", "status"):
            value = getattr(cause, attribute, None)
            if isinstance(value, str | int) and value != "":
                return str(getattr(value, "value", value))  # Azure's words are members of an enumeration
    return ""


def status(error: BaseException) -> int | None:
    """The HTTP status of the answer, None where there was none."""
    if garbled(error):
        return None
    for cause in chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            number = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            word = str(response.get("Error", {}).get("Code", ""))
            return number if isinstance(number, int) else int(word) if word.isdigit() else None
        for attribute in ("status_code", "status", "code"):
            value = getattr(cause, attribute, None)
            if isinstance(value, int | str) and str(value).isdigit():
                return int(value)
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if not isinstance(error, families()) or any(kinds(each) & LASTING_KINDS for each in chain(error)):
        return False
    word, number = code(error), status(error)
    if word in PASSING_WORDS or word in LASTING_WORDS:
        return word in PASSING_WORDS
    if number is not None and number >= 400:
        return number in PASSING_STATUS or (number >= 500 and number not in LASTING_STATUS)
    return (
        garbled(error)
        or isinstance(error, TimeoutError | ConnectionError)
        or (isinstance(error, OSError) and error.errno in PASSING_ERRNOS)
        or bool(kinds(error) & PASSING_KINDS)
    )


def brief(error: BaseException) -> str:
    """What a store said, in three words; its text is left out, as it may quote a key."""
    words = (type(error).__name__, code(error), str(status(error) or ""))
    return " ".join(dict.fromkeys(word for word in words if word))


def unreachable(error: BaseException) -> bool:
    """Whether no server was found at the store's address."""
    return any(
        isinstance(each, socket.gaierror) or "EndpointConnectionError" in kinds(each) for each in chain(error)
    ) and not any(isinstance(each, ssl.SSLError) for each in chain(error))


def failure(error: BaseException, action: str, url: str, hint: str = "") -> RequestError | RunError:
    """One sentence for what a store said. Its own text is left out: it may quote a key.

    Args:
        hint: what helps where the store refused the request itself, and for no reason that is known here.
    """
    word, number = code(error), status(error)
    variable = ENDPOINTS.get(url.partition("://")[0])
    endpoint = f" ({variable})" if variable else ""
    if word in COLD_WORDS:
        return UnreadableFile(
            f"cannot {action} {url}: it lies in an archive class of the store, as Glacier ({word}), where it cannot be "
            f"read; restore it and {AGAIN}",
            cold=True,
        )
    for cause in CAUSES:
        seen = kinds(error) if cause.kinds.isdisjoint(LASTING_KINDS) else set().union(*map(kinds, chain(error)))
        if (
            word in cause.words
            or seen & cause.kinds
            or number in cause.statuses
            or (isinstance(error, OSError) and error.errno in cause.errnos)
        ):
            shown = f" ({word or number})" if word in cause.words or number in cause.statuses else ""
            return cause.error(f"cannot {action} {url}: {cause.sentence}{shown}")
    if number == 405 or word == "MethodNotAllowed":
        return RequestError(
            f"cannot {action} {url}: permission denied ({word or number}); the store does not allow that there, or "
            f"what answers is not a store: check the endpoint{endpoint}"
        )
    if number == 403 or isinstance(error, PermissionError) or word in ("AccessDenied", "AllAccessDisabled"):
        return RequestError(
            f"cannot {action} {url}: permission denied ({word or number or 'EACCES'}); these credentials may not "
            f"{action} there or have expired, or a firewall of the store does not let this machine in"
        )
    if number is None and kinds(error) & NO_KEY_KINDS:
        return RequestError(
            f"cannot {action} {url}: no credentials were found; set them in the environment or a profile"
        )
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return RequestError(f"cannot {action} {url}: the store is read-only; choose another output")
    if hint:
        return RequestError(f"cannot {action} {url}: the store refused the request ({brief(error)}); {hint}")
    if isinstance(error, FileNotFoundError):
        return RequestError(f"cannot {action} {url}: there is no such bucket or folder; create it or correct the URL")
    if unreachable(error):
        return RunError(
            f"cannot {action} {url}: no server was reached at the store's address ({brief(error)}); check the network "
            f"and the endpoint{endpoint}, then {AGAIN}"
        )
    if kinds(error) & {"ResponseParserError", "ForeignAnswer"}:
        return RunError(
            f"cannot {action} {url}: what answers there does not speak the store's protocol ({brief(error)}), as a "
            f"proxy's or a network's login page does not; check the network and the endpoint{endpoint}, then {AGAIN}"
        )
    return RunError(f"cannot {action} {url}: unexpected response from the store ({brief(error)}); {AGAIN}")
