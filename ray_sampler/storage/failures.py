"""What a store's answer means: whether it is transient, and its cause and remedy in one sentence.

The HTTP status decides. The store's error code only refines that, since each store has different codes.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ray_sampler.errors import RequestError, RunError
from ray_sampler.storage.store import ColdFile, NoRoom

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
    if answer.get(name) is None:
        raise ForeignAnswer(f"the answer has no {name}")
    return str(answer[name])


class Cause(NamedTuple):
    """How a failure is recognised, and what is said of it."""

    sentence: str
    """With {action}, and {endpoint}: the variable that says where the store is."""
    error: type[RequestError] | type[RunError] = RequestError
    """RequestError where only the user can mend it, RunError where the store failed."""
    words: frozenset[str] = frozenset()
    kinds: frozenset[str] = frozenset()
    causes: frozenset[str] = frozenset()
    """Kinds of the exception or of any that caused it."""
    statuses: frozenset[int] = frozenset()
    errnos: frozenset[int] = frozenset()
    unanswered: bool = False
    """Whether it applies only where there was no answer with a status."""


AGAIN = "run the same command again"

ENDPOINTS = {
    **dict.fromkeys(("s3", "s3a"), "AWS_ENDPOINT_URL"),
    **dict.fromkeys(("gs", "gcs"), "STORAGE_EMULATOR_HOST"),
    **dict.fromkeys(("abfs", "abfss", "az"), "AZURE_STORAGE_ACCOUNT_NAME"),
}
"""The variable that says where a store is, by protocol."""

CAUSES = (
    Cause(
        f"it lies in an archive class of the store, as Glacier, where it cannot be read; restore it and {AGAIN}",
        ColdFile,
        words=frozenset(COLD_WORDS),
    ),
    Cause("its bucket does not exist; create it or correct the URL", words=frozenset(NO_BUCKET_WORDS)),
    Cause(
        "the store's certificate is not trusted; name the file of your own authority's certificates in AWS_CA_BUNDLE "
        "(S3) or SSL_CERT_FILE (others), or correct the endpoint",
        causes=frozenset(LASTING_KINDS),
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
        "the bucket bills whoever reads it (requester pays); agree with FSSPEC_S3='{{\"requester_pays\": true}}' or "
        'FSSPEC_GS=\'{{"requester_pays": "PROJECT"}}\'',
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
    Cause(
        "permission denied; the store does not allow that there, or what answers is not a store: check the "
        "endpoint{endpoint}",
        words=frozenset({"MethodNotAllowed"}),
        statuses=frozenset({405}),
    ),
    Cause(
        "permission denied; these credentials may not {action} there or have expired, or a firewall of the store does "
        "not let this machine in",
        words=frozenset({"AccessDenied", "AllAccessDisabled"}),
        kinds=frozenset({"PermissionError"}),
        statuses=frozenset({403}),
    ),
    Cause(
        "no credentials were found; set them in the environment or a profile",
        kinds=frozenset(NO_KEY_KINDS),
        unanswered=True,
    ),
    Cause("the store is read-only; choose another output", errnos=frozenset({errno.EROFS})),
    Cause("there is no such bucket or folder; create it or correct the URL", kinds=frozenset({"FileNotFoundError"})),
    Cause(
        f"no server was reached at the store's address; check the network and the endpoint{{endpoint}}, then {AGAIN}",
        RunError,
        causes=frozenset({"gaierror", "EndpointConnectionError"}),
    ),
    Cause(
        "what answers there does not speak the store's protocol, as a proxy's or a network's login page does not; "
        f"check the network and the endpoint{{endpoint}}, then {AGAIN}",
        RunError,
        kinds=frozenset({"ResponseParserError", "ForeignAnswer"}),
    ),
)
"""The first that fits is said."""


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
        inner = getattr(cause, "inner_exception", None) or getattr(cause, "certificate_error", None)
        inner = inner or getattr(cause, "os_error", None) or (getattr(cause, "kwargs", None) or {}).get("error")
        cause = cause.__cause__ or (inner if isinstance(inner, BaseException) else None)


def garbled(error: BaseException) -> bool:
    """Whether the HTTP answer was incomplete or malformed, to which aiohttp gives status 400."""
    return any("HttpProcessingError" in kinds(each) for each in chain(error))


def answers(error: BaseException) -> Iterator[Mapping[str, Any]]:
    """What an exception, and each that caused it, has of the store's answer."""
    for cause in () if garbled(error) else chain(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore's
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            yield {"code": response.get("Error", {}).get("Code"), "status": status}
        else:
            found = {name: getattr(cause, name, None) for name in ("error_code", "code", "status_code", "status")}
            yield {name: getattr(value, "value", value) for name, value in found.items()}  # Azure's are of an Enum


def code(error: BaseException) -> str:
    """The store's own word for a failure, as NoSuchBucket, or its status, as 503; "" if it has none."""
    names = ("error_code", "code", "status_code", "status")
    found = (answer.get(name) for answer in answers(error) for name in names)
    return next((str(value) for value in found if isinstance(value, str | int) and value != ""), "")


def status(error: BaseException) -> int | None:
    """The HTTP status of the answer, None where there was none."""
    found = (answer.get(name) for answer in answers(error) for name in ("status_code", "status", "code"))
    return next((int(value) for value in found if isinstance(value, str | int) and str(value).isdigit()), None)


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


def failure(error: BaseException, action: str, url: str, hint: str = "") -> RequestError | RunError:
    """One sentence for what a store said. Its own text is left out: it may quote a key.

    Args:
        hint: what helps where the store refused the request itself, and for no reason that is known here.
    """
    word, number, seen = code(error), status(error), kinds(error)
    causes = set().union(*map(kinds, chain(error)))
    variable = ENDPOINTS.get(url.partition("://")[0])
    endpoint = f" ({variable})" if variable else ""
    for cause in CAUSES:
        if cause.unanswered and number is not None:
            continue
        if (
            word in cause.words
            or seen & cause.kinds
            or causes & cause.causes
            or number in cause.statuses
            or getattr(error, "errno", None) in cause.errnos
        ):
            sentence = cause.sentence.format(action=action, endpoint=endpoint)
            return cause.error(f"cannot {action} {url}: {sentence} ({brief(error)})")
    if hint:
        return RequestError(f"cannot {action} {url}: the store refused the request ({brief(error)}); {hint}")
    return RunError(f"cannot {action} {url}: unexpected response from the store ({brief(error)}); {AGAIN}")
