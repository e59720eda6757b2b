"""Ports for the servers that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack, suppress

PORTS = range(20_000, 32_768)
"""Above those of Ray's workers, and below those that Linux gives to every connection and to whoever asks for any port:
none of these goes to somebody else between the look and the start of its server."""


def free_ports(count: int) -> list[int]:
    """Unused ports, drawn by chance: tests in another process draw others."""
    found: list[int] = []
    with ExitStack() as held:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if len(found) == count:
                break
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("", port))
                found.append(port)
    return found
