"""What callers do to the gateway: they hang up, send much, hold connections, meet errors on a kept connection.

What becomes of the call, and that everybody else is served meanwhile. `make faults` runs the long tests too.
"""

import contextlib
import socket
import time
from pathlib import Path

import httpx
import pytest
from support.callers import GOOD, Others, open_stream
from support.calls import ALL_KEYS, CHAT, caller, chat
from support.figures import Figure
from support.gateway import Gateway, eventually, wait_for
from support.haproxy import NEEDS_HAPROXY
from support.vendors import Vendors

# Words for minutes, of which one comes every 0.3 s.
LONG = "one two three four five six seven eight nine ten " * 500


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "when"), [("slow", "while the vendor talks"), ("stall", "while the vendor is silent")], ids=["slow", "stall"]
)
def test_a_stream_whose_caller_hangs_up_is_closed_by_the_calls_of_others(
    tmp_path: Path, figures: list[Figure], model: str, when: str
) -> None:
    """The server lets go of the vendor's connection when Python next collects garbage, and that takes work: calls."""
    # Both of its own, because nobody else may call, and no other test's stream may be open.
    with Vendors() as vendors, Gateway(tmp_path, **vendors.environ()) as gateway, caller(gateway.url) as others:
        with open_stream(gateway, f"openai/{model}", LONG):
            assert vendors.streaming == 1
        eventually(lambda: vendors.streaming == 0, 30)
        idle = "open after 30 s" if vendors.streaming else "closed within 30 s"
        calls = 0
        while vendors.streaming and calls < 1_000:
            assert others.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
            calls += 1
        assert vendors.streaming == 0
    outcome = f"the vendor's stream is {idle} in which nobody calls, and closed by the next {calls} calls"
    figures.append(Figure(f"caller hangs up {when}", outcome))


@pytest.mark.slow
def test_a_caller_that_hangs_up_does_not_end_a_regular_call(gateway: Gateway, vendors: Vendors, figures: list[Figure]) -> None:
    """The server goes on asking the vendor, its retries included."""
    body = chat("openai/stall", "left alone", timeout=5)
    with caller(gateway.url, timeout=httpx.Timeout(60, read=1)) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post(CHAT, headers=ALL_KEYS, json=body)
    seconds = wait_for(lambda: len(vendors.seen_with("left alone")) == 3)
    figures.append(Figure("caller hangs up on a regular call", "it goes on, its retries too", seconds))


def test_a_caller_that_sends_10_mb(gateway: Gateway, client: httpx.Client, vendors: Vendors, figures: list[Figure]) -> None:
    prompt = "0123456789" * 1_000_000
    start = time.monotonic()
    with Others(gateway) as others:
        response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/structured", prompt))
    assert response.is_success
    assert any(seen.body.count(b"0123456789") == 1_000_000 for seen in list(vendors.seen) if len(seen.body) > 10_000_000)
    figures.append(Figure("caller sends 10 MB", "all of it reaches the vendor", time.monotonic() - start, others.worst))


def test_500_connections_that_say_nothing_or_half_a_request(gateway: Gateway, figures: list[Figure]) -> None:
    address = ("127.0.0.1", gateway.port)
    with contextlib.ExitStack() as stack:
        for i in range(500):
            connection = stack.enter_context(socket.create_connection(address))
            if i % 2:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        with Others(gateway) as others:
            wait_for(lambda: len(others.waited) > 10)
    figures.append(Figure("500 connections idle or half-way through a request", "others are served", None, others.worst))


# What a connection may send without end, and without a key.
ENDLESS = {
    "header lines": (b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\n", b"X-Any: any\r\n" * 10_000),
    "one header line": (b"GET /v1/health HTTP/1.1\r\nHost: localhost\r\nX-Any: ", b"x" * 100_000),
    "a URL": (b"GET /v1/", b"x" * 100_000),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_comes_without_end_is_cut_off_and_not_kept(gateway: Gateway, figures: list[Figure], what: str) -> None:
    """By the server itself. Before a front, HAProxy does so. On one connection, up to 100 MB."""
    head, more = ENDLESS[what]
    before, sent = gateway.resident(), 0
    with Others(gateway) as others, socket.create_connection(("127.0.0.1", gateway.server_port), timeout=60) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            for _ in range(1_000):
                connection.sendall(more)
                sent += len(more)
    assert sent < 20_000_000, f"{sent / 1e6:.0f} MB were taken"
    grown = gateway.resident() - before
    assert grown < 20_000_000, f"{grown / 1e6:.0f} MB more memory"
    figures.append(Figure(f"{what} without end", "the connection is cut", None, others.worst))


@pytest.mark.slow
def test_errors_close_the_connection_unannounced(gateway: Gateway, figures: list[Figure]) -> None:
    """How a client that keeps its connections and does not retry fares with the next call after an error."""
    lost = 0
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=60) as client:
        for _ in range(1_000):
            refused = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/no-such-model"))
            assert refused.status_code == 404
            assert "connection" not in refused.headers
            try:
                assert client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
            except httpx.TransportError:
                lost += 1
    figures.append(Figure("1,000 calls, each on a connection that an error came over, without retries", f"{lost} lost"))


@NEEDS_HAPROXY
def test_a_kept_connection_loses_no_call_after_an_error(gateway: Gateway) -> None:
    """The server closes its side some ms after an error, without a word. The front sees to it that no caller notices."""
    answers = []
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=60) as client:
        for model in ["openai/status-401", "openai/gpt-4o"] * 40:
            answers.append(client.post(CHAT, headers=ALL_KEYS, json=chat(model)).status_code)
    assert answers == [401, 200] * 40
