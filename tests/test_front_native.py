"""Native paths: a vendor's own API as it is, byte for byte, and never another vendor's."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.calls import message
from support.fronts import NATIVE, Front, front
from support.gateway import PROVIDER_DATA, wait_for
from support.haproxy import NEEDS_HAPROXY
from support.native_vendors import HOSTS, INTRUSIVE

pytestmark = NEEDS_HAPROXY

KEY = {"Authorization": "Bearer sk-fake"}
HEAD = "Host: localhost\nAuthorization: Bearer sk-fake"
# What leads the server to another place than a vendor's own, by vendor.
ELSEWHERE = {name: f"{name.upper()}_PASSTHROUGH_URL" for name in HOSTS}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """A front with its native paths open."""
    with front(tmp_path_factory.mktemp("native")) as native:
        yield native


@pytest.mark.parametrize("vendor", HOSTS)
def test_the_first_segment_names_the_vendor(native: Front, vendor: str) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        response = native.call(f"/{vendor}/v1/anything", KEY, method)
        assert response.json() == {"vendor": vendor}
        assert native.vendors.last.headers["host"] == HOSTS[vendor]
        assert native.vendors.last.head.startswith(f"{method} /v1/anything ".encode())


RESTS = ["/", "/v1/a%2Fb%25c%3f", "/v1//a/", "/a?b=c&d=%20e+f&g", "/a?", "/a/../../anthropic/v1", "/%2e%2e/x", "/openai/x", "/a;b=c", "/~!$&'()*+,;=:@", "/%[path]\\1"[:9]]  # fmt: skip


@pytest.mark.parametrize("rest", RESTS)
def test_what_follows_arrives_as_it_was_sent(native: Front, rest: str) -> None:
    assert native.raw(f"GET /openai{rest} HTTP/1.1\n{HEAD}")[0] == 200
    assert native.vendors.last.vendor == "openai"
    assert native.vendors.last.target == rest


@pytest.mark.parametrize(
    "target",
    ["/openai", "/openai?x=/y", "//openai/v1", "/%6fpenai/v1", "/OPENAI/v1", "/vendor-openai/v1", "/gateways/v1", "/./openai/v1", "/x/../openai/v1",
     "/.openai/v1", "/egress/v1", "/dns/x", "/openai%2Fv1"],
)  # fmt: skip
def test_what_only_resembles_a_native_path_is_none(native: Front, target: str) -> None:
    before = len(native.vendors.arrived)
    native.raw(f"GET {target} HTTP/1.1\n{HEAD}")
    assert len(native.vendors.arrived) == before
    assert native.raw(f"POST {target} HTTP/1.1\n{HEAD}\nContent-Length: 0")[0] in (401, 404)


@pytest.mark.parametrize(
    ("line", "more"),
    [
        ("GET http://api.anthropic.com/openai/v1 HTTP/1.1", ""),
        ("GET http://localhost/openai/v1 HTTP/1.1", ""),
        ("GET https://api.anthropic.com/ HTTP/1.1", ""),
        ("CONNECT api.anthropic.com:443 HTTP/1.1", ""),
        ("GET /openai/v1 HTTP/1.1", "Host: api.anthropic.com"),
        ("GET * HTTP/1.1", ""),
        ("GET openai/v1 HTTP/1.1", ""),
    ],
)
def test_no_url_or_host_leads_to_another_vendor(native: Front, line: str, more: str) -> None:
    hosts = line.split()[1].removeprefix("http://").removeprefix("https://").split("/")[0]
    with native.untouched():
        assert native.raw(f"{line}\n{HEAD}\n{more}")[0] in (400, 405, 421)
        assert native.raw(f"{line}\nHost: {hosts}\nAuthorization: Bearer sk-fake")[0] in (400, 405, 421)


def test_bodies_pass_byte_for_byte(native: Front) -> None:
    body = bytes(range(256)) * 20_000
    assert native.call("/openai/v1/echo", KEY, content=body).content == body
    assert native.vendors.last.body == body
    assert native.vendors.last.headers["content-length"] == str(len(body))
    chunks = [body[:1000], body[1000:3000], b"\r\n0\r\n"]
    assert native.call("/gemini/echo", KEY, content=iter(chunks)).content == b"".join(chunks)
    assert native.vendors.last.headers["transfer-encoding"] == "chunked"


def test_a_body_beyond_the_limit_of_calls_to_the_server_passes(native: Front) -> None:
    piece = bytes(1_000_000)
    assert native.call("/openai/v1/files", KEY, content=(piece for _ in range(60))).status_code == 200
    assert len(native.vendors.last.body) == 60_000_000


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """What comes on a connection that stays open, up to `end`."""
    answer = b""
    while not answer.endswith(end):
        data = connection.recv(65536)
        assert data, f"The connection was closed after {answer}"
        answer += data
    return answer


def test_a_slow_body_passes(native: Front) -> None:
    """On /v1 one has 10 s. Here a voice may be speaking: what has come is at the vendor before the rest is there."""
    with native.haproxy.connect() as connection:
        connection.sendall(b"POST /openai/slow HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        time.sleep(11)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    assert native.vendors.last.body == b"abc"


def test_an_answer_is_announced_before_a_body_is_sent(native: Front) -> None:
    """curl asks so for bodies beyond 1 MB."""
    head = b"POST /openai/echo HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    with native.haproxy.connect() as connection:
        connection.sendall(head + b"abc")
        assert b"\r\nabc\r\n" in read_until(connection, b"0\r\n\r\n")


def test_headers_pass_both_ways(native: Front) -> None:
    mine = {
        "OpenAI-Beta": "x=v1",
        "OpenAI-Organization": "org",
        "User-Agent": "me/1",
        "X-Custom": "a, b",
        "Accept-Encoding": "zstd",
    }
    response = native.call("/openai/v1/anything", KEY | mine)
    for name, value in mine.items():
        assert native.vendors.last.headers[name] == value
    assert response.headers["x-request-id"] == "req_fake"
    assert response.headers["retry-after"] == "7"
    assert "x-should-retry" not in response.headers


def test_a_vendor_learns_nothing_of_where_a_call_came_from(native: Front) -> None:
    claims = {"X-Forwarded-For": "9.9.9.9", "X_Forwarded_For": "9.9.9.9", "Forwarded": "for=9.9.9.9", "X-Real-IP": "9.9.9.9"}
    claims |= {"Origin": "http://localhost:3000", "Cookie": "a=b", "Proxy-Authorization": "Basic eA=="}
    claims["x_llamastack_provider_data"] = "{}"
    assert native.call("/openai/v1/anything", KEY | claims).status_code == 200
    assert not {name.lower() for name in native.vendors.last.headers} & {name.lower() for name in claims}
    assert "127.0.0.1" not in native.vendors.last.head.decode()


def test_a_vendors_error_passes_after_one_attempt_and_leaves_the_connection_open(native: Front) -> None:
    connections = set()
    for vendor, status in zip([*HOSTS, *HOSTS, "anthropic"], [400, 401, 404, 429, 500, 503, 529], strict=True):
        before = len(native.vendors.arrived)
        response = native.call(f"/{vendor}/v1/status/{status}", KEY)
        assert response.status_code == status
        assert message(response) == f"The vendor says {status}."
        assert "x-should-retry" not in response.headers
        assert len(native.vendors.arrived) == before + 1
        native.haproxy.logged(door="front", to=f"vendor-{vendor}", status=status, why="the vendor answered so")
        own = native.call("/v1/chat/completions", content=b"")
        assert own.status_code == 401
        for answered in (response, own):
            connections.add(answered.extensions["network_stream"].get_extra_info("client_addr"))
    assert len(connections) == 1


def test_nothing_of_a_vendors_reaches_the_page(native: Front) -> None:
    """The page and all vendors' answers come from one origin."""
    response = native.call("/openai/v1/intrusive", KEY)
    assert response.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not {name.lower() for name in INTRUSIVE} - {"content-security-policy"} & set(response.headers)


def test_a_redirect_does_not_take_other_vendors_keys_along(native: Front) -> None:
    """With a vendor's own key it passes, as it would come from the vendor: a client's library follows with all headers."""
    redirected = native.call("/gemini/v1/redirect", {"x-goog-api-key": "AIza-fake"})
    assert redirected.headers["location"] == "https://elsewhere.example/file"
    several = {PROVIDER_DATA: json.dumps({"gemini_api_key": "g", "openai_api_key": "o"})}
    for headers in ({"x-goog-api-key": "gemini=g;openai=o"}, several):
        response = native.call("/gemini/v1/redirect", headers)
        assert response.status_code == 502
        assert "redirects" in message(response)
        assert "location" not in response.headers


def test_an_upload_goes_on_through_the_front_and_the_servers_does_not(native: Front) -> None:
    response = native.call("/gemini/upload/v1beta/files", {"x-goog-api-key": "AIza-fake", "X-Goog-Upload-Command": "start"})
    url = response.headers["x-goog-upload-url"]
    assert url == f"{native.haproxy.url}/gemini/upload/v1beta/files?upload_id=1"
    assert native.call(url, {"X-Goog-Upload-Command": "upload, finalize"}, content=b"x").status_code == 200
    assert native.vendors.last.target == "/upload/v1beta/files?upload_id=1"
    assert native.vendors.last.headers["x-goog-upload-command"] == "upload, finalize"
    response = native.call(f"{native.haproxy.egress}/gemini/upload/v1beta/files", KEY)
    assert response.headers["x-goog-upload-url"].startswith("https://generativelanguage.googleapis.com/")


SOCKET = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="


@pytest.mark.parametrize(
    ("more", "arrives"),
    [
        ("Authorization: Bearer sk-fake", {"authorization": "Bearer sk-fake"}),
        ("Authorization: Bearer openai=sk-1;gemini=g", {"authorization": "Bearer sk-1"}),
        ("Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.sk-fake", {}),
    ],
)
def test_web_sockets_work(native: Front, more: str, arrives: dict) -> None:
    with native.haproxy.connect() as connection:
        request = f"GET /openai/v1/realtime?model=m HTTP/1.1\nHost: localhost\n{SOCKET}\n{more}\n\n".replace("\n", "\r\n")
        connection.sendall(request.encode())
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 101")
        for data in (b"\x81\x85\0\0\0\0hello", bytes(range(256))):
            connection.sendall(data)
            assert read_until(connection, data) == data
    assert native.vendors.last.target == "/v1/realtime?model=m"
    assert native.vendors.last.keys == arrives
    protocol = native.vendors.last.headers.get("sec-websocket-protocol", "")
    assert ("sk-fake" in protocol) == ("sk-fake" in more and not arrives)


def test_a_key_among_protocols_gives_way_to_a_list_and_goes_to_no_other_vendor(native: Front) -> None:
    protocol = {"Sec-WebSocket-Protocol": "realtime, openai-insecure-api-key.sk-fake, openai-beta.x"}
    assert native.call("/openai/v1/realtime", protocol | {"Authorization": "Bearer openai=sk-1"}, "GET").status_code == 200
    assert native.vendors.last.headers["sec-websocket-protocol"] == "realtime, openai-beta.x"
    assert native.call("/gemini/ws/x", protocol, "GET").status_code == 200
    assert "sec-websocket-protocol" not in native.vendors.last.headers
    several = {"Sec-WebSocket-Protocol": "openai-insecure-api-key.openai=sk-1;gemini=g"}
    native.refused(401, "/openai/v1/x", several, "GET")


def test_no_other_protocol_is_tunnelled(native: Front) -> None:
    """To HTTP/2 on a plain connection, say: nothing here could look into it."""
    for target in ("/openai/v1/x", "/v1/models"):
        upgrade = "Connection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABk"
        status, answer = native.raw(f"GET {target} HTTP/1.1\n{HEAD}\n{upgrade}")
        assert status == 200, answer
    assert "upgrade" not in native.vendors.last.headers
    assert "upgrade" not in native.gateway.headers()
    assert native.raw(f"GET /v1/models HTTP/1.1\n{HEAD}\n{SOCKET}")[0] == 200
    assert "upgrade" not in native.gateway.headers()


def test_calls_share_connections_and_each_has_its_own_key(native: Front) -> None:
    """Native calls and the server's take the same warm connections."""
    native.call("/openai/v1/x", KEY)
    opened = native.vendors.opened
    for i in range(4):
        key = {"Authorization": f"Bearer sk-fake-{i}"}
        with httpx.Client(trust_env=False) as other:
            assert other.post(f"{native.haproxy.url}/openai/v1/x", headers=key).is_success
            assert native.vendors.last.keys == {"authorization": f"Bearer sk-fake-{i}"}
            assert other.post(f"{native.haproxy.egress}/openai/v1/x", headers=key).is_success
    assert native.vendors.opened == opened


def test_who_hangs_up_ends_the_vendors_work(native: Front) -> None:
    with native.haproxy.connect() as connection:
        connection.sendall(b"POST /anthropic/silent HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        wait_for(lambda: native.vendors.waiting == 1)
    wait_for(lambda: native.vendors.waiting == 0)
    native.haproxy.logged(path="/anthropic/silent", why="the caller hung up before the vendor answered")


def test_many_calls_at_once_are_answered(native: Front) -> None:
    wanted = list(HOSTS) * 40
    with ThreadPoolExecutor(30) as pool:
        assert list(pool.map(lambda vendor: native.call(f"/{vendor}/v1/x", KEY).json()["vendor"], wanted)) == wanted


@pytest.mark.parametrize(
    ("settings", "closed", "told"),
    [
        ({"EGRESS": "0"}, HOSTS, "egress door"),
        *(({setting: "https://x.example"}, [name], setting) for name, setting in ELSEWHERE.items()),
        (dict.fromkeys(("EGRESS", "AUTH_JWKS_URI", *ELSEWHERE.values()), ""), [], ""),
    ],
)
def test_a_closed_path_says_why_and_the_server_reaches_the_vendor(
    tmp_path: Path, settings: dict[str, str], closed: list[str], told: str
) -> None:
    with front(tmp_path, **settings) as native:
        for name, path in NATIVE.items():
            response = native.call(path, KEY)
            assert response.status_code == (503 if name in closed else 200)
            assert name not in closed or told in message(response)
        assert {call.vendor for call in native.vendors.arrived} == set(HOSTS) - set(closed)
        for name in HOSTS if settings.get("EGRESS") != "0" else ():
            assert native.call(f"{native.haproxy.egress}/{name}/v1/x", KEY).json() == {"vendor": name}


def test_a_vendor_that_cannot_be_reached_is_told_and_its_reason_logged(tmp_path: Path) -> None:
    with front(tmp_path, EGRESS_VENDOR_PORT="9") as native:
        assert "No connection to the vendor" in native.refused(503, NATIVE["openai"], KEY)
        native.haproxy.logged(door="front", status=503, why="the vendor refused the connection")


def test_an_answer_that_breaks_off_is_seen_in_the_log(native: Front) -> None:
    with contextlib.suppress(httpx.RemoteProtocolError):
        assert native.call("/openai/v1/cut", KEY).status_code == 200
    native.haproxy.logged(path="/openai/v1/cut", status=200, end="SD")
