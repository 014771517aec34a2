"""Two gateways behind HAProxy: what callers notice of a rolling restart, and of a machine that is lost."""

import asyncio
import contextlib
import re
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import pytest
import trustme
import yaml
from support.calls import ALL_KEYS, MODELS, caller, chat, one_by_one, one_key
from support.gateway import HAPROXY, PROJECT, START, Gateway, clean_environ, eventually, free_port, listening, wait_for
from support.load import Load
from support.vendors import InBackground, Vendors

# A streamed answer of about 4 s beside regular ones.
BODIES = (chat("openai/slow", "count to four", stream=True), chat(MODELS[0]))


class Recorder(InBackground):
    """What stands in for a gateway where a test must see what one gets. A context manager.

    `heads` are the requests that came, as sent, without health checks. `mode` is what happens to them: "answer", "close" the
    connection without an answer, or "stall". `alive` counts the connections that wait for an answer.
    """

    def __init__(self, mode: str = "answer") -> None:
        self.mode, self.heads, self.alive = mode, [], 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, with one request."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            health = "/v1/health" in head
            if not health:
                self.heads.append(head)
            if self.mode == "answer" or health:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
            elif self.mode == "stall":
                self.alive += 1
                try:
                    await reader.read()
                finally:
                    self.alive -= 1
        writer.close()

    async def serve(self) -> None:
        """Listen until `stop` is set."""
        server = await asyncio.start_server(self.connected, "127.0.0.1", backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()


class Balancer:
    """HAProxy with the configuration that ships, in front of `gateways`. A context manager."""

    def __init__(self, folder: Path, gateways: dict[str, Gateway | Recorder], **settings: str) -> None:
        self.folder, self.socket, self.port = folder, folder / "admin", free_port()
        self.url = f"{'https' if 'HAPROXY_CRT' in settings else 'http'}://127.0.0.1:{self.port}"
        self.settings = {f"GATEWAY_{name.upper()}": f"127.0.0.1:{gateway.port}" for name, gateway in gateways.items()}
        self.settings |= {"HAPROXY_BIND": f"127.0.0.1:{self.port}", "HAPROXY_SOCKET": str(self.socket)} | settings

    def admin(self, command: str) -> str:
        """Say something to HAProxy's socket and return the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.socket))
            connection.sendall(f"{command}\n".encode())
            return connection.makefile().read()

    def wait_until_up(self, *names: str, seconds: float = 60) -> None:
        """Wait until HAProxy's own health checks have found these gateways well."""

        def up() -> bool:
            return all(re.search(rf"^gateways,{name},.*,UP,", self.admin("show stat"), re.MULTILINE) for name in names)

        assert eventually(up, seconds), self.admin("show stat")

    def __enter__(self) -> Self:
        environ = clean_environ(self.folder, **self.settings)
        command = [HAPROXY, "-f", "deploy/balancer.cfg"]
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=PROJECT, env=environ, stdout=log, stderr=subprocess.STDOUT)
        assert eventually(self.listens), (self.folder / "log").read_text()
        return self

    def listens(self) -> bool:
        with contextlib.suppress(ConnectionError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def gateways(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Gateway]]:
    """Two gateways, each with a home of its own, started as the image starts one."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    folder = tmp_path_factory.mktemp("replicas")
    pair = {name: Gateway(folder / name, command=START, **vendors.environ()) for name in "ab"}
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


def kill(balancer: Balancer, gateways: dict[str, Gateway], name: str, callers: int, calls: int) -> None:
    """End one gateway without warning, with a load before and for some calls after, and check who noticed.

    One stream is led to it and would never end. Its socket takes calls that nobody will answer until the last of its threads is
    gone, some time after the process looks dead.
    """
    stall = {"headers": ALL_KEYS, "json": chat("openai/stall", stream=True)}
    others = [other for other in gateways if other != name]
    for other in others:
        balancer.admin(f"set server gateways/{other} state drain")
    with caller(balancer.url, timeout=60) as client, client.stream("POST", "/v1/chat/completions", **stall) as stream:
        lines = stream.iter_lines()
        assert next(lines)
        for other in others:
            balancer.admin(f"set server gateways/{other} state ready")
        with Load(balancer.url, BODIES, callers) as load:
            load.wait_for_calls()
            killed = time.monotonic()
            gateways[name].signal(signal.SIGKILL)
            wait_for(lambda: not listening(gateways[name].port))
            gone = time.monotonic()
            load.wait_for_calls(calls)
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    in_hand = [call for call in load.calls if call.began < gone and call.ended > killed]
    print(f"One of two gateways killed, with {len(in_hand)} calls open at the two: {load}, all of them of those.")
    assert [call for call in load.lost if call not in in_hand] == []
    assert any(call.began > gone for call in load.calls)


@pytest.fixture
def client(balancer: Balancer) -> Iterator[httpx.Client]:
    """A caller of the two gateways."""
    with caller(balancer.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def tls(gateways: dict[str, Gateway], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A caller of a balancer that speaks HTTPS, and needs neither a second gateway nor an admin socket."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(folder / "crt.pem")
    balancer = Balancer(folder, {"a": gateways["a"]}, HAPROXY_CRT=str(folder / "crt.pem"))
    del balancer.settings["HAPROXY_SOCKET"]
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with balancer, caller(balancer.url, timeout=60, verify=trust) as client:
        assert eventually(lambda: client.get("/v1/health").is_success, 60)
        yield client


@contextlib.contextmanager
def recorded(folder: Path, mode: str = "answer", **settings: str) -> Iterator[tuple[httpx.Client, Recorder]]:
    """A caller of a balancer in front of two servers that are one recorder, and the recorder."""
    if not HAPROXY:
        pytest.skip("HAProxy is not installed (Debian: apt-get install haproxy)")
    with (
        Recorder(mode) as recorder,
        Balancer(folder, {"a": recorder, "b": recorder}, **settings) as balancer,
        caller(balancer.url, timeout=60) as client,
    ):
        yield client, recorder


def raw(client: httpx.Client) -> socket.socket:
    """A bare connection to where the client calls."""
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=60)


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1/chat/completions//"])
def test_a_slash_too_many_makes_no_difference(tls: httpx.Client, path: str) -> None:
    """The stock server would redirect the call, with its keys, to http://."""
    response = tls.post(path, headers=ALL_KEYS, json=chat(MODELS[0]))
    assert response.status_code == 200
    assert response.json()["choices"]


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models%2F", "/v1/chat/completions%2f", "//", "/docs/", "/docs%2F"])
def test_no_redirect_gets_out(tls: httpx.Client, path: str) -> None:
    response = tls.get(path, headers=ALL_KEYS)
    assert not response.is_redirect
    assert "location" not in response.headers


@pytest.mark.parametrize("name", ["rebound.example", "localhost.rebound.example", "127.0.0.1.rebound.example", ""])
def test_a_name_that_is_not_its_own_is_refused(tmp_path: Path, name: str) -> None:
    """A page that has led its own name to this address could otherwise call."""
    with recorded(tmp_path, HAPROXY_HOSTS="gateway.example other.example") as (client, recorder):
        assert client.get("/v1/models", headers={"Host": name}).status_code == 421
        assert not recorder.heads
        for right in ("gateway.example", "other.example:8320", "localhost:8320", "LOCALHOST", "127.0.0.1", "[::1]:8320"):
            assert client.get("/v1/models", headers={"Host": right}).status_code == 200


def test_without_names_it_goes_by_its_address_alone(tmp_path: Path) -> None:
    with recorded(tmp_path) as (client, _):
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": ""}).status_code == 421
        assert client.get("/v1/models", headers={"Host": "gateway.example"}).status_code == 421


def test_a_gateway_learns_the_callers_address_from_the_balancer_alone(tmp_path: Path) -> None:
    claims = {"X-Forwarded-For": "9.9.9.9", "X-Forwarded-Proto": "ftp", "Forwarded": "for=9.9.9.9", "X-Real-IP": "9.9.9.9"}
    with recorded(tmp_path) as (client, recorder):
        assert client.get("/v1/models", headers=claims).is_success
        (head,) = recorder.heads
    assert "9.9.9.9" not in head
    assert "ftp" not in head
    assert "x-forwarded-for: 127.0.0.1\r\n" in head


def test_one_key_for_one_call_is_not_handed_to_every_vendor(client: httpx.Client, vendors: Vendors) -> None:
    seen = len(vendors.seen)
    for path in ("/v1/models", "/v1/models/"):
        listed = client.get(path, headers=one_key(MODELS[0])).json()["data"]
        assert sorted(model["id"] for model in listed) == sorted(MODELS)
    assert len(vendors.seen) == seen
    assert client.post("/v1/chat/completions", headers=one_key(MODELS[0]), json=chat(MODELS[0])).is_success


def test_each_vendors_own_key_lists_its_models(client: httpx.Client) -> None:
    listed = [model["id"] for model in client.get("/v1/models", headers=ALL_KEYS).json()["data"]]
    assert "anthropic/anthropic-other" in listed


def test_tokens_arrive_as_the_gateway_sends_them(client: httpx.Client) -> None:
    assert eventually(lambda: one_by_one(client))


def test_a_call_that_a_gateway_may_have_seen_is_not_sent_again(tmp_path: Path) -> None:
    with recorded(tmp_path, "close") as (client, recorder):
        assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0])).status_code == 502
        assert len(recorder.heads) == 1


def test_a_call_that_no_gateway_takes_is_a_sentence(tmp_path: Path) -> None:
    with recorded(tmp_path, GATEWAY_A="127.0.0.1:9", GATEWAY_B="127.0.0.1:9") as (client, _):
        response = client.get("/v1/models")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "No gateway is up."


def test_who_hangs_up_frees_the_gateway(tmp_path: Path) -> None:
    with recorded(tmp_path, "stall") as (client, recorder):
        with raw(client) as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert eventually(lambda: recorder.alive == 1)
        assert eventually(lambda: recorder.alive == 0)


def test_a_body_beyond_the_limit_is_refused_and_an_image_is_not(tmp_path: Path) -> None:
    with recorded(tmp_path) as (client, recorder):
        assert client.post("/v1/responses", headers=ALL_KEYS, content=bytes(20_000_001)).status_code == 413
        assert not recorder.heads
        assert client.post("/v1/responses", headers=ALL_KEYS, content=bytes(20_000_000)).status_code == 200


def test_a_body_of_unknown_length_is_refused(tmp_path: Path) -> None:
    with recorded(tmp_path) as (client, recorder):
        assert client.post("/v1/responses", headers=ALL_KEYS, content=iter([b"{", b"}"])).status_code == 411
        assert not recorder.heads


def test_a_call_without_a_key_does_not_reach_the_server(tmp_path: Path) -> None:
    """What any page can make a browser send: no header of its own."""
    with recorded(tmp_path) as (client, recorder):
        response = client.post("/v1/chat/completions", headers={"Content-Type": "text/plain"}, content=b"{}")
        assert response.status_code == 401
        assert "X-LlamaStack-Provider-Data" in response.json()["error"]["message"]
        assert not recorder.heads


SLOW = {
    "nothing": b"",
    "half a head": b"POST /v1/chat/comp",
    "half a body": b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: x\r\nContent-Length: 9\r\n\r\n{",
}


def test_who_connects_and_does_not_ask_is_sent_away(tmp_path: Path) -> None:
    with recorded(tmp_path) as (client, recorder), contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(raw(client)) for name in SLOW}
        for name, connection in connections.items():
            connection.sendall(SLOW[name])
        for name, connection in connections.items():
            while connection.recv(1000):
                pass
            assert not recorder.heads, name


def turned_away(connection: socket.socket) -> bool:
    """Whether it was closed without a word. One that was let in stays open for a while, and is told 408 in the end."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_one_address_cannot_take_all_places(tmp_path: Path) -> None:
    with recorded(tmp_path) as (client, _), contextlib.ExitStack() as stack:
        connections = []
        for _ in range(600):
            with contextlib.suppress(ConnectionError):
                connections.append(stack.enter_context(raw(client)))
        assert len(connections) < 600 or eventually(lambda: any(map(turned_away, connections)), 20)
        other = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=other, timeout=60, trust_env=False) as elsewhere:
            assert elsewhere.get(client.base_url.join("/v1/models")).is_success


def test_nobody_elsewhere_reaches_it_unless_told() -> None:
    configuration = (PROJECT / "deploy" / "balancer.cfg").read_text()
    assert set(re.findall(r"^ *bind (\S+)", configuration, re.MULTILINE)) == {'"${HAPROXY_BIND-127.0.0.1:8320}"'}


@pytest.mark.parametrize("announced", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["announced", "unannounced"])
def test_a_restart_loses_no_call(balancer: Balancer, gateways: dict[str, Gateway], announced: bool) -> None:
    before = gateways["a"].process.pid
    with Load(balancer.url, BODIES, callers=4) as load:
        load.wait_for_calls()
        restart(balancer, "a", gateways["a"], announced)
    assert gateways["a"].process.pid != before
    assert {call.stream for call in load.calls} == {True, False}
    assert load.lost == []


def test_memory_under_load_is_less_than_a_pod_asks_for(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    pod = yaml.safe_load((PROJECT / "deploy/kubernetes/deployment.yaml").read_text())["spec"]["template"]["spec"]
    requested = int(pod["containers"][0]["resources"]["requests"]["memory"].removesuffix("Mi"))
    status = Path(f"/proc/{gateways['b'].server}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024 < requested


def test_a_killed_gateway_loses_what_it_had_in_hand_and_no_more(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    kill(balancer, gateways, "b", callers=4, calls=2)


@pytest.mark.slow
def test_three_rolling_restarts_and_two_kills(balancer: Balancer, gateways: dict[str, Gateway]) -> None:
    """The figures in the README come from here: `make rolling` prints them."""
    with Load(balancer.url, BODIES, callers=8) as load:
        load.wait_for_calls()
        for _ in range(3):
            for name, gateway in gateways.items():
                restart(balancer, name, gateway, announced=True)
    print(f"\nThree rolling restarts of two gateways: {load}.")
    assert load.lost == []
    for name, victim in gateways.items():
        kill(balancer, gateways, name, callers=8, calls=3)
        victim.start()
        balancer.wait_until_up(*gateways)
