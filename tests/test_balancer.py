"""Two gateways behind HAProxy: what callers notice of a rolling restart, and of a machine that is lost."""

import asyncio
import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import httpx
import pytest
import yaml
from world.calls import ALL_KEYS, MODELS, chat
from world.gateway import HAPROXY, PROJECT, SERVE, Gateway, clean_environ, eventually, free_port
from world.vendors import Vendors


class Call(NamedTuple):
    """One call of the load: when it began and ended on `time.monotonic`, and what was wrong with its answer."""

    stream: bool
    began: float
    ended: float
    wrong: str | None


class Load:
    """Callers that each make one call after the other, regular or streamed, until the context ends.

    A streamed answer takes about 4 s. An answer is whole if it has a finish_reason.
    """

    def __init__(self, url: str, callers: int = 4) -> None:
        self.url, self.callers = url, callers
        self.calls: list[Call] = []

    async def call(self, client: httpx.AsyncClient, stream: bool) -> None:
        """Make one call and write down how it went."""
        began, wrong = time.monotonic(), None
        body = chat("openai/slow", "count to four", stream=True) if stream else chat(MODELS[0])
        try:
            response = await client.post("/v1/chat/completions", headers=ALL_KEYS, json=body)
            if not response.is_success or not re.search(r'"finish_reason": ?"stop"', response.text):
                wrong = f"{response.status_code} {response.text[-200:]}"
        except httpx.HTTPError as error:
            wrong = repr(error)
        self.calls.append(Call(stream, began, time.monotonic(), wrong))

    async def run(self) -> None:
        """Keep every caller busy until the context ends."""

        async def caller(stream: bool) -> None:
            while not self.ending.is_set():
                await self.call(client, stream)
                await asyncio.sleep(0.05)

        async with httpx.AsyncClient(base_url=self.url, timeout=30, trust_env=False) as client:
            await asyncio.gather(*(caller(stream) for stream in (True, False) for _ in range(self.callers)))

    @property
    def lost(self) -> list[Call]:
        return [call for call in self.calls if call.wrong]

    def __str__(self) -> str:
        streams = sum(call.stream for call in self.calls)
        return f"{len(self.calls) - streams} regular and {streams} streamed calls, {len(self.lost)} lost"

    def __enter__(self) -> Self:
        self.ending = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(),), daemon=True)
        self.thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self.thread.join(30)


class Balancer:
    """HAProxy with the configuration that ships, in front of two gateways. A context manager."""

    def __init__(self, folder: Path, gateways: dict[str, Gateway]) -> None:
        self.folder, self.socket, port = folder, folder / "admin", free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.settings = {f"GATEWAY_{name.upper()}": f"127.0.0.1:{gateway.port}" for name, gateway in gateways.items()}
        self.settings |= {"HAPROXY_BIND": f"127.0.0.1:{port}", "HAPROXY_SOCKET": str(self.socket)}

    def admin(self, command: str) -> str:
        """Say something to HAProxy's socket and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(f"{command}\n".encode())
            return connection.makefile().read()

    def wait_until_up(self, *names: str, seconds: float = 15) -> None:
        """Wait until HAProxy's own health checks have found these gateways well."""

        def up() -> bool:
            return all(re.search(rf"^gateways,{name},.*,UP,", self.admin("show stat"), re.MULTILINE) for name in names)

        assert eventually(up, seconds), self.admin("show stat")

    def __enter__(self) -> Self:
        environ = clean_environ(self.folder, **self.settings)
        command = [HAPROXY, "-f", "deploy/balancer.cfg"]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        eventually(self.socket.exists, 5)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def gateways(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """Two gateways, each with a home of its own, started as the image starts one."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    folder = tmp_path_factory.mktemp("replicas")
    pair = {name: Gateway(folder / name, command=SERVE, **vendors.environ()) for name in "ab"}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for gateway in pair.values():
            stack.callback(gateway.stop)
        list(pool.map(Gateway.start, pair.values()))
        yield pair


@pytest.fixture(scope="module")
def haproxy(gateways: dict[str, Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    """HAProxy in front of the two."""
    with Balancer(tmp_path_factory.mktemp("balancer"), gateways) as balancer:
        yield balancer


@pytest.fixture
def balancer(haproxy: Balancer, gateways: dict[str, Gateway]) -> Balancer:
    """HAProxy with both gateways up, whatever the test before has done to them."""
    for gateway in gateways.values():
        if gateway.process.poll() is not None:
            gateway.start()
    haproxy.wait_until_up(*gateways)
    return haproxy


def restart(balancer: Balancer, name: str, gateway: Gateway, announced: bool) -> None:
    """Take one gateway through a restart: SIGTERM, its streams finish, a new process, HAProxy finds it well.

    `announced` tells HAProxy beforehand, as Kubernetes tells a Service. Otherwise it learns from the refused connections.
    """
    if announced:
        balancer.admin(f"set server gateways/{name} state drain")
    gateway.stop()
    gateway.start()
    balancer.admin(f"set server gateways/{name} state ready")
    balancer.wait_until_up(name)


def kill(balancer: Balancer, gateway: Gateway, callers: int, seconds: float) -> None:
    """End one gateway without warning, with a load before and for some seconds after, and check who noticed.

    Until the process is gone, which takes its memory a moment, its socket still takes calls that nobody will answer.
    """
    with Load(balancer.url, callers) as load:
        time.sleep(2)
        killed = time.monotonic()
        gateway.signal(signal.SIGKILL)
        gateway.process.wait()
        gone = time.monotonic()
        time.sleep(seconds)
    in_hand = [call for call in load.calls if call.began < gone and call.ended > killed]
    print(f"One of two gateways killed, with {len(in_hand)} calls open at the two: {load}, all of them of those.")
    assert load.lost
    assert all(call in in_hand for call in load.lost)
    assert any(call.began > gone for call in load.calls)


@pytest.mark.parametrize("announced", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["announced", "unannounced"])
def test_a_restart_loses_no_call(balancer: Balancer, gateways: dict[str, Gateway], announced: bool) -> None:
    before = gateways["a"].process.pid
    with Load(balancer.url) as load:
        restart(balancer, "a", gateways["a"], announced)
    assert gateways["a"].process.pid != before
    assert {call.stream for call in load.calls} == {True, False}
    assert load.lost == []


def test_memory_under_load_is_less_than_a_pod_asks_for(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    pod = yaml.safe_load((PROJECT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    requested = int(pod["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi"))
    status = Path(f"/proc/{gateways['b'].process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024 < requested


def test_a_killed_gateway_loses_what_it_had_in_hand_and_no_more(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    kill(balancer, gateways["b"], callers=4, seconds=3)


@pytest.mark.slow
def test_three_rolling_restarts_and_two_kills(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    """The figures in the README come from here: `make rolling` prints them."""
    with Load(balancer.url, callers=8) as load:
        for _ in range(3):
            for name, gateway in gateways.items():
                restart(balancer, name, gateway, announced=True)
    print(f"\nThree rolling restarts of two gateways: {load}.")
    assert load.lost == []
    for victim in gateways.values():
        kill(balancer, victim, callers=8, seconds=5)
        victim.start()
        balancer.wait_until_up(*gateways)
