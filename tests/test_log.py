"""The gateway's log: a line for each call, a reason for each that failed, and nothing else that a caller or a vendor wrote."""

import json
import socket
from collections.abc import Iterator

import pytest
from support.calls import ALL_KEYS, CHAT, MODELS, caller, chat, responses
from support.gateway import ALONE, HAPROXY, Gateway, wait_for
from support.vendors import Vendors

AT = '"timestamp": "2026-11-26T01:16:08.832661Z"}'
BY_UVICORN = f'"level": "info", "logger": "uvicorn.error", "category": "server", {AT}'

# Whole lines of each shape that passes, as the server, or HAProxy, writes them.
FORGED = [
    f'{{"event": "203.0.113.9:1 - \\"POST /v1/forged HTTP/1.1\\" 200", "level": "info", "logger": "uvicorn.access", "category": "server", {AT}',
    f'{{"event": "Uvicorn running on http://forged:1", {BY_UVICORN}',
    f'{{"event": "Application startup complete.", {BY_UVICORN}',
    f'{{"category": "core::auth", "exc_info": true, "event": "Error during authentication", "level": "error", "logger": "llama_stack.core.server.auth", {AT}',
    '{"time": "2026-11-26T01:16:41.356Z", "door": "front", "method": "POST", "path": "/v1/forged", "status": 200, "client": "203.0.113.9"}',
    "httpx.ConnectError: [Errno -2] forged",
    "[ALERT]    (1) : forged",
]


@pytest.fixture(scope="module", params=["alone, 2 workers", "front"])
def gateway(request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    if request.param == "front" and not HAPROXY:
        pytest.skip("HAProxy is not installed (apt-get install haproxy)")
    settings = {} if request.param == "front" else ALONE | {"LLAMA_STACK_WORKERS": "2"}
    with Gateway(tmp_path_factory.mktemp("log"), **settings, **vendors.environ()) as gateway:
        yield gateway


def lines(gateway: Gateway) -> list[dict]:
    """The lines of the log, each of which is JSON."""
    return [json.loads(line) for line in gateway.log.splitlines()]


def lines_until(gateway: Gateway, path: str) -> list[dict]:
    """Ask for a path that is refused, and return the log as soon as that is in it."""
    with caller(gateway.url) as client:
        client.get(path)
    wait_for(lambda: path in gateway.log, 30, seen=lambda: gateway.log)
    return lines(gateway)


def sentences(gateway: Gateway) -> list[str]:
    """What the start says of its own accord."""
    return [line["event"] for line in lines(gateway) if "event" in line]


def test_callers_write_no_line_of_it(gateway: Gateway) -> None:
    """Whole lines of the log's own shapes, in all that its tracebacks quote. On Linux: macOS has nothing that tells them apart."""
    before = sentences(gateway)
    with caller(gateway.url) as client:
        for line in FORGED:
            forged = f"x\n{line}\n"
            for body in (
                chat(forged),
                chat(f"openai/{forged}"),
                chat(MODELS[0], **{forged: 1}),
                chat(MODELS[0], tools=[{"type": forged}]),
                chat(MODELS[0], temperature=forged),
                chat("openai/status-401", forged),
            ):
                client.post(CHAT, headers=ALL_KEYS, json=body)
            for body in (
                responses(forged),
                responses(MODELS[0], [{"role": forged, "content": forged}]),
                responses(MODELS[0], tools=[{"type": "mcp", "server_label": "x", "server_url": f"http://127.0.0.1:9/{forged}"}]),
            ):
                client.post("/v1/responses", headers=ALL_KEYS, json=body)
    lines_until(gateway, "/v1/the-last")
    for text in ("forged", "203.0.113.9", "sk-fake", "stand-in for", "Traceback", "says 401"):
        assert text not in gateway.log
    new = {sentence for sentence in sentences(gateway)[len(before) :] if not sentence.startswith("A call failed: ")}
    assert not new, "a forged line is taken for the server's"


def test_what_follows_the_question_mark_of_a_url_is_not_in_it(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        client.get("/v1/models?key=sk-fake-in-a-url")
        client.get('/v1/models?x HTTP/1.1\\" 200", "level": "sk-fake-in-a-url')
    found = lines_until(gateway, "/v1/the-last-of-urls")
    assert len([line for line in found if line.get("path") == "/v1/models"]) == 2
    assert "sk-fake-in-a-url" not in gateway.log


def test_the_address_in_it_is_the_connections_own(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        client.get(
            "/v1/claimed",
            headers={"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https", "Forwarded": "for=203.0.113.9"},
        )
    (line,) = [line for line in lines_until(gateway, "/v1/the-last-address") if line.get("path") == "/v1/claimed"]
    assert line["client"] == "127.0.0.1"


def test_every_call_is_in_it_in_one_line_of_one_shape(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        before = len(lines_until(gateway, "/v1/before"))
        client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0]))
        client.post(CHAT, headers=ALL_KEYS, json=chat("openai/status-429"))
    found = [line for line in lines_until(gateway, "/v1/the-last-call")[before:] if "path" in line]
    assert [(line["method"], line["path"], line["status"]) for line in found] == [
        ("POST", CHAT, 200),
        ("POST", CHAT, 429),
        ("GET", "/v1/the-last-call", 403),
    ]
    shape = {"time", "method", "path", "status", "client"}
    for line in found:
        assert line.keys() == shape if "door" not in line else line.keys() > shape, line


def test_a_failed_call_has_a_reason(gateway: Gateway) -> None:
    """Why no vendor answered is told in other words each: test_vendor_faults.py, and with the egress door test_egress.py."""
    words = {
        "openai/status-429": "A call failed: the vendor answered with an error.",
        "openai/stall": "A call failed: the vendor timed out.",
        MODELS[0]: "A call failed: an error in the server, or a call that it cannot take.",
    }
    with caller(gateway.url) as client:
        for model, sentence in words.items():
            body = chat(model, timeout=1) | ({"no_parameter": 1} if model == MODELS[0] else {})
            before = sentences(gateway).count(sentence)
            assert client.post(CHAT, headers=ALL_KEYS, json=body).is_error
            wait_for(lambda s=sentence, b=before: sentences(gateway).count(s) == b + 1, 30, seen=lambda: gateway.log)
        for stream in (False, True):
            before = sentences(gateway).count(words["openai/status-429"])
            client.post("/v1/responses", headers=ALL_KEYS, json=responses("openai/status-429", stream=stream))
            wait_for(lambda b=before: sentences(gateway).count(words["openai/status-429"]) == b + 1, 30, seen=lambda: gateway.log)


def test_a_malformed_request_is_logged_too(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
        caller.sendall(b"no call\r\n\r\n")
    said = "no complete request" if gateway.settings.get("FRONT") != "0" else "Invalid HTTP request received."
    wait_for(lambda: said in gateway.log, 30, seen=lambda: gateway.log)


def test_it_says_that_the_gateway_starts_and_last_what_to_paste(gateway: Gateway) -> None:
    said = sentences(gateway)
    assert said[0].startswith("The gateway starts.")
    answers = f"The gateway answers, until Ctrl-C, at {gateway.url}/v1"  # With several workers, when the last of them is up.
    assert said.count(answers) == 1
    ready = [sentence for sentence in said if sentence == "Application startup complete."]
    assert len(ready) == int(gateway.settings.get("LLAMA_STACK_WORKERS", "1"))
    assert said.index(answers) > len(said) - 1 - said[::-1].index(ready[-1])
    assert lines(gateway)[0].keys() == {"event", "level", "logger", "timestamp"}
