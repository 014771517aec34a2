"""The gateway's log: a line for each call, in one shape, and nothing in it that a caller or a vendor wrote."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.calls import ALL_KEYS, MODELS, caller, chat
from support.gateway import START, Gateway, eventually
from support.vendors import Vendors

FORGED = '{"event": "203.0.113.9:1 - \\"POST /v1/forged HTTP/1.1\\" 200", "level": "info", "logger": "forged by sk-fake-forger"}'


@pytest.fixture(scope="module", params=["1", "2"], ids=["1 worker", "2 workers"])
def gateway(request: pytest.FixtureRequest, vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    home = tmp_path_factory.mktemp("log")
    with Gateway(home, START, LLAMA_STACK_WORKERS=request.param, **vendors.environ()) as gateway:
        yield gateway


def lines(gateway: Gateway) -> list[dict]:
    """The lines of the log, each of which is JSON."""
    return [json.loads(line) for line in gateway.log.splitlines()]


def last_line_after(gateway: Gateway, path: str) -> list[dict]:
    """Ask for a path that is refused, and return the log as soon as that is in it."""
    with caller(gateway.url) as client:
        client.get(path)
    assert eventually(lambda: path in gateway.log, 30)
    return lines(gateway)


def test_nothing_that_callers_write_is_in_it(gateway: Gateway) -> None:
    """Names with a newline and a line of the log's own shape in them, as they are quoted in tracebacks."""
    with caller(gateway.url) as client:
        for body in (
            chat(f"x\n{FORGED}\n"),
            chat(MODELS[0], **{f"x\n{FORGED}\n": 1}),
            chat(MODELS[0], tools=[{"type": f"\n{FORGED}\n"}]),
            chat(MODELS[0], temperature=f"\n{FORGED}\n"),
            chat("openai/status-401", f"\n{FORGED}\n"),
        ):
            client.post("/v1/chat/completions", headers=ALL_KEYS, json=body)
            client.post("/v1/responses", headers=ALL_KEYS, json={"model": body["model"], "input": f"\n{FORGED}\n"})
    last_line_after(gateway, "/v1/the-last")
    for text in ("forge", "sk-fake", "stand-in for", "Traceback", "says 401"):
        assert text not in gateway.log


def test_what_follows_the_question_mark_of_a_url_is_not_in_it(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        client.get("/v1/models?key=sk-fake-in-a-url")
        client.get('/v1/models?x HTTP/1.1\\" 200", "level": "sk-fake-in-a-url')
    found = [line["event"] for line in last_line_after(gateway, "/v1/the-last-of-urls")]
    assert sum(bool(re.fullmatch(r'127\.0\.0\.1:\d+ - "GET /v1/models HTTP/1\.1" 200', event)) for event in found) >= 2
    assert "sk-fake-in-a-url" not in gateway.log


def test_the_address_in_it_is_the_connections_own(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        client.get("/v1/claimed", headers={"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"})
    last_line_after(gateway, "/v1/the-last-address")
    assert "203.0.113.9" not in gateway.log


def test_every_call_is_in_it_in_one_shape(gateway: Gateway) -> None:
    with caller(gateway.url) as client:
        client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat(MODELS[0]))
        client.post("/v1/chat/completions", headers=ALL_KEYS, json=chat("openai/status-429"))
    found = last_line_after(gateway, "/v1/the-last-call")
    for status in (200, 429):
        assert [
            line for line in found if re.fullmatch(rf'[\d.:]+ - "POST /v1/chat/completions HTTP/1\.1" {status}', line["event"])
        ]
    assert {"event", "level", "logger", "timestamp"} <= set(found[-1])
    assert [line for line in found if line["event"] == "Exception in ASGI application"], "an error leaves no trace at all"


def test_its_first_lines_say_that_it_starts_and_where_it_answers(gateway: Gateway) -> None:
    assert lines(gateway)[0]["event"].startswith("The gateway starts.")
    answers = f"The gateway answers at {gateway.url}. Ctrl-C stops it."  # With several workers, when the last of them is up.
    assert eventually(lambda: answers in [line["event"] for line in lines(gateway)], 120)
    assert "HTTPS" not in gateway.log


def test_a_refused_token_is_told_from_a_vendors_401(vendors: Vendors, tmp_path: Path) -> None:
    """The stock server's log does not say what was wrong with the token."""
    with Gateway(tmp_path, START, AUTH_JWKS_URI="http://127.0.0.1:9/jwks", **vendors.environ()) as gateway:
        assert "Nothing answers at http://127.0.0.1:9/jwks" in gateway.log
        with caller(gateway.url) as client:
            assert client.get("/v1/models", headers={"Authorization": "Bearer sk-fake-token"}).status_code == 401
        assert eventually(lambda: "A token was refused" in gateway.log, 30)
        assert "sk-fake-token" not in gateway.log
