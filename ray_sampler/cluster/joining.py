"""Joining a cluster, or why it cannot be joined: Ray itself says that in pages, and after long waits."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import ray
from ray.core.generated import gcs_service_pb2

from ray_sampler.errors import RequestError, printable, require

KNOCK_S = 10.0
"""Seconds that a cluster may take to accept a connection, and to answer."""

CHECK_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""What a cluster's head answers without being joined."""

TOKEN = secrets.token_hex(32)
"""What our own Rays ask for where the user has no token; written nowhere. Ray remembers the first that it used."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
        OSError: no cluster's head is there.
        RequestError: its Ray has another version, or wants another token.
    """
    host, _, port = address.rpartition(":")
    if not host:  # "auto", which Ray looks up
        return
    host = host.strip("[]")
    if host in LOOPBACK:  # as Ray does: a cluster listens at this machine's address on its network
        host = ray.util.get_node_ip_address()
    socket.create_connection((host, int(port)), KNOCK_S).close()
    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        check_head(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")


def check_head(found: str) -> None:
    """Ask a cluster's head whether it is one. Raises as `knock` does."""
    messages: Any = gcs_service_pb2  # generated, without types
    token = given_token() if os.environ.get("RAY_AUTH_MODE", "").lower() == "token" else None
    with grpc.insecure_channel(found, [("grpc.enable_http_proxy", 0)]) as channel:
        call = channel.unary_unary(
            CHECK_ALIVE,
            request_serializer=messages.CheckAliveRequest.SerializeToString,
            response_deserializer=messages.CheckAliveReply.FromString,
        )
        try:
            metadata = [("authorization", f"Bearer {token}")] if token else []
            version = call(messages.CheckAliveRequest(), timeout=KNOCK_S, metadata=metadata).ray_version
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise RequestError(
                    "the cluster asks for a token, and none or another was given; export RAY_AUTH_MODE=token, with the "
                    "cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
                ) from error
            raise OSError(
                f"what listens on port {found.rpartition(':')[2]} does not answer as a cluster's head does "
                f"({error.code().name}); its own port is 6379 unless it was started with another, 8265 is the "
                "dashboard's, which `ray job submit` takes, and 10001 that of Ray clients"
            ) from error
    require(
        version in ("", ray.__version__),
        other_version("Ray", version, ray.__version__, "pip install 'ray[default]=={}' here"),
    )


def other_version(name: str, theirs: str, ours: str, remedy: str) -> str:
    theirs = printable(theirs)
    return (
        f"the cluster runs {name} {theirs} and this process {name} {ours}; {remedy.format(theirs)}, "
        "or install constraints.txt of this package on every node"
    )


def given_token() -> str | None:
    """The token that the user has for clusters, where Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    with suppress(OSError):
        return Path(path).read_text().strip() or None
    return None


def own_token() -> dict[str, str]:
    """Variables that let our own Ray ask for a token: the user's if there is one, as Ray remembers the first it used.

    Ray would make one and keep it under HOME, which a container may not have.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": given_token() or TOKEN}


def check_command_line() -> None:
    """Raises RequestError: an argument is not text, and Ray sends the command line to a cluster's dashboard."""
    for argument in sys.argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{printable(argument)} in the command line is not UTF-8, which Ray needs; rename the file or folder, "
                "or set PYTHONUTF8=1 where this Python uses another encoding"
            ) from None


def cannot_join(error: BaseException, given: str) -> RequestError:
    """Why a cluster cannot be joined."""
    text = str(error)
    for name, remedy in (("Ray", "pip install 'ray[default]=={}' here"), ("Python", "use Python {} here")):
        versions = re.findall(rf"{name}: (\S+)", text)
        if "ersion mismatch" in text and len(versions) >= 2 and versions[0] != versions[1]:
            return RequestError(f"{given}: {other_version(name, versions[0], versions[1], remedy)}")
    reason = text.splitlines()[0] if text else type(error).__name__
    reason += "; a cluster's own port is 6379 as a rule" * (
        isinstance(error, ConnectionRefusedError) and ":6379" not in given
    )
    return RequestError(
        f"{given}, where no Ray cluster answers ({reason}); give the address of a running one, or leave out both "
        "--address and RAY_ADDRESS to start a local Ray"
    )
