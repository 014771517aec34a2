"""Through the egress proxy, callers get what they would get without it, over connections that stay open."""

import contextlib
import json
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import openai
import psutil
import pytest
from support.calls import ALL_KEYS, EMBEDDINGS, MODELS, caller, chat, events, message, one_by_one, streamed_text, vendor_of
from support.gateway import HAPROXY, PROJECT, PROVIDER_DATA, START, Gateway, clean_environ, eventually, free_port, listening
from support.network import NameServer, Wire
from support.vendors import KEY_VARIABLES, KEYS, VENDORS, Vendors

pytestmark = pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (apt-get install haproxy)")

EGRESS = PROJECT / "deploy" / "egress"
HOSTS = {vendor.name: host for host, vendor in VENDORS.items()}
# Where each vendor's passthrough provider sends a chat call.
PATHS = {vendor: f"/v1{'beta/openai/v1' if vendor == 'gemini' else ''}/chat/completions" for vendor in KEYS}


def settings(names: NameServer, port: int) -> dict[str, str]:
    """What leads the proxy to stand-ins at `port` instead of the vendors."""
    nameserver = f"127.0.0.1:{names.port}"
    return {"EGRESS_PORT": str(free_port()), "EGRESS_NAMESERVER": nameserver, "EGRESS_VENDOR_PORT": str(port)}


class Proxy:
    """The proxy alone, as a sidecar runs it. A context manager."""

    def __init__(self, folder: Path, environ: dict[str, str]) -> None:
        self.log_file, self.environ = folder / "proxy.log", clean_environ(folder, **environ)
        self.url = f"http://127.0.0.1:{environ['EGRESS_PORT']}"

    def log(self) -> str:
        return self.log_file.read_text()

    def post(self) -> httpx.Response:
        """A chat call to OpenAI."""
        return httpx.post(f"{self.url}/openai/v1/chat/completions", json=chat("gpt-4o"), trust_env=False, timeout=60)

    def up(self) -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return httpx.get(self.url, trust_env=False, timeout=60).status_code == 404
        return False

    def __enter__(self) -> Self:
        command = [HAPROXY, "-db", "-f", EGRESS / "haproxy.cfg"]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log)
        assert eventually(self.up), self.log()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    """The name server that the proxy asks."""
    with NameServer() as names:
        yield names


@pytest.fixture(scope="module")
def wire(vendors: Vendors) -> Iterator[Wire]:
    """The wire between the proxy and the stand-in vendors."""
    with Wire(vendors.tls_port) as wire:
        yield wire


@pytest.fixture(scope="module")
def server(vendors: Vendors, names: NameServer, wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway behind the proxy, started by `make server EGRESS=1`."""
    environ = settings(names, wire.port) | {"SSL_CERT_FILE": str(vendors.ca_file)} | KEY_VARIABLES
    with Gateway(tmp_path_factory.mktemp("egress"), ("make", "server", "EGRESS=1"), **environ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Gateway) -> Iterator[httpx.Client]:
    """A caller of the gateway behind the proxy."""
    with caller(server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def proxy(server: Gateway) -> Iterator[httpx.Client]:
    """The proxy, as the gateway sees it."""
    url = f"http://127.0.0.1:{server.settings['EGRESS_PORT']}"
    with caller(url, headers={"Authorization": f"Bearer {KEYS['openai']}"}) as proxy:
        yield proxy


def haproxy_of(server: Gateway) -> psutil.Process:
    """The HAProxy that `server` has started."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if child.name() == "haproxy")


def cut_connections(server: Gateway, wire: Wire) -> None:
    """Close all connections of the proxy to the vendors, and wait until it knows."""
    wire.down()
    haproxy = haproxy_of(server)

    def known() -> bool:
        return all(not connection.raddr or connection.raddr.port != wire.port for connection in haproxy.net_connections())

    assert eventually(known)
    assert eventually(lambda: not wire.alive)
    wire.up()


def ask(client: httpx.Client, model: str = "openai/gpt-4o", prompt: str = "Hello", **more: object) -> httpx.Response:
    """One chat call with all keys."""
    return client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(model, prompt, **more))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_through_it(client: httpx.Client, server: Gateway, vendors: Vendors, wire: Wire, model: str) -> None:
    prompt = f"through the proxy {model}"
    cut_connections(server, wire)
    assert ask(client, model, prompt).json()["choices"][0]["message"]["content"].endswith(f"You said: {prompt}")
    assert streamed_text(ask(client, model, prompt, stream=True)).endswith(f"You said: {prompt}")
    assert wire.alive == 1
    for arrived in vendors.seen_with(prompt):
        assert arrived.vendor == vendor_of(model)
        assert arrived.path == PATHS[arrived.vendor]
        assert arrived.headers["host"] == HOSTS[arrived.vendor]
        assert arrived.key == f"Bearer {KEYS[arrived.vendor]}"
        assert PROVIDER_DATA.lower() not in arrived.headers


@pytest.fixture(scope="module")
def beside(server: Gateway, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A caller of a gateway that is led to the proxy by its settings alone, as in a pod, and past it to the stand-ins."""
    through = {"OPENAI_PASSTHROUGH_URL": f"http://127.0.0.1:{server.settings['EGRESS_PORT']}/openai", "EGRESS": "0"}
    gateway = Gateway(tmp_path_factory.mktemp("beside"), START, **vendors.environ(), **through)
    with gateway, caller(gateway.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings_work_too(beside: httpx.Client, server: Gateway, wire: Wire, model: str) -> None:
    """OpenAI's take the proxy. Gemini's native provider has a fixed URL and goes to the vendor by itself."""
    cut_connections(server, wire)
    opened = wire.opened
    answer = beside.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a text"}).json()
    assert answer["data"][0]["embedding"]
    assert (wire.opened > opened) == (model == "openai/text-embedding-3-small")


def test_tokens_arrive_as_the_vendor_sends_them(client: httpx.Client) -> None:
    assert eventually(lambda: one_by_one(client))


def test_calls_share_connections(client: httpx.Client, wire: Wire) -> None:
    """400 calls from 8 callers at a time open at most the 8 connections that they need at once."""
    opened = wire.opened
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client).is_success, range(400)))
    assert all(answers)
    assert wire.opened - opened <= 8


def test_a_shared_connection_carries_each_callers_own_key(client: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """Calls with different keys take turns on one connection, and arrive with their own key and no other."""
    ask(client)
    opened = wire.opened
    for i in range(20):
        key = f"Bearer {KEYS['openai']}-of-caller-{i}"
        header = {PROVIDER_DATA: f'{{"openai_authorization": "{key}"}}'}
        prompt = f"caller {i} of twenty"
        assert client.post("/v1/chat/completions", headers=header, json=chat("openai/gpt-4o", prompt)).is_success
        assert [arrived.key for arrived in vendors.seen_with(prompt)] == [key]
    assert client.post("/v1/chat/completions", json=chat("openai/gpt-4o", "caller without a key")).status_code == 401
    assert {arrived.key for arrived in vendors.seen_with("caller without a key")} <= {None, ""}
    assert wire.opened == opened


@pytest.mark.parametrize("vendor", KEYS)
@pytest.mark.parametrize("status", [429, 500])
def test_a_vendor_error_keeps_its_status_and_message(client: httpx.Client, vendor: str, status: int) -> None:
    response = ask(client, f"{vendor}/status-{status}")
    assert response.status_code == status
    assert f"says {status}." in message(response)


def test_a_vendors_headers_pass(proxy: httpx.Client) -> None:
    response = proxy.post("/openai/v1/chat/completions", json=chat("status-429"))
    assert response.status_code == 429
    assert response.headers["retry-after-ms"] == "20"
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("vendor", KEYS)
@pytest.mark.parametrize("key", [{}, {"Authorization": ""}], ids=["no key", "an empty one"])
def test_it_answers_the_keyless_question_for_models_itself(
    vendors: Vendors, server: Gateway, vendor: str, key: dict[str, str]
) -> None:
    seen = len(vendors.seen)
    with caller(f"http://127.0.0.1:{server.settings['EGRESS_PORT']}/{vendor}") as keyless:
        response = keyless.get("/v1/models", headers=key)
    assert response.status_code == 401
    assert message(response) == "No key was sent with this request."
    assert len(vendors.seen) == seen


def test_a_listing_with_a_key_reaches_the_vendor(proxy: httpx.Client) -> None:
    assert proxy.get("/openai/v1/models").json()["data"][0]["id"] == "openai-other"


def test_a_vendor_that_is_silent_does_not_hold_the_start_up(names: NameServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = settings(names, silent.getsockname()[1])
        with Gateway(tmp_path, ("make", "server", "EGRESS=1"), **environ) as gateway, caller(gateway.url) as client:
            assert sorted(model["id"] for model in client.get("/v1/models").json()["data"]) == sorted(MODELS)


def timeouts(configuration: Path) -> dict[str, float]:
    """The time-outs that a configuration of HAProxy sets, in seconds."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
    lines = re.findall(r"^\s*timeout (\S+) (\d+)(ms|[smhd])$", configuration.read_text(), re.MULTILINE)
    return {name: int(number) * units[unit] for name, number, unit in lines}


@pytest.mark.parametrize("configuration", ["egress/haproxy.cfg", "balancer.cfg"])
def test_no_model_thinks_longer_than_a_proxy_waits(configuration: str) -> None:
    """The gateway gives a vendor 600 s, so that a proxy before or behind it must give it more."""
    given = timeouts(PROJECT / "deploy" / configuration)
    assert openai.DEFAULT_TIMEOUT.read == 600
    assert given["client"] > 600
    assert given["server"] > 600
    assert given["connect"] <= 5


def test_who_connects_and_says_nothing_is_sent_away(server: Gateway) -> None:
    """Half a request counts as nothing."""
    address = ("127.0.0.1", int(server.settings["EGRESS_PORT"]))
    with socket.create_connection(address, timeout=60) as idle, socket.create_connection(address, timeout=60) as slow:
        slow.sendall(b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost:")
        for connection in (idle, slow):
            while connection.recv(1000):
                pass


def test_a_path_that_is_no_vendors_is_refused(proxy: httpx.Client) -> None:
    assert proxy.get("/v1/models").status_code == 404
    assert proxy.get("/openai").status_code == 404


def test_a_stream_that_the_vendor_cuts_ends_with_an_error_event(client: httpx.Client) -> None:
    response = ask(client, "openai/hang-up", stream=True)
    assert events(response)[0]["choices"][0]["delta"]["content"] == ""
    assert events(response)[-1]["error"]["message"]


def test_an_answer_that_the_vendor_cuts_is_an_error(client: httpx.Client) -> None:
    response = ask(client, "openai/hang-up")
    assert response.status_code == 500
    assert message(response)


def test_ten_megabytes_pass(client: httpx.Client, vendors: Vendors) -> None:
    prompt = "ten megabytes " + "x" * 10_000_000
    assert ask(client, prompt=prompt).json()["choices"][0]["message"]["content"].endswith(prompt)
    assert len(vendors.seen_with("ten megabytes")) == 1


def test_a_caller_that_hangs_up_ends_the_vendors_work(proxy: httpx.Client, vendors: Vendors) -> None:
    ask_stall = proxy.stream("POST", "/openai/v1/chat/completions", json=chat("stall", stream=True))
    with ask_stall as response:
        lines = response.iter_lines()  # Kept, because dropping it hangs up.
        next(lines)
        during = vendors.streaming
        assert during
    assert eventually(lambda: vendors.streaming < during)


def test_a_caller_that_hangs_up_before_the_vendor_answers_ends_its_work_too(
    server: Gateway, vendors: Vendors, wire: Wire
) -> None:
    cut_connections(server, wire)
    body = json.dumps(chat("stall", "hang up before the answer")).encode()
    head = f"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['openai']}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.settings["EGRESS_PORT"]))) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: vendors.seen_with("hang up before the answer"))
        assert wire.alive == 1
    assert eventually(lambda: not wire.alive)


def test_it_survives_that_the_vendor_closes_idle_connections(client: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """The stand-in closes a connection that has been idle for 5 s."""
    assert ask(client).is_success
    assert eventually(lambda: not wire.alive)
    assert ask(client, prompt="after the idle time").is_success
    assert len(vendors.seen_with("after the idle time")) == 1


def test_a_call_that_meets_a_closing_connection_is_answered(client: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """The proxy cannot know yet that the vendor has closed: the server's OpenAI SDK asks again, as it would without it."""
    assert ask(client).is_success
    wire.fault = "closed"
    assert ask(client, prompt="into a closing connection").is_success
    assert wire.fault is None
    assert len(vendors.seen_with("into a closing connection")) == 1


def test_a_call_that_the_vendor_may_have_seen_is_not_sent_again(proxy: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """HAProxy 2.6 answers 502, HAProxy 3 closes the connection without an answer. Either is an error to the server's SDK."""
    assert proxy.post("/openai/v1/chat/completions", json=chat("gpt-4o")).is_success
    wire.fault = "no answer"
    with contextlib.suppress(httpx.RemoteProtocolError):
        response = proxy.post("/openai/v1/chat/completions", json=chat("gpt-4o", "seen but not answered"))
        assert response.status_code == 502
        assert "closed the connection before it answered" in message(response)
    # HAProxy answers once it has given up, so that nothing is sent from here on.
    assert len(vendors.seen_with("seen but not answered")) == 1


def test_it_survives_a_restart_of_the_vendor(client: httpx.Client, server: Gateway, wire: Wire) -> None:
    assert ask(client).is_success
    wire.down()
    response = ask(client)
    assert response.status_code == 503
    assert "No connection to the vendor" in message(response)
    assert eventually(lambda: "egress: openai 503 SC: the vendor refused the connection\n" in server.log)
    wire.up()
    assert ask(client).is_success


def assert_it_follows(client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer, address: str) -> None:
    """Calls are answered again some time after the vendor has moved to `address`, and after it has moved back."""
    assert ask(client).is_success
    with Wire(vendors.tls_port, address, wire.port) as moved:
        names.address = moved.address
        wire.down()
        assert eventually(lambda: ask(client).is_success)
        assert moved.opened
    names.address = wire.address
    wire.up()
    assert eventually(lambda: ask(client).is_success)


def test_it_follows_the_vendor_to_a_new_address(client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer) -> None:
    assert_it_follows(client, wire, vendors, names, "127.0.0.2")


def test_it_listens_on_loopback_only_and_holds_no_key(server: Gateway) -> None:
    assert listening(int(server.settings["EGRESS_PORT"])) == ["127.0.0.1"]
    environ = haproxy_of(server).environ()
    assert "EGRESS_PORT" in environ
    assert "sk-fake" not in str(environ)


def test_a_failed_call_is_logged_with_the_reason_and_nothing_of_it(
    client: httpx.Client, proxy: httpx.Client, server: Gateway, wire: Wire
) -> None:
    ask(client, "openai/hang-up", prompt="private words")
    ask(client, "anthropic/status-500", prompt="private words")
    ask(client, "gemini/hang-up", prompt="private words", stream=True)
    wire.fault = "no answer"
    with contextlib.suppress(httpx.RemoteProtocolError):
        proxy.post("/openai/v1/chat/completions?key=private-words", json=chat("gpt-4o", "private words"))
    broke_off = "the answer broke off: S by the vendor, s by its silence, C by the gateway\n"
    assert eventually(lambda: "openai 502 SH: the vendor closed the connection before it answered\n" in server.log)
    assert f"egress: gemini 200 SD: {broke_off}" in server.log
    assert f"egress: openai 200 SD: {broke_off}" in server.log
    assert "egress: anthropic 500 --: the vendor answered so\n" in server.log
    for secret in ["private", "sk-fake", "Bearer", *(f"/{vendor}/v1" for vendor in KEYS)]:
        assert secret not in server.log


def test_a_vendor_that_no_name_server_knows_is_a_reason_too(tmp_path: Path) -> None:
    with NameServer(None) as nobody, Proxy(tmp_path, settings(nobody, 9)) as proxy:
        assert proxy.post().status_code == 503
        assert eventually(lambda: "openai 503 SC: no name server knows an address of the vendor" in proxy.log())


@pytest.mark.parametrize("wrong", ["name", "authority", "not one of the system's"])
def test_a_wrong_certificate_is_refused(wrong: str, vendors: Vendors, names: NameServer, tmp_path: Path) -> None:
    """The caller gets an error, the log the reason, and the stand-in nothing."""
    with Vendors(["vendor.example"] if wrong == "name" else VENDORS) as others:
        trusted = {"name": {"EGRESS_CA": str(others.ca_file)}, "authority": {"EGRESS_CA": str(vendors.ca_file)}}
        environ = settings(names, others.tls_port) | trusted.get(wrong, {})
        with Proxy(tmp_path, environ) as proxy:
            assert eventually(lambda: proxy.post().status_code == 503 and "no safe connection" in proxy.log())
            assert "openai 503 SC: no safe connection, certificate verify failed\n" in proxy.log()
        assert not others.seen


def test_it_follows_the_vendor_to_one_new_address_after_another(
    client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer
) -> None:
    """It remembers two. Some time after the test above, because an address that has gone is forgotten after 30 s."""
    assert_it_follows(client, wire, vendors, names, "127.0.0.3")


def test_both_stop_together_after_streams_in_flight(client: httpx.Client, server: Gateway) -> None:
    """Last, because it ends the server."""
    body = chat("openai/slow", stream=True)
    with client.stream("POST", "/v1/chat/completions", headers=ALL_KEYS, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.signal(signal.SIGTERM)
        rest = "".join(lines)
    assert '"finish_reason":"stop"' in rest
    server.process.wait(20)
    assert not listening(int(server.settings["EGRESS_PORT"]))
    assert not listening(server.port)
