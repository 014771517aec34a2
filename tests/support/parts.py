"""A gateway and its processes by name, for tests that kill one of them, or look at what it holds."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from .gateway import BOTH_DOORS, HAPROXY, START, Gateway, family, listening, wait_for


class Running:
    """A gateway, and all of its processes by name. `ports` are those of the doors."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway, self.ports = gateway, (gateway.port, gateway.port + 1)
        self.named: dict[str, psutil.Process] = {}
        self.all: list[psutil.Process] = []

    def find(self) -> bool:
        """Look for the processes, the oldest first: one that is being made still has its maker's name. Whether all are there."""
        self.all, self.named = family(self.gateway.process.pid), {}
        for each in sorted(self.all, key=lambda process: (process.create_time(), process.pid)):
            with contextlib.suppress(psutil.NoSuchProcess):
                line = ["", *each.cmdline(), ""]
                names = {"deploy/start": "start", "run.yaml": "server", "-db": "HAProxy"}
                found = {names.get(word) for word in line} - {None} or ({"watchdog"} if "kill -KILL 0" in line[-2] else set())
                for name in found:
                    self.named.setdefault(name, each)
        return self.named.keys() >= {"start", "server", "watchdog"} | ({"HAProxy"} if HAPROXY else set())

    def assert_gone(self) -> None:
        """All of it ends, and nobody listens on its ports."""
        _, alive = psutil.wait_procs(self.all, 20)
        left = [" ".join(each.cmdline()) for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"still there: {left}"
        assert not [port for port in self.ports if listening(port)]


@contextlib.contextmanager
def just_begun(home: Path, command: tuple[str, ...] = START, **settings: str) -> Iterator[Running]:
    """A gateway of which all processes have just been started, and none can take a call yet."""
    gateway = Gateway(home, command, **BOTH_DOORS | settings)
    gateway.launch()
    found = Running(gateway)
    try:
        wait_for(found.find, seen=lambda: f"{found.named}: {gateway.log}")
        yield found
    finally:
        gateway.stop(3)


@contextlib.contextmanager
def running(home: Path, command: tuple[str, ...] = START, **settings: str) -> Iterator[Running]:
    """A gateway that takes calls."""
    with Gateway(home, command, **settings) as gateway:
        found = Running(gateway)
        found.find()
        yield found


def can_listen(address: str, port: int) -> bool:
    """Whether somebody else could listen there, if only beside who does."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as rival:
        for shared in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            rival.setsockopt(socket.SOL_SOCKET, shared, 1)
        try:
            rival.bind((address, port))
            rival.listen()
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True
