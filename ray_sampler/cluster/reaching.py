"""Why a Ray cannot be joined or started, in one sentence each: Ray itself says it in pages, and after long waits."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private import services, utils
from ray._private.authentication.grpc_authentication_client_interceptor import _get_authentication_metadata_tuple
from ray.core.generated import gcs_service_pb2

from ray_sampler.errors import RequestError, RunError, printable

KNOCK_S = 10.0
"""Seconds that a cluster may take to accept a connection, and to answer."""

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What a cluster's head answers without being joined."""

SOCKET_PATH = 64
"""Characters that Ray needs for a socket's path below its folder, of the 107 that the system allows."""

LONGEST_SOCKET = 107

STORE_SHARE = 0.3
"""Of the memory: what Ray's object store takes as one file, unless /dev/shm is smaller."""


def address_given(address: str | None) -> tuple[str, str] | None:
    """The address of a cluster, and where it was given; None where neither a flag nor the environment has one."""
    if address:
        return address, f"--address is {address!r}"
    variable = os.environ.get("RAY_ADDRESS")
    return (variable, f"RAY_ADDRESS is {variable!r}") if variable else None


def refuse_client_address(address: str, given: str) -> None:
    """Raises RequestError: the address is that of a Ray client."""
    if address.startswith("ray://"):
        raise RequestError(
            f"{given}, which a Ray client takes; submit the run with `ray job submit` instead, "
            "or give host:port of the cluster from one of its nodes"
        )


def knock(address: str) -> None:
    """Ask what is at a cluster's address: Ray itself would try for minutes, and log past us.

    Raises:
        OSError: no cluster's head is there; says what is.
        RequestError: its Ray has another version, or wants another token.
    """
    found = services.canonicalize_bootstrap_address(address)
    if not found:
        return
    host, _, port = found.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), KNOCK_S) as connection:
        if speaks_http(connection):
            raise OSError(
                f"port {port} is a web server's, perhaps the dashboard's, which is what `ray job submit` takes; a "
                "cluster's own port is 6379 unless it was started with another"
            )
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        check_head(found)


def check_head(found: str) -> None:
    """Ask a cluster's head whether it is one. Raises as `knock` does."""
    port = found.rpartition(":")[2]
    messages: Any = gcs_service_pb2  # generated, without types
    with grpc.insecure_channel(found, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            CHECK_ALIVE,
            request_serializer=messages.CheckAliveRequest.SerializeToString,
            response_deserializer=messages.CheckAliveReply.FromString,
        )
        try:
            token = _get_authentication_metadata_tuple()
            version = call(messages.CheckAliveRequest(), timeout=KNOCK_S, metadata=token).ray_version
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNAUTHENTICATED:
                raise RequestError(
                    "the cluster asks for a token, and none or another was given; export RAY_AUTH_MODE=token, with the "
                    "cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
                ) from error
            if code == grpc.StatusCode.UNIMPLEMENTED:
                raise OSError(
                    f"port {port} is not a cluster's own, but perhaps that of Ray clients; a cluster's own port is "
                    "6379 unless it was started with another"
                ) from error
            raise OSError(f"what listens on port {port} does not answer as Ray does ({code.name})") from error
    if version and version != ray.__version__:
        raise RequestError(other_version(version, ray.__version__, "ray", version))


def speaks_http(connection: socket.socket) -> bool:
    connection.settimeout(KNOCK_S)
    with suppress(OSError):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: ray\r\nConnection: close\r\n\r\n")
        return connection.recv(5) == b"HTTP/"
    return False


def other_version(theirs: str, ours: str, what: str, install: str) -> str:
    name = {"ray": "Ray", "python": "Python"}[what]
    remedy = f"pip install 'ray[default]=={install}' here" if what == "ray" else f"use Python {install} here"
    return (
        f"the cluster runs {name} {printable(theirs)} and this process {name} {ours}; {remedy}, "
        "or install constraints.txt of this package on every node"
    )


def cannot_join(error: BaseException, given: str) -> RequestError:
    """Why a cluster cannot be joined."""
    text = str(error)
    for what, name in (("ray", "Ray"), ("python", "Python")):
        versions = re.findall(rf"{name}: (\S+)", text)
        if "ersion mismatch" in text and len(versions) >= 2 and versions[0] != versions[1]:
            return RequestError(f"{given}: {other_version(versions[0], versions[1], what, versions[0])}")
    reason = text.splitlines()[0] if text else type(error).__name__
    return RequestError(
        f"{given}, where no Ray cluster answers ({reason}); give the address of a running one, or leave out both "
        "--address and RAY_ADDRESS to start a local Ray"
    )


def ray_folder() -> str:
    """Where a Ray of our own keeps its sockets and logs. Absolute: its processes work in other ones."""
    return os.path.abspath(get_default_ray_temp_dir())


def check_machine() -> None:
    """Check what a Ray of our own needs of this machine, where Ray would fail late or without a word.

    Raises:
        RunError: something is missing; says what to do about it.
    """
    folder = ray_folder()
    if len(os.fsencode(folder)) + SOCKET_PATH > LONGEST_SOCKET:
        raise RunError(
            f"Ray's folder is {printable(folder)}, whose path is too long for sockets in it; set RAY_TMPDIR to a short "
            "one, as in RAY_TMPDIR=/tmp"
        )
    if not writable(Path(folder)):
        raise RunError(
            f"Ray's folder is {printable(folder)}, where this user may not write; set RAY_TMPDIR to a folder of your "
            "own"
        )
    limit, store = file_limit(), STORE_SHARE * psutil.virtual_memory().available
    with suppress(OSError):
        store = min(store, shutil.disk_usage("/dev/shm").total)
    if limit is not None and limit < store:
        raise RunError(
            f"this process may write files of {limit:,} bytes at most (`ulimit -f`), and Ray's object store is a file "
            f"of about {store:,.0f}; raise the limit with `ulimit -f unlimited`"
        )
    for what, path in (("the working directory", os.getcwd()), ("Ray's folder", folder)):
        try:
            path.encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{what} is {printable(path)}, whose name is no UTF-8, and Ray cannot tell its workers about it; "
                "start from another folder with another RAY_TMPDIR, or rename it"
            ) from None


def file_limit() -> int | None:
    """Bytes that a file of this process may have; None for any number."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def writable(folder: Path) -> bool:
    """Whether a folder, or the nearest one above it that there is, takes files of ours."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def cannot_start(error: BaseException) -> RunError:
    """Why a local Ray did not start."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"a local Ray could not be started in {ray_folder()}: the disk is full; make room, or set RAY_TMPDIR"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return RunError(
        f"a local Ray could not be started ({printable(reason)}); its logs are in {ray_folder()}/session_latest/logs, "
        "and RAY_TMPDIR=FOLDER lets it use another folder"
    )


@contextmanager
def entrypoint_in_text() -> Iterator[None]:
    """Let a command line reach Ray that holds bytes which are no UTF-8: Ray 2.60 tells its dashboard about it."""
    original: Callable[[], str] = utils.get_entrypoint_name
    utils.get_entrypoint_name = lambda: printable(original(), None)
    try:
        yield
    finally:
        utils.get_entrypoint_name = original
