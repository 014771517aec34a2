"""What vendors do to the gateway: they are out of reach, answer garbage, cut streams, send much, are silent.

What the caller gets, and that everybody else is served meanwhile. The short tests run with `make test`. `make faults` runs the
long ones too, and writes what all of them measured to tests/faults.md.
"""

import itertools
import ssl
import time
from collections.abc import Iterator

import httpx
import pytest
import trustme
import yaml
from support.bare_servers import Accepts
from support.callers import Others, assert_clean
from support.calls import ALL_KEYS, CHAT, MODELS, RUN_YAML, arrivals, caller, chat, events, finished, message, responses
from support.figures import Figure
from support.gateway import START, Gateway, copy_project, free_port, wait_for
from support.vendors import Vendors


@pytest.fixture(scope="module")
def unreachable(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The shipped gateway with three more vendors, each out of reach for a reason of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    with Accepts(b"HTTP/1.1 200 OK\r\n\r\n", context) as untrusted, Accepts(b"220 mail.example ESMTP\r\n") as not_http:
        urls = {
            "refuses": f"http://127.0.0.1:{free_port()}",
            "nameless": "https://vendor.invalid",
            "untrusted": f"https://127.0.0.1:{untrusted.port}",
            "not-http": f"http://127.0.0.1:{not_http.port}",
        }
        forward = {"forward_headers": {"openai_authorization": "Authorization"}}
        more = [
            {"provider_id": name, "provider_type": "remote::passthrough", "config": forward | {"base_url": url}}
            for name, url in urls.items()
        ]
        folder = copy_project(tmp_path_factory.mktemp("unreachable") / "project")
        providers = RUN_YAML["providers"] | {"inference": RUN_YAML["providers"]["inference"] + more}
        (folder / "run.yaml").write_text(yaml.safe_dump(RUN_YAML | {"providers": providers}, sort_keys=False))
        environ = vendors.environ() | {"NO_PROXY": "127.0.0.1,.invalid"}
        with Gateway(folder / "home", START, folder, **environ) as gateway:
            yield gateway


# What it is, and what the log says of it.
UNREACHABLE = {
    "refuses": ("vendor refuses the connection", "the connection was refused, or there is no way there"),
    "nameless": ("vendor's name does not resolve", "no name server knows the vendor's name"),
    "untrusted": ("vendor's certificate is not trusted", "the vendor's certificate is not trusted (SSL_CERT_FILE)"),
    "not-http": ("vendor does not speak HTTP", "the connection broke off"),
}


@pytest.mark.parametrize("fault", UNREACHABLE)
def test_a_vendor_out_of_reach_is_an_error_and_the_log_says_why(unreachable: Gateway, figures: list[Figure], fault: str) -> None:
    what, why = UNREACHABLE[fault]
    line, start = f"A call failed: {why}.", time.monotonic()
    before = unreachable.log.count(line)
    with Others(unreachable) as others, caller(unreachable.url) as client:
        for stream in (False, True):
            response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"{fault}/any", "secret prompt", stream=stream))
            assert (response.status_code, message(response)) == (500, "Internal server error: An unexpected error occurred.")
    figures.append(Figure(what, "500", (time.monotonic() - start) / 2, others.worst))
    wait_for(lambda: unreachable.log.count(line) == before + 2, 30, seen=lambda: unreachable.log)
    assert_clean(unreachable)


def test_of_a_response_the_log_says_that_there_was_no_connection(unreachable: Gateway) -> None:
    """The server logs no more of it."""
    with caller(unreachable.url) as client:
        for stream in (False, True):
            client.post("/v1/responses", headers=ALL_KEYS, json=responses("refuses/any", "secret prompt", stream=stream))
    wait_for(lambda: unreachable.log.count("A call failed: no connection to the vendor.") == 2, 30, seen=lambda: unreachable.log)
    assert_clean(unreachable)


def test_a_vendor_that_answers_garbage_is_an_error(gateway: Gateway, client: httpx.Client, figures: list[Figure]) -> None:
    start = time.monotonic()
    with Others(gateway) as others:
        regular = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/garbage"))
        stream = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/garbage", stream=True))
    assert regular.status_code == 400
    assert "line 1 column 2" in message(regular)
    assert events(stream)[-1]["error"]["message"]
    assert not finished(stream)
    outcome = "400, as if the caller were to blame; in a stream an error event"
    figures.append(Figure("vendor answers what is not JSON", outcome, time.monotonic() - start, others.worst))


def assert_never_looks_complete(client: httpx.Client, size: int) -> None:
    """A stream of which the vendor sends `size` bytes ends with an error event, or has all of the text."""
    response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"anthropic/cut-{size}", "Hi", stream=True))
    assert response.status_code == 200
    if finished(response):
        whole = f"This is a stand-in for Anthropic, not cut-{size} itself. You said: Hi"
        choices = [choice for event in events(response) for choice in event.get("choices", [])]
        assert "".join(choice["delta"]["content"] or "" for choice in choices) == whole
    else:
        assert events(response)[-1]["error"]["message"], size


def test_what_is_cut_anywhere_never_looks_complete(client: httpx.Client) -> None:
    for size in (0, 1, 6, 100, 250, 777, 1500, 1900):
        assert_never_looks_complete(client, size)
    for size in (0, 1, 300):
        response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"openai/cut-{size}", "Hi"))
        assert (response.status_code, bool(message(response))) == (500, True), response.text


@pytest.mark.slow
def test_a_stream_cut_at_every_byte_never_looks_complete(gateway: Gateway, client: httpx.Client, figures: list[Figure]) -> None:
    start = time.monotonic()
    with Others(gateway) as others:
        for size in range(3_100):
            assert_never_looks_complete(client, size)
    seconds = (time.monotonic() - start) / 3_100
    figures.append(Figure("vendor cuts a stream, at each of 3,100 bytes", "an error event, each time", seconds, others.worst))
    assert_clean(gateway)


@pytest.mark.parametrize("stream", [False, True], ids=["regular", "stream"])
def test_a_vendor_that_sends_10_mb(gateway: Gateway, client: httpx.Client, figures: list[Figure], stream: bool) -> None:
    start = time.monotonic()
    with Others(gateway) as others:
        response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/big-10", stream=stream))
    seconds = time.monotonic() - start
    answers = events(response) if stream else [response.json()]
    parts = [choice["delta" if stream else "message"]["content"] or "" for answer in answers for choice in answer["choices"]]
    assert len("".join(parts)) == 10_000_000
    kind = "in a stream" if stream else "in one answer"
    figures.append(Figure(f"vendor sends 10 MB {kind}", "all of it arrives", seconds, others.worst))


def test_a_vendor_that_never_answers_can_be_given_a_time(
    gateway: Gateway, client: httpx.Client, vendors: Vendors, figures: list[Figure]
) -> None:
    """Left to itself the server waits 600 s for each of three attempts; a `timeout` in the body is the caller's own."""
    start = time.monotonic()
    with Others(gateway) as others:
        response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/stall", "no answer", timeout=2))
    assert response.status_code == 500
    assert message(response)
    attempts = vendors.seen_with("no answer")
    assert len(attempts) == 3
    assert "timeout" not in attempts[0].json
    figures.append(Figure('vendor never answers, `"timeout": 2` in the body', "500", time.monotonic() - start, others.worst))
    assert client.post(CHAT, headers=ALL_KEYS, json=chat(MODELS[0], "patience")).is_success
    assert vendors.seen_with("patience")[0].headers["x-stainless-read-timeout"] == "600"


@pytest.mark.slow
def test_a_chunk_every_10_seconds(gateway: Gateway, client: httpx.Client, figures: list[Figure]) -> None:
    with Others(gateway) as others:
        arrived = arrivals(client, "openai/every-10", "Hi")
    gaps = [later - sooner for sooner, later in itertools.pairwise(arrived)]
    assert len(arrived) > 10
    assert max(gaps) < 12
    assert sum(gap > 9 for gap in gaps) > 10
    figures.append(Figure("vendor sends a chunk every 10 s", "each as it comes", max(gaps), others.worst))
