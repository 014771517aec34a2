"""The egress proxy and its gateway start, stop and die together, and say so in sentences."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
import pytest
from support.gateway import HAPROXY, PROJECT, clean_environ, eventually, free_port

EGRESS = PROJECT / "deploy" / "egress"
needs_haproxy = pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (apt-get install haproxy)")

# A gateway that does nothing, with a worker. It says what it was sent; 5 is the exit code of its own end, 3 that of a stop.
STUB = """#!/bin/sh
sleep 300 &
worker=$!
trap 'echo stopping; until [ -e deploy/finished ]; do sleep 0.1; done; kill "$worker"; exit 3' TERM
echo "up at $OPENAI_PASSTHROUGH_URL, EGRESS=$EGRESS, $EGRESS_WAY"
until [ -e deploy/end ]; do sleep 0.1; done
kill "$worker"
exit 5
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A project whose gateway does nothing."""
    shutil.copytree(EGRESS, tmp_path / "deploy" / "egress")
    serve = tmp_path / "deploy" / "serve.sh"
    serve.write_text(STUB)
    serve.chmod(0o755)
    return tmp_path


class Start:
    """`deploy/egress/serve.sh` of the stub, in the foreground of a session of its own. A context manager that ends all of it."""

    def __init__(self, stub: Path, **more: str) -> None:
        self.port = free_port()
        self.environ = clean_environ(stub, EGRESS_PORT=str(self.port), EGRESS_NAMESERVER="127.0.0.1:9") | more
        # deploy/serve.sh, which calls the script otherwise, has looked where Debian keeps HAProxy.
        self.environ["PATH"] += f"{os.pathsep}{Path(HAPROXY or '').parent}"
        self.stub, self.log_file = stub, stub / "log"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_until_up(self) -> None:
        """Both are up: remember all processes, because some lose their parent in a test."""

        def listens() -> bool:
            with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port)):
                return True
            return False

        assert eventually(lambda: "up at" in self.log and listens(), 60), self.log
        self.proxy = next(p for p in self.process.children(recursive=True) if p.name() == "haproxy")
        self.gateway = next(p for p in self.process.children() if p.cmdline()[-1] == "deploy/serve.sh")
        self.worker = next(p for p in self.gateway.children() if p.cmdline() == ["sleep", "300"])
        self.all = [self.process, *self.process.children(recursive=True)]

    def ends(self, *processes: psutil.Process) -> bool:
        """Whether these processes, or all, end."""
        _, alive = psutil.wait_procs(processes or self.all, 60)
        return not alive

    def __enter__(self) -> Self:
        with self.log_file.open("w") as log:
            script = str(self.stub / "deploy" / "egress" / "serve.sh")
            self.process = psutil.Popen([script], env=self.environ, stdout=log, stderr=log, start_new_session=True)
        self.all = [self.process]
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.all += self.process.children(recursive=True)
        for process in self.all:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def running(stub: Path) -> Iterator[Start]:
    """The stub and its proxy, up."""
    with Start(stub) as running:
        running.wait_until_up()
        yield running


@needs_haproxy
def test_when_the_gateway_ends_so_does_the_proxy_and_its_code_is_told(running: Start) -> None:
    (running.stub / "deploy" / "end").touch()
    assert running.process.wait(60) == 5
    assert running.ends()
    assert len(running.log.splitlines()) == 1


@needs_haproxy
def test_when_the_proxy_is_killed_so_is_the_gateway_with_all_workers(running: Start) -> None:
    running.proxy.kill()
    assert running.process.wait(60) == 1
    assert running.ends()
    assert running.log.endswith("The egress proxy has stopped, and the gateway with it.\n")
    assert "stopping" not in running.log


@needs_haproxy
def test_when_the_script_is_killed_the_proxy_is_still_watched(running: Start) -> None:
    running.process.kill()
    running.process.wait()
    assert running.proxy.is_running()
    running.proxy.kill()
    assert running.ends(running.gateway, running.worker)


@needs_haproxy
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_the_proxy_serves_until_the_gateway_has_finished(running: Start, number: signal.Signals) -> None:
    running.process.send_signal(number)
    assert eventually(lambda: "stopping" in running.log)
    assert running.proxy.is_running()
    with socket.create_connection(("127.0.0.1", running.port)):
        (running.stub / "deploy" / "finished").touch()
        assert running.process.wait(60) == 3
    assert running.ends()
    assert running.log.splitlines()[1:] == ["stopping"]


@needs_haproxy
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_leaves_the_proxy_too(running: Start, number: signal.Signals) -> None:
    """As a service manager stops a service."""
    for process in (running.proxy, running.proxy.parent()):
        process.send_signal(number)
    running.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: "stopping" in running.log)
    with socket.create_connection(("127.0.0.1", running.port)):
        (running.stub / "deploy" / "finished").touch()
    assert running.process.wait(60) == 3
    assert running.ends()


@needs_haproxy
def test_a_second_interrupt_ends_all_at_once(running: Start) -> None:
    running.process.send_signal(signal.SIGINT)
    assert eventually(lambda: "stopping" in running.log)
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(60)
    assert running.ends()


@needs_haproxy
def test_the_gateway_is_started_once_more_without_a_proxy_of_its_own(running: Start) -> None:
    way = f"through the egress proxy on port {running.port}"
    assert running.log == f"up at http://127.0.0.1:{running.port}/openai, EGRESS=0, {way}\n"


def refused(project: Path, **more: str) -> str:
    """What a start that is refused says: one sentence or two on one line."""
    environ = clean_environ(project, LLAMA_STACK_PORT=str(free_port()), EGRESS="1") | more
    done = subprocess.run(["deploy/serve.sh"], cwd=project, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    return done.stderr


@needs_haproxy
def test_a_port_that_is_taken_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as rival:
        port = str(rival.getsockname()[1])
        said = refused(PROJECT, EGRESS_PORT=port)
    assert said == f"Port {port}, where the egress proxy is to listen, is in use. Choose another with EGRESS_PORT.\n"


@needs_haproxy
def test_its_port_is_the_next_one() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        assert refused(PROJECT, LLAMA_STACK_PORT=str(port)).startswith(f"Port {port + 1}, where the egress proxy")


@needs_haproxy
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_that_the_environment_demands_is_refused_with_advice(name: str) -> None:
    said = refused(PROJECT, **{name: "http://proxy.example:3128"})
    assert "HTTPS_PROXY" in said
    assert "EGRESS=0" in said
    assert "proxy.example" not in said


def with_tools(project: Path, haproxy: str | None) -> str:
    """A search path with the shell's tools and, if given, a HAProxy that says this as its version."""
    script = project / "deploy" / "serve.sh"
    script.write_text(script.read_text().replace(":/usr/local/sbin:/usr/sbin", ""))
    tools = project / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname", "env", "sed", "head", "grep", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    if haproxy:
        (tools / "haproxy").write_text(f"#!/bin/sh\n[ \"$1\" != -v ] || {{ echo '{haproxy}' && exit; }}\nexec sleep 60\n")
        (tools / "haproxy").chmod(0o755)
    return str(tools)


def test_without_haproxy_a_sentence_says_how_to_install_it(project: Path) -> None:
    said = refused(project, PATH=with_tools(project, None))
    for hint in ("apt-get install haproxy", "dnf install haproxy", "brew install haproxy", "EGRESS=0"):
        assert hint in said


@pytest.mark.parametrize(
    "version", ["HA-Proxy version 1.8.8", "HA-Proxy version 2.2.9-2+deb11u6 2023/08/17", "HAProxy version 2.5.14"]
)
def test_a_haproxy_that_is_too_old_is_a_sentence(project: Path, version: str) -> None:
    assert "needs HAProxy 2.6 or later" in refused(project, PATH=with_tools(project, version))


@pytest.mark.parametrize(
    "version", ["HAProxy version 2.6.12-1+deb12u4 2026/10/17", "HAProxy version 2.10.1", "HAProxy version 3.0.5-8e879a5"]
)
def test_a_newer_haproxy_is_not_too_old(project: Path, version: str) -> None:
    """The next thing that is refused comes behind it."""
    assert "HTTPS_PROXY" in refused(project, PATH=with_tools(project, version), HTTPS_PROXY="http://proxy.example")


@pytest.mark.parametrize(
    ("version", "way"),
    [
        pytest.param("HAProxy version 2.6.12", "through the egress proxy on port", id="a new one"),
        pytest.param("HAProxy version 2.4.24", "straight to the vendors", id="an old one"),
        pytest.param(None, "straight to the vendors", id="none"),
    ],
)
def test_it_is_used_wherever_haproxy_is_new_enough(project: Path, version: str | None, way: str) -> None:
    """The first line of a start says which of the two runs."""
    tools = with_tools(project, version)
    for tool in ("date", "id", "find", "tail", "rm", "mv", "mkdir", "mkfifo", "sleep", "setsid"):
        (project / "tools" / tool).symlink_to(shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"))
    shutil.copytree(EGRESS, project / "deploy" / "egress")
    python = project / "tools" / "python"  # The server ends at once.
    python.write_text(f'#!/bin/sh\ncase "$*" in *run.yaml) exit 0 ;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environ = clean_environ(project, LLAMA_STACK_PORT=str(free_port())) | {"PATH": tools}
    done = subprocess.run(["deploy/serve.sh"], cwd=project, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert f"Calls go {way}" in done.stdout
