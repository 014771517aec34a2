"""What the front closes: names, methods, bodies and connections; what pages may read; what the log tells; how it starts and ends."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import trustme
from support.calls import CHAT, message
from support.fronts import NATIVE, Front, front
from support.gateway import PROJECT, eventually, wait_for
from support.haproxy import BALANCER, BOTH, CONFIGURATION, NEEDS_HAPROXY, SIDECAR, HAProxy, Recorder

pytestmark = NEEDS_HAPROXY

LIST = {"Authorization": "Bearer openai=sk-fake"}
KEY = {"Authorization": "Bearer sk-fake"}
ORIGIN = "https://page.example"
MACHINE = socket.gethostname().lower()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front with a name of its own, and one origin that may call."""
    settings = {"LLAMA_STACK_HOSTS": "gateway.example Other.example", "LLAMA_STACK_CORS_ORIGIN": ORIGIN}
    with front(tmp_path_factory.mktemp("plain"), **settings) as plain:
        yield plain


# Names.

OWN = ["localhost", "LOCALHOST", "localhost:8321", "127.0.0.1", "127.0.0.1:1", "10.1.2.3", "[::1]:8320", "[fe80::1]", "gateway.example",
       "other.example:8320", "host.docker.internal", "host.containers.internal:8321", MACHINE, f"{MACHINE.split('.')[0]}.local:8321"]  # fmt: skip
FOREIGN = ["rebound.example", "localhost.rebound.example", "127.0.0.1.rebound.example", "", "localhost,x.evil.example", "x.evil.example,localhost",
           "localhost@evil.example", "evil.example:localhost", "gateway.example.", "localhost evil.example", "x.gateway.example", "api.openai.com",
           f"{MACHINE}.evil.example", "::1", "[::1", "1.evil", "0x7f000001", '"localhost"']  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_a_name_of_its_own_is_known(plain: Front, name: str) -> None:
    for path in ("/v1/models", "/openai/v1/models", "/"):
        assert plain.raw(f"GET {path} HTTP/1.1\nHost: {name}")[0] == 200


@pytest.mark.parametrize("name", FOREIGN)
def test_any_other_name_is_refused(plain: Front, name: str) -> None:
    """A page that has led its own name to this address could otherwise call."""
    for path in ("/v1/models", "/openai/v1/models", "/", "/v1/health"):
        with plain.untouched():
            status, answer = plain.raw(f"GET {path} HTTP/1.1\nHost: {name}")
        assert status == 400 or (status == 421 and b"LLAMA_STACK_HOSTS" in answer)


@pytest.mark.parametrize("hosts", ["Host: localhost\nHost: evil.example", "Host: evil.example\nHost: localhost", "X: y"])
def test_one_host_is_named(plain: Front, hosts: str) -> None:
    with plain.untouched():
        assert plain.raw(f"GET /v1/models HTTP/1.1\n{hosts}")[0] in (400, 421)
        assert plain.raw(f"GET /v1/models HTTP/1.0\n{hosts}")[0] in (400, 421)


@pytest.mark.parametrize("settings", [{}, {"LLAMA_STACK_HOSTS": ""}])
def test_without_settings_it_goes_by_its_address_and_no_page_may_call(tmp_path: Path, settings: dict[str, str]) -> None:
    with front(tmp_path, **settings) as bare:
        for name in ("gateway.example", ""):
            bare.refused(421, "/v1/models", {"Host": name}, "GET")
        for origin in ("null", ORIGIN, ""):
            response = bare.call("/v1/models", {"Origin": origin}, "GET")
            assert response.status_code == 200
            assert not [name for name in response.headers if name.startswith("access-control")]


# Certificates.


@pytest.mark.parametrize("apart", [False, True], ids=["in one file", "key in a file of its own"])
def test_https_ends_here(tmp_path: Path, apart: bool) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "gateway.example")
    file = tmp_path / "crt.pem"
    if apart:
        certificate.cert_chain_pems[0].write_to_path(file)
        certificate.private_key_pem.write_to_path(f"{file}.key")
    else:
        certificate.private_key_and_cert_chain_pem.write_to_path(file)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    with front(tmp_path / "front", FRONT_CRT=str(file)) as secure, httpx.Client(verify=trust, trust_env=False) as client:
        url = secure.haproxy.url
        assert client.get(f"{url}/v1/models", headers={"Host": "any.example"}).status_code == 200
        assert f"{url}/openai/v1" in message(client.post(f"{url}{CHAT}", json={}))
        trust.set_alpn_protocols(["h2", "http/1.1"])
        with trust.wrap_socket(secure.haproxy.connect(), server_hostname="gateway.example") as connection:
            assert connection.selected_alpn_protocol() == "http/1.1"


# Methods, paths and bodies.


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "FOO", "get", "X" * 1000, "PROPFIND"])
def test_a_method_that_nobody_needs_is_refused(plain: Front, method: str) -> None:
    with plain.untouched():
        assert plain.raw(f"{method} /v1/models HTTP/1.1\nHost: localhost")[0] in (400, 405)


def test_http_2_is_not_spoken_in_clear(plain: Front) -> None:
    assert b" 400 " in plain.haproxy.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")


@pytest.mark.parametrize("path", [f"{CHAT}/", f"{CHAT}//", f"{CHAT}/?a=b"])
def test_a_slash_too_many_makes_no_difference(plain: Front, path: str) -> None:
    """The stock server would redirect the call, with its keys, to http://."""
    assert plain.call(path, LIST).status_code == 200
    assert plain.gateway.heads[-1].startswith(f"POST {path.replace('//', '/').replace('/?', '?').rstrip('/')} ")


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/", "/docs/oauth2-redirect", "/redoc", "/docs?a", "/%64ocs", "/docs%2F", "/favicon.ico"]
)
def test_what_loads_scripts_from_elsewhere_is_closed(plain: Front, path: str) -> None:
    plain.refused(404, path, method="GET")


def test_no_redirect_gets_out(plain: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://localhost/x\r\nContent-Length: 0\r\n\r\n"
    monkeypatch.setattr(plain.gateway, "answer", answer)
    for path in ("/v1/models", "/v1", "/v1/models/x%2F"):
        response = plain.call(path, method="GET")
        assert response.status_code == 404
        assert "location" not in response.headers


def test_a_body_beyond_the_limit_is_refused_and_an_image_is_not(plain: Front) -> None:
    assert "50000000" in plain.refused(413, "/v1/responses", LIST, content=bytes(50_000_001))
    plain.haproxy.logged(status=413, why="a body that is too long")
    assert plain.call("/v1/responses", LIST, content=bytes(50_000_000)).status_code == 200


def test_the_limit_of_a_body_can_be_set(tmp_path: Path) -> None:
    with front(tmp_path, FRONT_BODY_LIMIT="1000") as small:
        assert "1000 bytes" in small.refused(413, CHAT, LIST, content=bytes(1001))
        assert small.call(headers=LIST, content=bytes(1000)).status_code == 200


@pytest.mark.parametrize(
    "length", ["9223372036854775808", "18446744073709551615", "99999999999999999999", "-1", "0x10", "1,2", "50000001, 50000001"]
)
def test_no_length_slips_by_the_limit(plain: Front, length: str) -> None:
    head = f"POST {CHAT} HTTP/1.1\nHost: localhost\nAuthorization: Bearer openai=sk\nContent-Length: {length}"
    with plain.untouched():
        assert plain.raw(head, b"{}")[0] in (400, 413)


def test_a_body_of_unknown_length_is_refused(plain: Front) -> None:
    for method in ("POST", "GET", "PUT"):
        plain.refused(411, "/v1/responses", LIST, method, content=iter([b"{", b"}"]))
    assert plain.raw(f"POST {CHAT} HTTP/1.1\nHost: localhost\nAuthorization: Bearer openai=sk")[0] == 411


def test_a_gateway_learns_the_callers_address_from_the_front_alone(plain: Front) -> None:
    claims = dict.fromkeys(("X-Forwarded-For", "X_Forwarded_For", "X-Real-IP"), "9.9.9.9")
    claims |= {"X-Forwarded-Proto": "ftp", "Forwarded": "for=9.9.9.9"}
    assert plain.call("/v1/models", claims, "GET").is_success
    assert "9.9.9.9" not in plain.gateway.heads[-1]
    assert "ftp" not in plain.gateway.heads[-1]
    assert plain.gateway.headers()["x-forwarded-for"] == "127.0.0.1"


# Connections.

SLOW = {
    "nothing": b"",
    "half a head": b"POST /v1/chat/comp",
    "half a body": f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer openai=sk\r\nContent-Length: 9\r\n\r\n{{".encode(),
    "headers without end": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: y\r\n",
}


def received(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(1000):
            answer += data
    return answer


def test_who_connects_and_does_not_ask_is_sent_away(plain: Front) -> None:
    """At the egress door too."""
    with plain.untouched(), contextlib.ExitStack() as stack:
        connections = {name: stack.enter_context(plain.haproxy.connect()) for name in SLOW}
        egress = socket.create_connection(("127.0.0.1", plain.haproxy.egress_port), timeout=60)
        connections["half at the egress door"] = stack.enter_context(egress)
        for name, connection in connections.items():
            connection.sendall(SLOW.get(name, b"POST /openai/v1 HTTP/1.1\r\nHost:"))
        said = {name: received(connection) for name, connection in connections.items()}
    assert said.pop("nothing") == b"", "a browser shows what comes on a connection that it has opened beforehand"
    assert [name for name, answer in said.items() if b" 408 " not in answer] == []


def test_headers_without_end_are_cut_off(plain: Front) -> None:
    with plain.haproxy.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")
        for i in range(10_000):
            connection.sendall(f"X-{i}: {'x' * 100}\r\n".encode())
        raise AssertionError("1 MB of headers was taken.")
    assert plain.raw("GET /v1/models HTTP/1.1\nHost: localhost\nX: " + "x" * 20_000)[0] in (0, 400, 431)


def turned_away(connection: socket.socket) -> bool:
    """Whether it was closed without a word. One that was let in stays open for a while."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_one_address_cannot_take_all_places(plain: Front) -> None:
    """Nor can one machine, which has all of 127.0.0.0/8 for its own."""
    with contextlib.ExitStack() as stack:
        connections = []
        for i in range(600):
            with contextlib.suppress(ConnectionError):
                source = (f"127.0.0.{2 + i % 20}", 0)
                connection = socket.create_connection(("127.0.0.1", plain.haproxy.port), 60, source)
                connections.append(stack.enter_context(connection))
                connection.sendall(b"GET /")  # Whoever is let in is told in the end that this is no request.
        assert len(connections) < 600 or eventually(lambda: sum(map(turned_away, connections)) >= 90, 20)
        assert httpx.get(f"{plain.haproxy.egress}/x", trust_env=False).status_code == 404
    wait_for(lambda: plain_answers(plain), seen=lambda: plain.haproxy.log)


def plain_answers(plain: Front) -> bool:
    """Whether the front takes a call."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{plain.haproxy.url}/v1/models", trust_env=False).is_success
    return False


def test_neither_door_can_use_up_the_others_places() -> None:
    text = {name: (CONFIGURATION / f"{name}.cfg").read_text() for name in BOTH}
    limits = {name: [int(limit) for limit in re.findall(r"^ *maxconn (\d+)", text[name], re.MULTILINE)] for name in text}
    assert len(limits["front"]) == len(limits["egress"]) == 1
    assert limits["front"][0] + limits["egress"][0] < limits["global"][0]


def test_a_flood_at_the_egress_door_leaves_the_front_alone(plain: Front) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(1_600):
            connection = stack.enter_context(socket.socket())
            connection.setblocking(False)
            connection.connect_ex(("127.0.0.1", plain.haproxy.egress_port))
        assert plain.call("/v1/models", method="GET").is_success
        assert plain.call(NATIVE["openai"], KEY).is_success
    assert plain.call(f"{plain.haproxy.egress}/openai/v1/x").is_success


def test_who_hangs_up_frees_the_gateway(plain: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.gateway, "mode", "stall")
    with plain.waiting():
        pass
    wait_for(lambda: plain.gateway.alive == 0, seen=lambda: plain.haproxy.log)
    plain.haproxy.logged(why="the caller hung up before the server answered")


def test_a_call_that_a_gateway_may_have_seen_is_not_sent_again(plain: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain.gateway, "mode", "close")
    before = plain.seen()
    # On a connection of its own: as the second on one, HAProxy closes it without an answer, which says "try again".
    response = httpx.post(f"{plain.haproxy.url}{CHAT}", headers=LIST | {"Origin": ORIGIN}, json={}, trust_env=False)
    assert response.status_code == 502
    assert message(response) == "The server closed the connection before it answered."
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert plain.seen() == before + 1


def test_no_call_is_lost_where_the_server_closes_a_kept_connection(tmp_path: Path) -> None:
    """As it does some ms after an error, without a word. A large call could not be sent again, so it takes a new connection."""
    with front(tmp_path, gateway=Recorder("once"), START="1", START_WORKERS="1") as kept:
        kept.haproxy.admin("enable server gateways/a")
        for size in (10, 60_000):
            answers = [kept.call(headers=LIST, content=b"x" * each).status_code for each in (10, size)]
            assert answers == [200, 200], f"the second one had {size} bytes"


def test_a_refused_connection_carried_nothing_and_another_gateway_is_asked(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with front(tmp_path, GATEWAY_B=address) as several:
            assert all(several.call(headers=LIST).is_success for _ in range(8))


def test_the_next_call_goes_to_the_gateway_that_has_fewer_open(tmp_path: Path) -> None:
    with Recorder("stall") as busy, front(tmp_path, GATEWAY_B=busy.address) as several, contextlib.ExitStack() as stack:
        several.haproxy.wait_until_up("a", "b")
        while not busy.alive:  # One of two goes there.
            connection = stack.enter_context(several.haproxy.connect())
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda c=connection: busy.alive or select.select([c], [], [], 0)[0], seen=lambda: several.haproxy.log)
        for _ in range(6):
            assert several.call(headers=LIST, timeout=10).is_success


def test_a_gateway_that_is_silent_for_too_long_is_a_sentence(tmp_path: Path) -> None:
    """The wait is shorter here."""
    with Recorder("stall") as silent:
        waiting = HAProxy(tmp_path, BALANCER, {"timeout server": "1s"}, GATEWAY_A=silent.address)
        with waiting, httpx.Client(base_url=waiting.url, trust_env=False, timeout=20) as client:
            response = client.post(CHAT, headers=LIST, json={})
            assert (response.status_code, message(response)) == (504, "The server was silent for too long.")
            waiting.logged(10, status=504, end="sH", why="timed out: the server was silent for too long")
        assert len(silent.heads) == 1


def test_a_gateway_that_has_ended_is_soon_not_asked_any_more(tmp_path: Path) -> None:
    """It hangs rather than refuses: calls would wait for it."""
    with Recorder("stall") as hanging, front(tmp_path, BALANCER, GATEWAY_B=hanging.address) as several:
        several.haproxy.wait_until_up("a", "b")
        hanging.healthy = False
        down = re.compile(r"^gateways,b,.*,DOWN,", re.MULTILINE)
        wait_for(lambda: down.search(several.haproxy.admin("show stat")), 8, seen=lambda: several.haproxy.admin("show stat"))
        assert all(several.call(headers=LIST, timeout=10).is_success for _ in range(4))
        hanging.healthy = True
        several.haproxy.wait_until_up("b", seconds=8)


def test_a_call_that_no_gateway_takes_is_a_sentence(tmp_path: Path) -> None:
    with front(tmp_path, BALANCER, GATEWAY_A="127.0.0.1:9", GATEWAY_B="127.0.0.1:9") as nobody:
        wait_for(lambda: nobody.call(headers=LIST).status_code == 503, seen=lambda: nobody.haproxy.log)
        assert nobody.refused(503, CHAT, LIST) == "No gateway is up."


def test_no_model_thinks_longer_than_a_proxy_waits() -> None:
    """The gateway gives a vendor 600 s, so that a proxy before or behind it must give it more."""
    text = "\n".join((CONFIGURATION / f"{name}.cfg").read_text() for name in BOTH)
    given, units = {}, {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
    for name, number, unit in re.findall(r"^\s*timeout (\S+) (\d+)(\w+)$", text, re.MULTILINE):
        given.setdefault(name, []).append(int(number) * units[unit])
    assert openai.DEFAULT_TIMEOUT.read == 600
    assert {"client", "server", "connect"} <= given.keys()
    assert min(given["client"] + given["server"]) > 600
    assert max(given["connect"]) <= 5


def test_nobody_elsewhere_reaches_it_unless_told() -> None:
    assert "setenv FRONT_BIND 127.0.0.1:8320" in (CONFIGURATION / "front.cfg").read_text()


# Pages of other origins.

NO_KEY, VENDOR = "no key that counts here", "the vendor answered so"
ANSWERED = [
    (CHAT, {}, "POST", 401, NO_KEY),
    (CHAT, {"Host": "evil.example"}, "POST", 421, "a name that is not known here"),
    (CHAT, [("x-api-key", "a"), ("x-api-key", "b")], "POST", 400, "more than one credential"),
    ("/docs", {}, "GET", 404, "nothing at this path"),
    ("/v1/models", {}, "TRACE", 405, "no method that is known here"),
    ("/openai/v1/status/429", {}, "POST", 429, VENDOR),
    ("/gemini/v1/status/500", {}, "POST", 500, VENDOR),
    ("/openai/v1/x", {"Authorization": "Bearer gemini=g"}, "POST", 401, NO_KEY),
    ("/v1/models", {}, "GET", 200, "-"),
    ("/openai/v1/x", {}, "POST", 200, "-"),
]


@pytest.mark.parametrize(("path", "headers", "method", "status", "why"), ANSWERED)
def test_each_answer_tells_pages_and_the_log_what_it_is(
    plain: Front, path: str, headers: dict | list, method: str, status: int, why: str
) -> None:
    """A page that may call can read it and no other can, it is no page itself, and the log has the reason of an error."""
    for origin, allowed in {ORIGIN: True, f"{ORIGIN}.evil": False, "null": False, "none": False, f"{ORIGIN}/": False}.items():
        response = plain.call(path, [*httpx.Headers(headers).multi_items(), ("Origin", origin)], method)
        assert response.status_code == status
        assert response.headers.get_list("access-control-allow-origin") == ([ORIGIN] if allowed else [])
        assert "Origin" in response.headers["vary"]
        assert response.headers["content-security-policy"] == "sandbox; default-src 'none'"
        assert response.headers["x-content-type-options"] == "nosniff"
    plain.haproxy.logged(status=status, why=why, path=path)


def test_a_page_can_read_a_servers_error(plain: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock server leaves the header out of every 500 and of a vendor's errors; of others it has its own."""
    answer = b"HTTP/1.1 500 X\r\nAccess-Control-Allow-Origin: https://other.example\r\nContent-Length: 2\r\n\r\n{}"
    monkeypatch.setattr(plain.gateway, "answer", answer)
    response = plain.call(headers=LIST | {"Origin": ORIGIN})
    assert response.status_code == 500
    assert response.headers.get_list("access-control-allow-origin") == [ORIGIN]


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/openai/v1/responses", "/gemini/v1beta/files/x"])
def test_what_a_page_asks_beforehand_is_answered(plain: Front, path: str) -> None:
    named = "authorization,x-llamastack-provider-data,x-stainless-os"
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": named}
    with plain.untouched():
        response = plain.call(path, asked | {"Origin": ORIGIN}, "OPTIONS")
        refused = plain.call(path, asked | {"Origin": "https://evil.example"}, "OPTIONS")
    assert (response.status_code, refused.status_code) == (204, 403)
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["access-control-allow-headers"] == named
    assert {"GET", "POST", "DELETE"} <= set(response.headers["access-control-allow-methods"].split(", "))
    assert int(response.headers["access-control-max-age"]) >= 60, "a browser would ask before each call"
    assert "Origin" in response.headers["vary"], "a cache would hand one page's answer to another"
    assert not [name for name in refused.headers if name.startswith("access-control")]
    plain.haproxy.logged(status=403, why="closed to this caller", path=path)


# The page.

FILES = {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}


@pytest.mark.parametrize("path", FILES)
def test_the_page_is_served(plain: Front, path: str) -> None:
    response = plain.call(path, method="GET")
    assert response.content == (PROJECT / "deploy" / "page" / FILES[path]).read_bytes()
    assert response.headers["content-type"].endswith("charset=utf-8")
    policy = dict(rule.strip().partition(" ")[::2] for rule in response.headers["content-security-policy"].split(";"))
    assert {policy.get(name) for name in ("default-src", "base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert {policy.get(name) for name in ("script-src", "style-src", "connect-src")} == {"'self'"}
    assert response.headers["cache-control"] == "no-cache", "a browser would show the page of the last release"
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert plain.call(path, method="HEAD").status_code == 200
    assert plain.call(path).status_code == 401


# The log.

FIELDS = {"time", "door", "method", "path", "to", "status", "ms_first_byte", "ms_total", "end", "client", "why"}


def test_each_call_is_a_line_of_the_log(plain: Front) -> None:
    plain.call("/v1/chat/completions?key=secret-in-url", LIST | {"X-Secret": "secret-in-header"}, content=b"secret-in-body")
    plain.call("/openai/v1/status/404?a=secret-in-url", {"Authorization": "Bearer sk-secret"})
    plain.call(f"/v1/{'long' * 100}", method="GET")
    plain.haproxy.logged(path=f"/v1/{'long' * 49}")
    plain.haproxy.logged(path="/openai/v1/status/404")
    call = {"path": CHAT, "method": "POST", "status": 200, "to": "gateways", "door": "front"}
    plain.haproxy.logged(**call, client="127.0.0.1", why="-", end="--")
    (called, *_) = plain.haproxy.lines(**call)
    assert set(called) == FIELDS
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", called["time"])
    assert 0 <= called["ms_first_byte"] <= called["ms_total"] + 1
    assert "secret" not in plain.haproxy.log


FORGED = [
    'GET /v1/x","status":200,"a":" HTTP/1.1',
    "GET /v1/x\\ HTTP/1.1",
    "GET /v1/a\rb HTTP/1.1",
    "GET /v1/a%0a{%22door%22:%22front%22,%22path%22:%22/forged%22} HTTP/1.1",
    'X"Y /v1/x HTTP/1.1',
    "X{Y}' /v1/x HTTP/1.1",
    "GET /v1/\x00x HTTP/1.1",
    "GET /v1/\xc3\xa9\xff\x80 HTTP/1.1",
    "GET /v1/\x1b[31m HTTP/1.1",
    f"GET /{'%e9%22' * 300} HTTP/1.1",
    "GET /v1/%22%5c HTTP/9.9",
    f"{'M' * 5000} /v1/x HTTP/1.1",
]


@pytest.mark.parametrize("line", FORGED)
def test_no_line_of_the_log_is_a_callers(plain: Front, line: str) -> None:
    before = len(plain.haproxy.log.splitlines())
    plain.raw(f"{line.replace(chr(13), '<CR>')}\nHost: localhost\nX-Forwarded-For: 9.9.9.9".replace("<CR>", "\r"))
    wait_for(lambda: len(plain.haproxy.log.splitlines()) > before)
    for text in plain.haproxy.log.splitlines()[before:]:
        found = json.loads(text)
        assert set(found) == FIELDS
        assert found["method"] in {"GET", "other", "-"}
        assert found["client"] == "127.0.0.1"
        assert len(found["path"]) <= 200
        assert text.isascii()
        assert not re.search(r"[\x00-\x1f\x7f]", text)
    assert not plain.haproxy.lines(path="/forged")


def test_a_line_for_what_is_no_request(plain: Front) -> None:
    plain.haproxy.raw(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")
    plain.haproxy.logged(status=400, why="no complete request", method="-")


# Start and end.


def test_it_tells_that_it_starts_and_stops(tmp_path: Path) -> None:
    """A call in hand is not cut when the server is drained."""
    with front(tmp_path, START="1", LLAMA_STACK_CORS_ORIGIN=ORIGIN) as started:
        response = started.call(headers=LIST | {"Origin": ORIGIN})
        assert response.status_code == 503
        assert "starting" in message(response)
        assert response.headers["retry-after"] == "2"
        assert response.headers["access-control-allow-origin"] == ORIGIN
        assert not started.gateway.heads
        assert started.call("/", method="GET").is_success
        assert started.call(NATIVE["openai"], KEY).is_success
        started.haproxy.admin("enable server gateways/a")
        assert started.call(headers=LIST).is_success
        started.gateway.mode = "stall"
        with started.waiting():
            started.haproxy.admin("set server gateways/a state drain")
            for path in (CHAT, NATIVE["openai"], "/"):
                assert "stopping" in started.refused(503, path, LIST)
            assert started.call(headers=LIST).headers["retry-after"] == "2"
            started.haproxy.logged(status=503, why="closed or starting or stopping")
            assert started.gateway.alive == 1


def test_a_server_that_is_gone_is_told_at_once(tmp_path: Path) -> None:
    with front(tmp_path, START="1", GATEWAY_A="127.0.0.1:9") as gone:
        gone.haproxy.admin("enable server gateways/a")
        began = time.monotonic()
        assert "takes no calls" in gone.refused(503, CHAT, LIST)
        assert time.monotonic() - began < 2
        gone.haproxy.logged(why="no server took the call")


def test_sockets_can_be_inherited(tmp_path: Path) -> None:
    """So that nobody else can bind them while one of a gateway's processes lives."""
    with contextlib.ExitStack() as stack, Recorder() as recorder:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        one, two, egress = (each.fileno() for each in sockets)
        urls = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in sockets]
        admin = stack.enter_context(socket.socket(socket.AF_UNIX))
        admin.bind(str(tmp_path / "admin"))
        admin.listen()
        settings = {"FRONT_BIND": f"fd@{one},fd@{two}", "EGRESS_BIND": f"fd@{egress}", "HAPROXY_SOCKET": f"fd@{admin.fileno()}"}
        haproxy = HAProxy(tmp_path, GATEWAY_A=recorder.address, START="1", **settings)
        haproxy.start(pass_fds=[one, two, egress, admin.fileno()])
        stack.callback(haproxy.__exit__)
        # These wait in the sockets until it is up.
        assert httpx.get(f"{urls[0]}/v1/models", trust_env=False, timeout=60).status_code == 503, haproxy.log
        haproxy.admin("enable server gateways/a")
        for url in urls[:2]:
            assert httpx.get(f"{url}/v1/models", trust_env=False).is_success
        assert httpx.get(f"{urls[2]}/x", trust_env=False).status_code == 404


def test_the_admin_socket_is_its_users_alone(plain: Front) -> None:
    assert stat.S_IMODE(plain.haproxy.socket.stat().st_mode) == 0o600


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_it_ends_when_it_is_told(tmp_path: Path, number: signal.Signals) -> None:
    """SIGUSR1 lets calls in hand finish, SIGTERM drops them."""
    with front(tmp_path, gateway=Recorder("stall")) as ending, ending.waiting() as connection:
        os.kill(ending.haproxy.process.pid, number)
        if number == signal.SIGUSR1:
            wait_for(lambda: not plain_answers(ending))
            assert ending.haproxy.process.poll() is None
            assert ending.gateway.alive == 1
            connection.close()
        ending.haproxy.process.wait(60)
        wait_for(lambda: ending.gateway.alive == 0)


def test_a_second_one_on_the_same_port_does_not_start(plain: Front, tmp_path: Path) -> None:
    second = HAProxy(tmp_path, **plain.haproxy.settings | {"HAPROXY_SOCKET": str(tmp_path / "admin")})
    second.start()
    with contextlib.ExitStack() as stack:
        stack.push(second)  # One that does start ends here.
        assert second.process.wait(60) != 0
    assert plain.call("/v1/models", method="GET").is_success


def test_each_set_of_files_is_valid_without_a_setting(tmp_path: Path) -> None:
    for files in (SIDECAR, BALANCER, BOTH):
        haproxy = HAProxy(tmp_path, files)
        haproxy.settings.clear()
        haproxy.start("-c")
        assert haproxy.process.wait(60) == 0
        assert "WARNING" not in haproxy.log


def test_an_older_haproxy_says_what_it_lacks() -> None:
    assert ".if version_before(2.6)\n    .alert" in (CONFIGURATION / "global.cfg").read_text()
