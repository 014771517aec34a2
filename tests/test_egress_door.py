"""The egress door alone, as a sidecar runs it: what the server would get without it, over connections that stay open."""

import contextlib
import ctypes
import errno
import json
import os
import re
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from dnslib import RCODE, DNSError, DNSRecord
from dnslib.server import DNSHandler
from support.bare_servers import Accepts
from support.calls import caller, chat, message
from support.fronts import up
from support.gateway import free_port, wait_for
from support.haproxy import NEEDS_HAPROXY, SIDECAR, HAProxy
from support.network import NameServer, Wire
from support.vendors import KEYS, VENDORS, Vendors

pytestmark = NEEDS_HAPROXY

FIELDS = {"time", "door", "to", "status", "ms_total", "end", "why"}
KEY = {"Authorization": f"Bearer {KEYS['openai']}"}
BROKE_OFF = "the answer broke off: S by the vendor, s by its silence, C by the caller"


def settings(names: NameServer, port: int) -> dict[str, str]:
    """What leads the door to stand-ins at `port` instead of the vendors."""
    return {"EGRESS_NAMESERVER": f"127.0.0.1:{names.port}", "EGRESS_VENDOR_PORT": str(port)}


@pytest.fixture(scope="module")
def door(vendors: Vendors, names: NameServer, wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HAProxy]:
    """The egress door."""
    environ = settings(names, wire.port) | {"EGRESS_CA": str(vendors.ca_file)}
    with HAProxy(tmp_path_factory.mktemp("door"), SIDECAR, **environ) as door:
        wait_for(lambda: all(up(door, f"vendor-{name},address1,") for name in KEYS), seen=lambda: door.admin("show stat"))
        yield door


@pytest.fixture(scope="module")
def server(door: HAProxy) -> Iterator[httpx.Client]:
    """A caller in the server's place."""
    with caller(door.egress, headers=KEY) as server:
        yield server


def ask(server: httpx.Client, model: str = "gpt-4o", prompt: str = "Hello", **more: object) -> httpx.Response:
    """A chat call to OpenAI."""
    return server.post("/openai/v1/chat/completions", json=chat(model, prompt, **more))


@pytest.mark.parametrize("vendor", KEYS)
def test_the_first_segment_names_the_vendor(server: httpx.Client, vendors: Vendors, vendor: str) -> None:
    path = f"/v1{'beta/openai' if vendor == 'gemini' else ''}/chat/completions"
    key = {"Authorization": f"Bearer {KEYS[vendor]}"}
    assert server.post(f"/{vendor}{path}", headers=key, json=chat("m", f"to {vendor}")).is_success
    (arrived,) = vendors.seen_with(f"to {vendor}")
    assert (arrived.vendor, arrived.path, arrived.key) == (vendor, path, f"Bearer {KEYS[vendor]}")
    assert VENDORS[arrived.headers["host"]].name == vendor


@pytest.mark.parametrize(
    "path", ["/v1/models", "/openai", "/openai?a=/b", "//openai/v1", "/gateways/v1", "/vendor-openai/v1", "/egress/v1"]
)
def test_a_path_that_is_no_vendors_is_refused(server: httpx.Client, path: str) -> None:
    assert httpx.Client(trust_env=False).get(f"{server.base_url}".rstrip("/") + path).status_code == 404


def test_a_vendors_error_is_told_after_one_attempt(server: httpx.Client) -> None:
    """The server's SDK heeds x-should-retry, and would else sleep as long as the vendor says between three attempts."""
    response = ask(server, "status-429")
    assert response.status_code == 429
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["retry-after-ms"] == "20"
    assert response.headers["content-type"] == "application/json"
    assert "x-should-retry" not in ask(server).headers


@pytest.mark.parametrize("vendor", KEYS)
@pytest.mark.parametrize("key", [{}, {"Authorization": ""}], ids=["no key", "an empty one"])
def test_it_answers_the_keyless_question_for_models_itself(
    door: HAProxy, vendors: Vendors, vendor: str, key: dict[str, str]
) -> None:
    seen = len(vendors.seen)
    with caller(f"{door.egress}/{vendor}") as keyless:
        response = keyless.get("/v1/models", headers=key)
    assert response.status_code == 401
    assert message(response) == "No key was sent with this request."
    assert len(vendors.seen) == seen


def test_a_listing_with_a_key_reaches_the_vendor(server: httpx.Client) -> None:
    assert server.get("/openai/v1/models").json()["data"][0]["id"] == "openai-other"


def test_a_caller_that_hangs_up_ends_the_vendors_work(server: httpx.Client, vendors: Vendors) -> None:
    with server.stream("POST", "/openai/v1/chat/completions", json=chat("stall", stream=True)) as response:
        lines = response.iter_lines()  # Kept, because dropping it hangs up.
        next(lines)
        during = vendors.streaming
        assert during
    wait_for(lambda: vendors.streaming < during, seen=lambda: vendors.streaming)


def test_a_caller_that_hangs_up_before_the_vendor_answers_ends_its_work_too(
    door: HAProxy, server: httpx.Client, vendors: Vendors, wire: Wire
) -> None:
    opened = wire.opened
    body = json.dumps(chat("stall", "hang up before the answer")).encode()
    head = f"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['openai']}\r\n"
    with socket.create_connection(("127.0.0.1", door.egress_port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: vendors.seen_with("hang up before the answer"), seen=lambda: door.log)
        alive = wire.alive
    wait_for(lambda: wire.alive < alive, seen=lambda: wire.alive)
    assert wire.opened <= opened + 1
    door.logged(why="the caller hung up before the vendor answered")


def test_a_call_that_the_vendor_may_have_seen_is_not_sent_again(
    server: httpx.Client, door: HAProxy, vendors: Vendors, wire: Wire
) -> None:
    """HAProxy 2.6 answers 502, HAProxy 3 closes the connection without an answer. Either is an error to the server's SDK."""
    assert ask(server).is_success
    wire.fault = "no answer"
    body = json.dumps(chat("gpt-4o", "seen but not answered")).encode()
    head = (
        f"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['openai']}\r\nConnection: close\r\n"
    )
    with socket.create_connection(("127.0.0.1", door.egress_port), timeout=60) as connection:
        # In one write: of a call that comes in two, HAProxy cannot send the first again.
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    if answer:
        assert answer.startswith(b"HTTP/1.1 502")
        assert b"closed the connection before it answered" in answer
        assert b"x-should-retry" not in answer.lower()
    # HAProxy answers once it has given up, so that nothing is sent from here on.
    assert len(vendors.seen_with("seen but not answered")) == 1


def test_it_survives_a_restart_of_the_vendor(server: httpx.Client, door: HAProxy, wire: Wire) -> None:
    assert ask(server).is_success
    wire.down()
    wait_for(lambda: ask(server).status_code == 503, seen=lambda: door.log)
    assert "No connection to the vendor" in message(ask(server))
    door.logged(to="vendor-openai", status=503, end="SC", why="the vendor refused the connection")
    wire.up()
    assert ask(server).is_success


def test_a_failed_call_is_logged_with_the_reason_and_nothing_of_it(server: httpx.Client, door: HAProxy, wire: Wire) -> None:
    for stream in (False, True):
        with contextlib.suppress(httpx.RemoteProtocolError):
            ask(server, "hang-up", "private words", stream=stream)
    for status in (429, 500):
        ask(server, f"status-{status}", "private words")
    wire.fault = "no answer"
    with contextlib.suppress(httpx.RemoteProtocolError):
        server.post("/openai/v1/chat/completions?key=private-words", json=chat("gpt-4o", "private words"))
    door.logged(end="SH", why="the vendor closed the connection before it answered")
    assert door.lines(to="vendor-openai", status=200, end="SD", why=BROKE_OFF)
    for status in (429, 500):
        assert door.lines(to="vendor-openai", status=status, end="--", why="the vendor answered so")
    assert all(set(line) == FIELDS and line["door"] == "egress" for line in door.lines())
    assert not door.lines(status=401)
    for secret in ["private", "sk-fake", "Bearer", "/v1"]:
        assert secret not in door.log


def test_a_vendor_that_no_name_server_knows_is_a_reason_too(tmp_path: Path) -> None:
    with NameServer(None) as nobody, HAProxy(tmp_path, SIDECAR, **settings(nobody, 9)) as door, caller(door.egress) as server:
        assert ask(server).status_code == 503
        door.logged(end="SC", why="no name server knows an address of the vendor")


class Failing(NameServer):
    """A name server that fails for some names, in a way of its own for each: `failures` has the code, or None for silence.

    `asked` counts the questions for each name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, int | None] = {}
        self.asked: Counter[str] = Counter()

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        name = str(request.q.qname).rstrip(".")
        self.asked[name] += 1
        reply = super().resolve(request, handler)
        if name not in self.failures:
            return reply
        if self.failures[name] is None:
            raise DNSError("No answer.")
        failed = request.reply()
        failed.header.rcode = self.failures[name]
        return failed


# How name servers fail, and how many questions it takes to be sure that HAProxy has noticed.
FAILURES = {
    "no such name": (RCODE.NXDOMAIN, 7),
    "refused": (RCODE.REFUSED, 7),
    "failed": (RCODE.SERVFAIL, 7),
    "silence": (None, 4),
}


def test_while_name_servers_fail_the_last_address_serves_on(vendors: Vendors, tmp_path: Path) -> None:
    """For a day. They are asked anew every 5 s. Two doors, because there are more ways to fail than vendors."""
    with contextlib.ExitStack() as stack:
        doors = []
        for number in range(2):
            names = stack.enter_context(Failing())
            environ = settings(names, vendors.tls_port) | {"EGRESS_CA": str(vendors.ca_file)}
            doors.append((names, stack.enter_context(HAProxy(tmp_path / str(number), SIDECAR, **environ))))
        places = [(*door, host) for door in doors for host in VENDORS]
        cases = [(*place, how) for place, how in zip(places, FAILURES, strict=False)]
        for _, door in doors:
            wait_for(
                lambda d=door: all(up(d, f"vendor-{name},address1,") for name in KEYS), seen=lambda d=door: d.admin("show stat")
            )
        for names, _, host, how in cases:
            names.failures[host] = FAILURES[how][0]
            names.asked.clear()
        for names, door, host, how in cases:
            wait_for(lambda n=names, h=host, e=FAILURES[how][1]: n.asked[h] >= e, seen=lambda n=names: n.asked)
            name = VENDORS[host].name
            answer = httpx.post(f"{door.egress}/{name}/v1/models", trust_env=False, timeout=60)
            assert "No connection" not in answer.text, (how, door.admin("show stat"))


def connections_to(port: int, pid: int) -> Iterator[socket.socket]:
    """A process's TCP connections to a port, as sockets of ours. Source: pidfd_getfd(2), which Python has no function for."""
    process = os.pidfd_open(pid)
    try:
        for each in psutil.Process(pid).net_connections("tcp4"):
            if each.raddr and each.raddr.port == port:
                copy = ctypes.CDLL(None, use_errno=True).syscall(438, process, each.fd, 0)
                if copy >= 0:
                    with socket.socket(fileno=copy) as found:
                        yield found
                elif ctypes.get_errno() != errno.EBADF:  # It has been closed meanwhile.
                    pytest.skip(f"this machine does not let us see another process's sockets: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(process)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the option")
def test_a_connection_whose_network_has_gone_is_ended(door: HAProxy, server: httpx.Client, wire: Wire) -> None:
    """After 20 s without an acknowledgement, rather than 15 minutes. Keep-alive probes tell NAT on the way that it is in use."""
    assert ask(server).is_success
    options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
    found = [
        [
            each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            *(each.getsockopt(socket.IPPROTO_TCP, option) for option in options),
        ]
        for each in connections_to(wire.port, door.process.pid)
    ]
    assert found
    assert all(each == [1, 20_000, 60, 20] for each in found), found


def test_a_vendor_is_tried_at_its_other_address(vendors: Vendors, tmp_path: Path) -> None:
    """Nobody listens any more at the one that it takes first: the call goes to the other at once, and its caller does not notice."""
    with contextlib.ExitStack() as stack:
        port = free_port()
        wires = {each: stack.enter_context(Wire(vendors.tls_port, each, port)) for each in ("127.0.0.1", "127.0.0.2")}
        environ = settings(stack.enter_context(NameServer(*wires)), port) | {"EGRESS_CA": str(vendors.ca_file)}
        door = stack.enter_context(HAProxy(tmp_path, SIDECAR, **environ))
        server = stack.enter_context(caller(door.egress, headers=KEY))
        addresses = [f"vendor-openai,address{number}," for number in (1, 2)]
        wait_for(lambda: all(up(door, each) for each in addresses), 20, seen=lambda: door.admin("show stat"))
        first = re.search(r" address1 (\S+) ", door.admin("show servers state vendor-openai"))
        assert first
        wires[first[1]].down()
        response = ask(server, prompt="at the other address")
        assert response.is_success, (response.text, door.log)
        assert len(vendors.seen_with("at the other address")) == 1


def test_a_silent_vendor_is_reported_as_silent(vendors: Vendors, names: NameServer, tmp_path: Path) -> None:
    """By a vendor that takes the call and says nothing, and by one that does not even speak TLS. Their waits are shorter here."""
    trusted = {"EGRESS_CA": str(vendors.ca_file)}
    with HAProxy(tmp_path / "1", SIDECAR, {"timeout server": "1s"}, **settings(names, vendors.tls_port), **trusted) as door:
        with caller(door.egress, headers=KEY) as server:
            wait_for(lambda: up(door, "vendor-openai,address1,"), seen=lambda: door.admin("show stat"))
            response = ask(server, "stall", "said to nobody")
            assert (response.status_code, message(response)) == (504, "The vendor was silent for too long.")
            assert response.headers["content-type"] == "application/json"
            assert len(vendors.seen_with("said to nobody")) == 1
        door.logged(10, status=504, end="sH", why="timed out: the vendor was silent for too long")
    with Accepts() as silent, HAProxy(tmp_path / "2", SIDECAR, {"timeout connect": "3s"}, **settings(names, silent.port)) as door:
        with caller(door.egress, headers=KEY) as server:
            wait_for(lambda: up(door, "vendor-openai,address1,"), seen=lambda: door.admin("show stat"))
            assert "No connection to the vendor" in message(ask(server))
        door.logged(10, status=503, end="sC", why="timed out: the vendor could not be reached")


@pytest.mark.parametrize("wrong", ["name", "authority", "not one of the system's"])
def test_a_wrong_certificate_is_refused(wrong: str, vendors: Vendors, names: NameServer, tmp_path: Path) -> None:
    """The caller gets an error, the log the reason, and the stand-in nothing."""
    with Vendors(["vendor.example"] if wrong == "name" else VENDORS) as others:
        trusted = {"name": {"EGRESS_CA": str(others.ca_file)}, "authority": {"EGRESS_CA": str(vendors.ca_file)}}
        environ = settings(names, others.tls_port) | trusted.get(wrong, {})
        why = "no safe connection, certificate verify failed"
        with HAProxy(tmp_path, SIDECAR, **environ) as door, caller(door.egress) as server:
            wait_for(
                lambda: ask(server).status_code == 503 and door.lines(to="vendor-openai", status=503, end="SC", why=why),
                seen=lambda: door.log,
            )
        assert not others.seen


def test_it_listens_on_loopback_only(tmp_path: Path) -> None:
    """Whatever the front is told."""
    from support.gateway import listening

    with NameServer() as nobody:
        haproxy = HAProxy(tmp_path, **settings(nobody, 9))
        haproxy.settings["FRONT_BIND"] = f":{haproxy.port}"
        with haproxy:
            assert listening(haproxy.egress_port) == ["127.0.0.1"]
            assert listening(haproxy.port) == ["0.0.0.0"]
