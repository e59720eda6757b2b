"""A cluster that cannot be joined: what was given, from where, and what is there instead, in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ray_sampler.cluster.joining import cannot_join
from tests.cluster.processes import PATIENCE_S, kill_session
from tests.cluster.runs import flags_of
from tests.conftest import ROOT, Configure
from tests.ports import free_ports


def test_of_another_version_both_are_named():
    error = RuntimeError(
        "Version mismatch: The cluster was started with:\n    Ray: 2.59.1\n    Python: 3.11.7\n"
        "This process on node 1.2.3.4 was started with:\n    Ray: 2.60.0\n    Python: 3.11.7\n"
    )
    said = str(cannot_join(error, "--address is 'head:6379'"))
    for named in ("--address is 'head:6379': ", "Ray 2.59.1", "Ray 2.60.0", "pip install 'ray[default]==2.59.1'"):
        assert named in said
    said = str(cannot_join(RuntimeError(str(error).replace("2.59.1", "2.60.0").replace("3.11.7", "3.12.1", 1)), "x"))
    for named in ("Python 3.12.1", "Python 3.11.7", "use Python 3.12.1 here"):
        assert named in said


def ask(configure: Configure, address: str | None, script: str = "", **variables: str) -> tuple[int, list[str]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    if "RAY_ADDRESS" not in variables:
        environment.pop("RAY_ADDRESS", None)
    flags = flags_of(configure(address=address))
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {script}\nfrom ray_sampler.cli import main; sys.exit(main(sys.argv[1:]))",
         "sample", *flags],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-some-length-0123456789"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """A cluster's head: its own port and that of Ray clients."""
    port, client = free_ports(2)
    log = (tmp_path_factory.mktemp("head") / "log").open("wb")
    flags = [f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=1", "--include-dashboard=false"]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats", *flags],
        env=os.environ | TOKEN,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        for each in (port, client):
            deadline = time.monotonic() + PATIENCE_S
            while socket.socket().connect_ex(("127.0.0.1", each)):
                assert time.monotonic() < deadline, Path(log.name).read_text()
                time.sleep(0.2)
        yield port, client
    finally:
        kill_session(process)


@pytest.mark.accidents
def test_the_port_of_clients_is_told_from_a_cluster_s_own(configure: Configure, head: tuple[int, int]):
    code, (line,) = ask(configure, f"127.0.0.1:{head[1]}", **TOKEN)
    assert code == 2
    assert f"--address is '127.0.0.1:{head[1]}'" in line
    assert f"port {head[1]} does not answer as a cluster's head does" in line


@pytest.mark.accidents
def test_a_head_of_another_version_is_named_with_what_to_install(configure: Configure, head: tuple[int, int]):
    code, (line,) = ask(configure, f"127.0.0.1:{head[0]}", "import ray; ray.__version__ = '2.1.0'", **TOKEN)
    assert code == 2
    for named in (f"Ray {ray.__version__}", "Ray 2.1.0", f"pip install 'ray[default]=={ray.__version__}'"):
        assert named in line


@pytest.mark.accidents
def test_a_token_that_is_missing_is_asked_for(configure: Configure, head: tuple[int, int]):
    for variables in ({"RAY_AUTH_MODE": "disabled"}, TOKEN | {"RAY_AUTH_TOKEN": "another-token-0123456789-0123456"}):
        code, (line,) = ask(configure, f"127.0.0.1:{head[0]}", **variables)
        assert code == 2
        assert "export RAY_AUTH_MODE=token" in line


@pytest.mark.accidents
def test_a_wrong_variable_is_named_as_such(configure: Configure):
    code, (line,) = ask(configure, None, RAY_ADDRESS="127.0.0.1:9")
    assert code == 2
    assert line.startswith("ray-sampler: RAY_ADDRESS is '127.0.0.1:9', where no Ray cluster answers")
    assert "--address is" not in line


@pytest.mark.accidents
def test_a_web_server_s_port_is_told(configure: Configure):
    """As the dashboard is one."""
    with socket.create_server(("", 0)) as server:  # Ray takes 127.0.0.1 for this machine's own address

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        code, (line,) = ask(configure, f"127.0.0.1:{port}")
    assert code == 2
    assert f"port {port} does not answer as a cluster's head does" in line
    assert "8265 is the dashboard's" in line
