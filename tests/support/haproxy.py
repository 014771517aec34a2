"""HAProxy with the configuration that ships, and what stands in for a gateway behind it."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from .gateway import HAPROXY, PROJECT, clean_environ, eventually, free_port, wait_for
from .vendors import InBackground

NEEDS_HAPROXY = pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (Debian: apt-get install haproxy)")

CONFIGURATION = PROJECT / "deploy" / "haproxy"
SIDECAR = ("global", "vendors", "egress")
BALANCER = ("global", "vendors", "front")
BOTH = (*SIDECAR, "front")


class HAProxy:
    """HAProxy with some of the files that ship and some settings. A context manager.

    `url` is the front's address, `egress` the egress door's. It is started in another folder than its configuration's.
    `waits` are shorter ones than those that ship, such as {"timeout server": "1s"}: each is in the files once.
    """

    def __init__(
        self, folder: Path, files: tuple[str, ...] = BOTH, waits: Mapping[str, str] | None = None, **settings: str
    ) -> None:
        self.folder, self.files, self.waits = folder, files, waits or {}
        self.log_file, self.socket = folder / "haproxy.log", folder / "admin"
        self.port, self.egress_port = free_port(), free_port()
        self.url = f"{'https' if 'FRONT_CRT' in settings else 'http'}://127.0.0.1:{self.port}"
        self.egress = f"http://127.0.0.1:{self.egress_port}"
        self.settings = {
            "FRONT_BIND": f"127.0.0.1:{self.port}",
            "EGRESS_PORT": str(self.egress_port),
            "HAPROXY_SOCKET": str(self.socket),
        } | settings

    def start(self, mode: str = "-db", **more: Any) -> None:
        """Start the process, and wait for nothing. `more` goes to Popen. With `-c` it checks the files and exits."""
        self.folder.mkdir(exist_ok=True)
        configuration = self.with_shorter_waits() if self.waits else CONFIGURATION
        command = [HAPROXY, mode, *(word for name in self.files for word in ("-f", str(configuration / f"{name}.cfg")))]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=clean_environ(self.folder, **self.settings), stdout=log, stderr=log, **more
            )

    def with_shorter_waits(self) -> Path:
        """A copy of the configuration, beside a link to the page."""
        copy = shutil.copytree(CONFIGURATION, self.folder / "haproxy")
        (self.folder / "page").symlink_to(CONFIGURATION.parent / "page")
        left = dict(self.waits)
        for name in self.files:
            text = (copy / f"{name}.cfg").read_text()
            for what in [what for what in left if re.search(rf"^ *{what} \S+$", text, re.MULTILINE)]:
                text = re.sub(rf"^( *{what}) \S+$", rf"\1 {left.pop(what)}", text, count=1, flags=re.MULTILINE)
            (copy / f"{name}.cfg").write_text(text)
        assert not left, left
        return copy

    def __enter__(self) -> Self:
        self.start()
        ports = [port for name, port in {"front": self.port, "egress": self.egress_port}.items() if name in self.files]
        up = eventually(lambda: self.process.poll() is not None or (all(map(answers, ports)) and self.socket.exists()), 60)
        if not up or self.process.poll() is not None:
            self.__exit__()
            raise RuntimeError(f"HAProxy did not start:\n{self.log}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def log(self) -> str:
        """All that it has printed so far."""
        return self.log_file.read_text()

    def lines(self, **wanted: Any) -> list[dict]:
        """The calls in its log that have these fields."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if wanted.items() <= line.items()]

    def logged(self, seconds: float = 60, **wanted: Any) -> None:
        """Wait until a call with these fields is in the log."""
        wait_for(lambda: self.lines(**wanted), seconds, seen=lambda: f"{wanted} is not in\n{self.log}")

    def admin(self, command: str) -> str:
        """Say something to its admin socket and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(f"{command}\n".encode())
            return connection.makefile().read()

    def wait_until_up(self, *names: str, seconds: float = 60) -> None:
        """Wait until its own health checks have found these gateways well."""

        def up() -> bool:
            return all(re.search(rf"^gateways,{name},.*,UP,", self.admin("show stat"), re.MULTILINE) for name in names)

        wait_for(up, seconds, seen=lambda: self.admin("show stat"))

    def connect(self) -> socket.socket:
        """A bare connection to the front."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, request: bytes) -> bytes:
        """What the front answers to these bytes: until the connection is closed, or the length is reached that it tells."""
        with self.connect() as connection:
            connection.sendall(request)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while (data := connection.recv(65536)) and not complete(answer := answer + data):
                    pass
        return answer


def complete(answer: bytes) -> bool:
    """Whether an answer that tells its length has come to its end."""
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return bool(length) and b"\r\n\r\n" in answer and len(body) >= int(length[1])


def answers(port: int) -> bool:
    """Whether something takes connections at this port of loopback."""
    with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Recorder(InBackground):
    """What stands in for a gateway where a test must see what one gets. A context manager.

    `heads` are the requests that came, as sent, without health checks. `mode` is what happens to them: "answer" with `answer`,
    "close" the connection without an answer, or "stall"; "once" answers, and closes when the next request comes on the connection.
    `alive` counts the connections that wait for an answer. Unless `healthy`, health checks are closed without an answer.
    """

    def __init__(self, mode: str = "answer", answer: bytes = OK) -> None:
        self.mode, self.answer = mode, answer
        self.heads: list[str] = []
        self.alive, self.healthy = 0, True

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self.port}"

    def headers(self) -> httpx.Headers:
        """The headers of the last request."""
        return httpx.Headers([line.split(": ", 1) for line in self.heads[-1].split("\r\n")[1:] if line])

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, with one request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            length = re.search(r"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            health = "/v1/health" in head
            if not health:
                self.heads.append(head)
            if health and not self.healthy:
                pass
            elif self.mode in ("answer", "once") or health:
                writer.write(OK if health else self.answer)
                await writer.drain()
                if self.mode == "once":
                    await reader.read(1)
            elif self.mode == "stall":
                self.alive += 1
                try:
                    await reader.read()
                finally:
                    self.alive -= 1
        writer.close()

    async def serve(self) -> None:
        """Listen until `stop` is set."""
        server = await asyncio.start_server(self.connected, "127.0.0.1", backlog=1024, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()
