"""Through the egress door, callers get what they would get without it, over connections that stay open."""

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from support.calls import ALL_KEYS, EMBEDDINGS, MODELS, caller, chat, events, message, one_by_one, streamed_text, vendor_of
from support.gateway import PROVIDER_DATA, START, Gateway, free_port, listening, wait_for
from support.haproxy import NEEDS_HAPROXY
from support.network import NameServer, Wire
from support.vendors import KEY_VARIABLES, KEYS, VENDORS, Vendors

pytestmark = NEEDS_HAPROXY

HOSTS = {vendor.name: host for host, vendor in VENDORS.items()}
# Where each vendor's passthrough provider sends a chat call.
PATHS = {vendor: f"/v1{'beta/openai/v1' if vendor == 'gemini' else ''}/chat/completions" for vendor in KEYS}


def settings(names: NameServer, port: int) -> dict[str, str]:
    """What leads the egress door to stand-ins at `port` instead of the vendors."""
    nameserver = f"127.0.0.1:{names.port}"
    return {"EGRESS_PORT": str(free_port()), "EGRESS_NAMESERVER": nameserver, "EGRESS_VENDOR_PORT": str(port)}


@pytest.fixture(scope="module")
def server(vendors: Vendors, names: NameServer, wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with both doors, with keys in its environment that are none of its business."""
    environ = settings(names, wire.port) | {"SSL_CERT_FILE": str(vendors.ca_file)} | KEY_VARIABLES
    with Gateway(tmp_path_factory.mktemp("egress"), START, **environ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Gateway) -> Iterator[httpx.Client]:
    """A caller of the gateway."""
    with caller(server.url, timeout=60) as client:
        yield client


def haproxy_of(server: Gateway) -> psutil.Process:
    """The HAProxy that `server` has started."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if child.name() == "haproxy")


def cut_connections(server: Gateway, wire: Wire) -> None:
    """Close all connections of the egress door to the vendors, and wait until it knows."""
    wire.down()
    haproxy = haproxy_of(server)

    def known() -> bool:
        return all(not connection.raddr or connection.raddr.port != wire.port for connection in haproxy.net_connections())

    wait_for(known, seen=haproxy.net_connections)
    wait_for(lambda: not wire.alive, seen=lambda: wire.alive)
    wire.up()


def ask(client: httpx.Client, model: str = "openai/gpt-4o", prompt: str = "Hello", **more: object) -> httpx.Response:
    """One chat call with all keys."""
    return client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(model, prompt, **more))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_through_it(client: httpx.Client, server: Gateway, vendors: Vendors, wire: Wire, model: str) -> None:
    prompt = f"through the door {model}"
    cut_connections(server, wire)
    opened = wire.opened
    assert ask(client, model, prompt).json()["choices"][0]["message"]["content"].endswith(f"You said: {prompt}")
    assert streamed_text(ask(client, model, prompt, stream=True)).endswith(f"You said: {prompt}")
    assert wire.opened - opened == 1
    for arrived in vendors.seen_with(prompt):
        assert arrived.vendor == vendor_of(model)
        assert arrived.path == PATHS[arrived.vendor]
        assert arrived.headers["host"] == HOSTS[arrived.vendor]
        assert arrived.key == f"Bearer {KEYS[arrived.vendor]}"
        assert PROVIDER_DATA.lower() not in arrived.headers


@pytest.fixture(scope="module")
def beside(server: Gateway, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A caller of a gateway that is led to the egress door by its settings alone, as in a pod, and past it to the stand-ins."""
    through = {"OPENAI_PASSTHROUGH_URL": f"http://127.0.0.1:{server.settings['EGRESS_PORT']}/openai", "EGRESS": "0"}
    gateway = Gateway(tmp_path_factory.mktemp("beside"), START, **vendors.environ(), **through)
    with gateway, caller(gateway.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings_work_too(beside: httpx.Client, server: Gateway, wire: Wire, model: str) -> None:
    """OpenAI's take the egress door. Gemini's native provider has a fixed URL and goes to the vendor by itself."""
    cut_connections(server, wire)
    opened = wire.opened
    answer = beside.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a text"}).json()
    assert answer["data"][0]["embedding"]
    assert (wire.opened > opened) == (model == "openai/text-embedding-3-small")


def test_tokens_arrive_as_the_vendor_sends_them(client: httpx.Client) -> None:
    wait_for(lambda: one_by_one(client))


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


def test_a_vendor_that_is_silent_does_not_hold_the_start_up(names: NameServer, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environ = settings(names, silent.getsockname()[1])
        with Gateway(tmp_path, START, **environ) as gateway, caller(gateway.url) as client:
            assert sorted(model["id"] for model in client.get("/v1/models").json()["data"]) == sorted(MODELS)


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


def test_it_survives_that_the_vendor_closes_idle_connections(client: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """The stand-in closes a connection that has been idle for 5 s."""
    assert ask(client).is_success
    wait_for(lambda: not wire.alive, seen=lambda: wire.alive)
    assert ask(client, prompt="after the idle time").is_success
    assert len(vendors.seen_with("after the idle time")) == 1


def test_a_call_that_meets_a_closing_connection_is_answered(client: httpx.Client, vendors: Vendors, wire: Wire) -> None:
    """HAProxy cannot know yet that the vendor has closed: the server's OpenAI SDK asks again, as it would without it."""
    assert ask(client).is_success
    wire.fault = "closed"
    assert ask(client, prompt="into a closing connection").is_success
    assert wire.fault is None
    assert len(vendors.seen_with("into a closing connection")) == 1


def assert_it_follows(client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer, address: str) -> None:
    """Calls are answered again some time after the vendor has moved to `address`, and after it has moved back."""
    assert ask(client).is_success
    with Wire(vendors.tls_port, address, wire.port) as moved:
        names.address = moved.address
        wire.down()
        wait_for(lambda: ask(client).is_success, seen=lambda: ask(client).text)
        assert moved.opened
    names.address = wire.address
    wire.up()
    wait_for(lambda: ask(client).is_success, seen=lambda: ask(client).text)


def test_it_follows_the_vendor_to_a_new_address(client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer) -> None:
    assert_it_follows(client, wire, vendors, names, "127.0.0.2")


def test_it_listens_on_loopback_only_and_holds_no_key(server: Gateway) -> None:
    assert listening(int(server.settings["EGRESS_PORT"])) == ["127.0.0.1"]
    environ = haproxy_of(server).environ()
    assert "EGRESS_BIND" in environ
    assert "sk-fake" not in str(environ)


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
