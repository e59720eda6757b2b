"""Spot notices: ask the cloud's metadata service whether this node will be reclaimed, and then have Ray drain it.

Ray hears of no notice by itself. A node that drains gets no new work, and leaves the cluster when what it has is done.
AWS: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html; Google Cloud:
https://cloud.google.com/compute/docs/instances/spot. Ray itself is not imported: this process stays on each node.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil

from ray_sampler.errors import RunError, printable, require

POLL_S = 2.0
"""Seconds between two questions: AWS gives two minutes, Google thirty seconds."""

ANSWER_S = 5.0
"""Seconds in which a metadata service answers; it is on the same host."""

GOOGLE_S = 30.0
"""Seconds that Google gives a spot machine at most once it says that it is preempted."""

DRAIN_S = 30.0
"""Seconds that `ray drain-node` may take: most of a second is Ray's import."""


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
    """What a metadata service answers; None where it has nothing of that name.

    Raises:
        OSError, HTTPException: its answer is unexpected.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # which would ask about its own machine
    try:
        with opener.open(urllib.request.Request(url, headers=dict(headers), method=method), timeout=ANSWER_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.NOT_FOUND:
            raise
        return None


def aws_notice() -> float | None:
    """Seconds until AWS reclaims this machine; None without a notice. Uses version 2 of its metadata service."""
    service = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/") + "/latest"
    token = ask(f"{service}/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    notice = ask(f"{service}/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    if notice is None:
        return None
    goes = datetime.fromisoformat(json.loads(notice)["time"].replace("Z", "+00:00"))
    return max(0.0, (goes - datetime.now(UTC)).total_seconds())


def google_notice() -> float | None:
    """Seconds until Google reclaims this machine, about; None without a notice."""
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    return GOOGLE_S if ask(url, {"Metadata-Flavor": "Google"}) == "TRUE" else None


CLOUDS: dict[str, Callable[[], float | None]] = {"aws": aws_notice, "gcp": google_notice}


def raylets(node_id: str | None) -> Iterator[tuple[psutil.Process, str, str]]:
    """The Ray nodes of this machine, or that one of them: process, id and their cluster's address."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            program, *arguments = process.cmdline() or [""]
            flags = dict(argument.lstrip("-").split("=", 1) for argument in arguments if "=" in argument)
            if Path(program).name == "raylet" and node_id in (None, flags.get("node_id")):
                yield process, flags["node_id"], flags["gcs-address"]


def drain(seconds: float, node_id: str | None) -> list[psutil.Process]:
    """Have Ray give this machine's nodes no more work, as they go in `seconds`; returns their processes.

    Raises:
        RunError: Ray runs none here, or does not answer.
    """
    drained = []
    for process, name, address in list(raylets(node_id)):
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address, "--node-id", name]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the node is about to go"]
        command += ["--deadline-remaining-seconds", str(int(seconds))]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=DRAIN_S)
        except subprocess.CalledProcessError as error:
            said = error.stderr.strip().splitlines()[-1:] or [f"exit code {error.returncode}"]
            raise RunError(f"Ray did not drain node {name}: {printable(said[0])}") from error
        except subprocess.TimeoutExpired as error:
            raise RunError(f"Ray did not drain node {name}: the cluster at {address} does not answer") from error
        drained.append(process)
    if not drained:
        which = f"no node {node_id}" if node_id else "no node"
        raise RunError(f"Ray runs {which} on this machine; start it with `ray start`")
    return drained


def leave_when(when: str, seconds: str, node_id: str | None) -> None:
    """Drain this machine's Ray nodes once a cloud says that it goes, or now.

    Args:
        when: a cloud, or "now".
        seconds: of "now": how long the machine stays.
        node_id: one of the nodes; all of them where it is None.

    Raises:
        RequestError: an argument is wrong.
        RunError: of "now": Ray runs no such node here, or does not answer.
    """
    require(when in (*CLOUDS, "now"), f"`ray-sampler spot` takes one of aws, gcp and now, not {when!r}")
    try:
        stays = float(seconds)
    except ValueError:
        stays = -1.0
    require(0 <= stays < float("inf"), f"--seconds is {seconds!r}; it must be a number of seconds, 0 or more")
    if when in CLOUDS:
        watch(when, node_id)
        return
    began = time.monotonic()
    nodes = drain(stays, node_id)
    # A node leaves when what it has is done.
    psutil.wait_procs(nodes, timeout=max(0.0, began + stays - time.monotonic()))


def watch(cloud: str, node_id: str | None) -> None:
    """Ask until the cloud says that this machine goes, and drain its Ray nodes; what fails meanwhile is said once."""
    said = None
    while True:
        try:
            if (seconds := CLOUDS[cloud]()) is not None:
                drain(seconds, node_id)
                print(f"{cloud} takes this machine away in {seconds:.0f} s; Ray gives it no more work", flush=True)
                return
        except (OSError, http.client.HTTPException, ValueError, KeyError, RunError) as error:
            if said != (said := printable(error)):
                print(f"asking again every {POLL_S:.0f} s: {said}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
