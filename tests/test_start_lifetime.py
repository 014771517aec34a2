"""A gateway is whole or gone: whatever of it ends first, in whatever way, nothing of it is left, and no port is left to others."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.callers import Stream
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat
from support.gateway import HAPROXY, PROJECT, START, Gateway, clean_environ, eventually, family, free_port, listening
from support.terminal import Terminal
from support.vendors import Vendors

pytestmark = pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (apt-get install haproxy)")

# To nowhere, and quickly: the egress door asks a name server that is not there.
NOWHERE = {"EGRESS_NAMESERVER": "127.0.0.1:9"}
SHELL = " ".join(START)


class Running:
    """A gateway with both doors, and all of its processes. `ports` are those of the two doors."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.all = family(gateway.process.pid)
        start = next(each for each in self.all if "deploy/start" in each.cmdline()[-1:])
        children = {each.name(): each for each in start.children()}
        self.named = {
            "start": start,
            "HAProxy": children["haproxy"],
            "watchdog": children["sh"],
            "server": next(each for each in start.children() if "run.yaml" in each.cmdline()),
        }
        self.ports = (gateway.port, gateway.port + 1)

    def assert_gone(self, but: tuple[psutil.Process, ...] = ()) -> None:
        """All of it has ended, and nobody listens on its ports."""
        expected = [each for each in self.all if each not in but]
        _, alive = psutil.wait_procs(expected, 20)
        left = [" ".join(each.cmdline()) for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"still there: {left}"
        assert not [port for port in self.ports if listening(port)]


@contextlib.contextmanager
def running(home: Path, command: tuple[str, ...] = START, **settings: str) -> Iterator[Running]:
    """Both doors and the server, up."""
    gateway = Gateway(home, command, **NOWHERE, **settings)
    with gateway:
        found = Running(gateway)
        try:
            yield found
        finally:
            for each in found.all:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.mark.parametrize(
    ("victim", "workers"), [("start", "2"), ("server", "2"), ("HAProxy", "1"), ("watchdog", "1")], ids=lambda value: value
)
def test_when_a_part_is_killed_nothing_is_left(tmp_path: Path, victim: str, workers: str) -> None:
    with running(tmp_path, LLAMA_STACK_WORKERS=workers) as gateway:
        gateway.named[victim].kill()
        code = gateway.gateway.process.wait(20)
        gateway.assert_gone()
        if victim != "start":
            assert code > 0
            assert f"The {victim} has ended, and the gateway with it." in gateway.gateway.log


def test_ctrl_c_into_a_pipe_leaves_nothing(tmp_path: Path) -> None:
    """`tee` dies first, so that the start has nobody to speak to."""
    with running(tmp_path, ("sh", "-c", f"{SHELL} 2>&1 | tee {tmp_path / 'log'}")) as gateway:
        gateway.gateway.signal(signal.SIGINT)
        gateway.assert_gone()


def test_a_reader_of_the_log_that_has_gone_stops_nothing(tmp_path: Path, vendors: Vendors) -> None:
    gateway = Gateway(tmp_path, ("sh", "-c", f"{SHELL} 2>&1 | head -2"), **vendors.environ())
    with gateway, caller(gateway.url) as client:
        for _ in range(5):
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success
        start = next(each for each in family(gateway.process.pid) if "deploy/start" in each.cmdline()[-1:])
        whole = [start, *start.children(recursive=True)]
        start.terminate()
        _, alive = psutil.wait_procs(whole, 20)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def test_a_reader_of_the_log_that_is_stuck_stops_nothing_and_is_told(tmp_path: Path, vendors: Vendors) -> None:
    """A pipe is full after 64 KB. Lines are dropped, and when the reader goes on it is told how many."""
    reading, writing = os.pipe()
    port = str(free_port())
    environ = clean_environ(tmp_path, LLAMA_STACK_PORT=port, FRONT="0", **vendors.environ())
    with subprocess.Popen(START, env=environ, stdout=writing, cwd=PROJECT) as start, caller(f"http://127.0.0.1:{port}") as client:
        os.close(writing)
        try:
            read = b""
            while b"The gateway answers" not in read:
                read += os.read(reading, 65536)
            for number in range(2500):
                client.get(f"/v1/{number}/{'x' * 150}")
            assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0])).is_success

            def told() -> bool:
                nonlocal read
                client.get("/v1/once-more")
                read += os.read(reading, 65536)
                return b"lines of the log are missing" in read

            assert eventually(told, 30), read[-2000:]
        finally:
            start.terminate()
            os.close(reading)
            assert start.wait(20) == 0


def test_a_closed_terminal_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    with Terminal(START, clean_environ(tmp_path, LLAMA_STACK_PORT=str(port), **NOWHERE)) as at:
        at.wait_for("The gateway answers")
        whole = family(at.process.pid)
    _, alive = psutil.wait_procs(whole, 20)
    assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]


def can_listen(rival: socket.socket, address: str, port: int) -> bool:
    """Whether a socket can be bound there, and listen."""
    try:
        rival.bind((address, port))
        rival.listen()
    except OSError as error:
        return error.errno != errno.EADDRINUSE
    return True


def test_nobody_else_gets_the_egress_port_while_the_server_lives(tmp_path: Path) -> None:
    """HAProxy is dead, and the start is kept from noticing: the server, which sends keys there, holds the port itself."""
    with running(tmp_path) as gateway:
        gateway.named["start"].suspend()
        gateway.named["HAProxy"].kill()
        assert eventually(lambda: gateway.named["HAProxy"].status() == psutil.STATUS_ZOMBIE)
        for address in ("127.0.0.1", ""):
            with socket.socket() as rival:
                rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                rival.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                assert not can_listen(rival, address, gateway.ports[1])
        gateway.named["start"].resume()
        gateway.assert_gone()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stop_lets_streams_finish_and_refuses_new_calls(tmp_path: Path, vendors: Vendors, workers: str) -> None:
    with Gateway(tmp_path, START, LLAMA_STACK_WORKERS=workers, **vendors.environ()) as gateway, caller(gateway.url) as client:
        stream = Stream(gateway, "openai/slow", "count to ten")
        gateway.process.terminate()
        assert eventually(lambda: client.get("/v1/health").status_code == 503, 10)
        assert "is stopping" in client.get("/v1/health").json()["error"]["message"]
        stream.join(60)
        assert stream.finished
        assert gateway.process.wait(20) == 0
    assert gateway.log.splitlines()[-1].count("The gateway has stopped.")
    assert os.path.exists(gateway.log_file)
