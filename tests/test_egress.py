"""Through the egress proxy, callers get what they would get without it, over connections that stay open."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from world.calls import ALL_KEYS, EMBEDDINGS, MODELS, arrivals, caller, chat, events, message, streamed_text, vendor_of
from world.gateway import HAPROXY, PROJECT, PROVIDER_DATA, Gateway, clean_environ, eventually, free_port, listening
from world.vendors import KEYS, VENDORS, Vendors
from world.wire import NameServer, Wire

pytestmark = pytest.mark.skipif(not HAPROXY, reason="HAProxy is not installed (apt-get install haproxy)")

EGRESS = PROJECT / "deploy" / "egress"
HOSTS = {vendor.name: host for host, vendor in VENDORS.items()}
# Where each vendor's passthrough provider sends a chat call.
PATHS = {vendor: f"/v1{'beta/openai/v1' if vendor == 'gemini' else ''}/chat/completions" for vendor in KEYS}


def settings(names: NameServer, port: int) -> dict[str, str]:
    """What leads the proxy to stand-ins at `port` instead of the vendors."""
    nameserver = f"127.0.0.1:{names.port}"
    return {"EGRESS_PORT": str(free_port()), "EGRESS_NAMESERVER": nameserver, "EGRESS_VENDOR_PORT": str(port)}


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
    environ = vendors.environ() | settings(names, wire.port)
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


def ask(client: httpx.Client, model: str = "openai/gpt-4o", prompt: str = "Hello", **more: object) -> httpx.Response:
    """One chat call with all keys."""
    return client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(model, prompt, **more))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answers_through_it(client: httpx.Client, vendors: Vendors, wire: Wire, model: str) -> None:
    prompt = f"through the proxy {model}"
    wire.down()
    wire.up()
    assert ask(client, model, prompt).json()["choices"][0]["message"]["content"].endswith(f"You said: {prompt}")
    assert streamed_text(ask(client, model, prompt, stream=True)).endswith(f"You said: {prompt}")
    assert wire.alive == 1
    for arrived in vendors.seen_with(prompt):
        assert arrived.vendor == vendor_of(model)
        assert arrived.path == PATHS[arrived.vendor]
        assert arrived.headers["host"] == HOSTS[arrived.vendor]
        assert arrived.key == f"Bearer {KEYS[arrived.vendor]}"
        assert PROVIDER_DATA.lower() not in arrived.headers


@pytest.mark.parametrize("model", EMBEDDINGS)
def test_embeddings_work_too(client: httpx.Client, wire: Wire, model: str) -> None:
    """OpenAI's take the proxy. Gemini's native provider has a fixed URL and goes to the vendor by itself."""
    opened = wire.opened
    wire.down()
    wire.up()
    answer = client.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a text"}).json()
    assert answer["data"][0]["embedding"]
    assert (wire.opened > opened) == (model == "openai/text-embedding-3-small")


def test_tokens_arrive_as_the_vendor_sends_them(client: httpx.Client) -> None:
    arrived = arrivals(client, "openai/slow")
    assert arrived[-1] - arrived[0] > 1


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


def test_a_caller_that_hangs_up_ends_the_vendors_work(proxy: httpx.Client, wire: Wire) -> None:
    ask_stall = proxy.stream("POST", "/openai/v1/chat/completions", json=chat("stall", stream=True))
    with ask_stall as response:
        next(response.iter_lines())
        during = wire.alive
    assert eventually(lambda: wire.alive < during)


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
    time.sleep(1.5)  # HAProxy waits for 1 s before it tries again.
    assert len(vendors.seen_with("seen but not answered")) == 1


def test_it_survives_a_restart_of_the_vendor(client: httpx.Client, wire: Wire) -> None:
    assert ask(client).is_success
    wire.down()
    response = ask(client)
    assert response.status_code == 503
    assert "No connection to the vendor" in message(response)
    wire.up()
    assert ask(client).is_success


def test_it_follows_the_vendor_to_a_new_address(client: httpx.Client, wire: Wire, vendors: Vendors, names: NameServer) -> None:
    assert ask(client).is_success
    with Wire(vendors.tls_port, "127.0.0.2", wire.port) as moved:
        names.address = moved.address
        wire.down()
        assert eventually(lambda: ask(client).is_success)
        assert moved.opened
    names.address = wire.address
    wire.up()
    assert eventually(lambda: ask(client).is_success)


def proxy_of(server: subprocess.Popen) -> int | None:
    """The process id of the HAProxy that `server` has started, if it runs."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            name, parent = re.search(r"Name:\t(.*)[^$]*?PPid:\t(\d+)", status.read_text()).groups()
            parents[int(status.parent.name)] = (name, int(parent))

    def started(pid: int) -> bool:
        return pid == server.pid or (pid in parents and started(parents[pid][1]))

    return next((pid for pid, (name, _) in parents.items() if name == "haproxy" and started(pid)), None)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_it_listens_on_loopback_only_and_holds_no_key(server: Gateway) -> None:
    assert listening(int(server.settings["EGRESS_PORT"])) == ["127.0.0.1"]
    environ = Path(f"/proc/{proxy_of(server.process)}/environ").read_text()
    assert "EGRESS_PORT" in environ
    assert "sk-fake" not in environ


def test_nothing_of_a_call_is_logged(client: httpx.Client, server: Gateway) -> None:
    """Calls that fail are logged, with the vendor, the status and the reason and nothing else."""
    ask(client, "openai/hang-up", prompt="private words")
    ask(client, "anthropic/status-500", prompt="private words")
    ask(client, "gemini/hang-up", prompt="private words", stream=True)
    assert eventually(lambda: "egress: gemini 200 SD" in server.log)
    assert "egress: openai 200 SD" in server.log
    assert "egress: anthropic 500" in server.log
    for secret in ["private words", "sk-fake", "Bearer", *(f"/{vendor}/v1" for vendor in KEYS)]:
        assert secret not in server.log


@pytest.mark.parametrize("wrong", ["name", "authority", "not one of the system's"])
def test_a_wrong_certificate_is_refused(wrong: str, vendors: Vendors, names: NameServer, tmp_path: Path) -> None:
    """The caller gets an error, the log the reason, and the stand-in nothing."""
    with Vendors(["vendor.example"] if wrong == "name" else VENDORS) as others:
        trusted = {"name": {"EGRESS_CA": str(others.ca_file)}, "authority": {"EGRESS_CA": str(vendors.ca_file)}}
        environ = clean_environ(tmp_path, **settings(names, others.tls_port), **trusted.get(wrong, {}))
        log_file = tmp_path / "proxy.log"
        with log_file.open("w") as log:
            proxy = subprocess.Popen([HAPROXY, "-db", "-f", EGRESS / "haproxy.cfg"], env=environ, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{environ['EGRESS_PORT']}/openai/v1/chat/completions"

        def refused() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.post(url, json=chat("gpt-4o"), trust_env=False, timeout=30).status_code == 503
            return "certificate verify failed" in log_file.read_text()

        try:
            assert eventually(refused)
        finally:
            proxy.terminate()
            proxy.wait()
        assert not others.seen


@pytest.fixture
def stub(project: Path) -> Path:
    """A project whose gateway does nothing: it ends with code 3 when it finds a file `end`, or a second after a SIGTERM."""
    (project / "deploy" / "egress").mkdir()
    for file in EGRESS.iterdir():
        shutil.copy(file, project / "deploy" / "egress")
    (project / "deploy" / "serve.sh").write_text(
        """#!/bin/sh
        trap 'sleep 1; exit 3' TERM
        for tenth in $(seq 600); do
          [ ! -e deploy/end ] || exit 3
          sleep 0.1
        done
        """
    )
    return project


def start(stub: Path, **more: str) -> subprocess.Popen:
    """Start the stub's `deploy/egress/serve.sh`."""
    return subprocess.Popen(
        [stub / "deploy" / "egress" / "serve.sh"],
        env=clean_environ(stub, EGRESS_PORT=str(free_port()), EGRESS_NAMESERVER="127.0.0.1:9") | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_when_the_gateway_ends_so_does_the_proxy_and_its_code_is_told(stub: Path) -> None:
    process = start(stub)
    assert eventually(lambda: proxy_of(process))
    proxy = proxy_of(process)
    (stub / "deploy" / "end").touch()
    process.communicate(timeout=20)
    assert process.returncode == 3
    assert not Path(f"/proc/{proxy}").exists()


def test_when_the_proxy_ends_so_does_the_gateway_with_a_sentence(stub: Path) -> None:
    process = start(stub)
    assert eventually(lambda: proxy_of(process))
    os.kill(proxy_of(process), signal.SIGKILL)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "The egress proxy has stopped, and the gateway with it." in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_leaves_the_proxy_until_the_gateway_has_finished(stub: Path, number: signal.Signals) -> None:
    """Ctrl-C, or a service manager that stops them."""
    process = start(stub)
    assert eventually(lambda: proxy_of(process))
    proxy = proxy_of(process)
    time.sleep(0.5)  # Both have begun by then.
    os.killpg(process.pid, number)
    time.sleep(0.5)
    assert Path(f"/proc/{proxy}").exists()
    process.communicate(timeout=20)
    assert process.returncode == 3
    assert not Path(f"/proc/{proxy}").exists()


def test_a_port_that_is_taken_is_a_sentence(stub: Path, wire: Wire) -> None:
    process = start(stub, EGRESS_PORT=str(wire.port))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"127.0.0.1:{wire.port}" in output
    assert "The egress proxy has stopped, and the gateway with it." in output


def test_without_haproxy_a_sentence_names_the_package(stub: Path) -> None:
    script = stub / "deploy" / "egress" / "serve.sh"
    script.write_text(script.read_text().replace(":/usr/local/sbin:/usr/sbin", ""))
    tools = stub / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    process = start(stub, PATH=str(tools))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert len(output.splitlines()) == 1
    assert "install the package haproxy" in output


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
