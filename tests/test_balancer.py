"""Two gateways behind HAProxy: what callers notice of a rolling restart, and of a machine that is lost."""

import asyncio
import contextlib
import re
import shutil
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
from conftest import ALL_KEYS, MODELS, chat
from gateway import PROJECT, Gateway, clean_environ, free_port
from vendors import Vendors


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
        self.open = 0

    async def call(self, client: httpx.AsyncClient, stream: bool) -> None:
        """Make one call and write down how it went."""
        began, wrong = time.monotonic(), None
        body = chat("openai/slow", "count to four", stream=True) if stream else chat(MODELS[0])
        self.open += 1
        try:
            response = await client.post("/v1/chat/completions", headers=ALL_KEYS, json=body)
            if not response.is_success or not re.search(r'"finish_reason": ?"stop"', response.text):
                wrong = f"{response.status_code} {response.text[-200:]}"
        except httpx.HTTPError as error:
            wrong = repr(error)
        self.open -= 1
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
        deadline = time.monotonic() + seconds
        while not all(re.search(rf"^gateways,{name},.*,UP,", self.admin("show stat"), re.MULTILINE) for name in names):
            assert time.monotonic() < deadline, self.admin("show stat")
            time.sleep(0.1)

    def __enter__(self) -> Self:
        environ = clean_environ(self.folder, **self.settings)
        self.process = subprocess.Popen(["haproxy", "-f", "deploy/haproxy.cfg"], cwd=PROJECT, env=environ)
        deadline = time.monotonic() + 5
        while not self.socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def gateways(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """Two gateways, each with a home of its own, started as the image starts one."""
    if not shutil.which("haproxy"):
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    folder = tmp_path_factory.mktemp("replicas")
    pair = {name: Gateway(folder / name, command=("deploy/serve.sh",), **vendors.environ()) for name in "ab"}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        for gateway in pair.values():
            stack.callback(gateway.stop)
        list(pool.map(Gateway.start, pair.values()))
        yield pair


@pytest.fixture(scope="module")
def balancer(gateways: dict[str, Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Balancer]:
    with Balancer(tmp_path_factory.mktemp("balancer"), gateways) as balancer:
        balancer.wait_until_up(*gateways)
        yield balancer


def test_a_rolling_restart_loses_no_call(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    pids = [gateway.process.pid for gateway in gateways.values()]
    with Load(balancer.url) as load:
        for name, gateway in gateways.items():
            balancer.admin(f"set server gateways/{name} state drain")
            gateway.stop()
            gateway.start()
            balancer.admin(f"set server gateways/{name} state ready")
            balancer.wait_until_up(name)
            time.sleep(1)
    print(f"\nRolling restart of two gateways: {load}")
    assert not set(pids) & {gateway.process.pid for gateway in gateways.values()}
    assert sum(call.stream for call in load.calls) > 8
    assert load.lost == []


def test_a_restart_without_notice_loses_no_call(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    """From SIGTERM on a gateway refuses connections, and HAProxy takes refused calls to the other one."""
    with Load(balancer.url) as load:
        gateways["a"].stop()
        gateways["a"].start()
        balancer.wait_until_up("a")
    print(f"\nRestart of one gateway, unannounced: {load}")
    assert load.lost == []


def test_a_killed_gateway_loses_what_it_had_in_hand_and_no_more(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    with Load(balancer.url) as load:
        time.sleep(2)
        in_hand, killed = load.open, time.monotonic()
        gateways["a"].signal(signal.SIGKILL)
        time.sleep(5)
    print(f"\nOne of two gateways killed with {in_hand} calls open: {load}")
    assert 0 < len(load.lost) <= in_hand
    assert all(call.began < killed for call in load.lost)
    assert len([call for call in load.calls if call.began > killed]) > 20
    gateways["a"].start()
    balancer.wait_until_up("a")


def test_a_pod_may_use_the_memory_that_a_gateway_under_load_takes(gateways: dict[str, Gateway]) -> None:
    pod = yaml.safe_load((PROJECT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    requested = int(pod["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi"))
    for gateway in gateways.values():
        status = Path(f"/proc/{gateway.process.pid}/status").read_text()
        used = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024
        print(f"\nA gateway's memory at its largest: {used} MiB")
        assert used < requested
