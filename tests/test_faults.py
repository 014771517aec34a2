"""What vendors, callers and operators do to the gateway: what the caller gets, and that everybody else is served meanwhile.

The short tests run with `make test`. `make faults` runs the long ones too and writes what all of them measured to
tests/faults.md.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import trustme
import yaml
from conftest import Figure
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world.calls import ALL_KEYS, MODELS, RUN_YAML, arrivals, chat, events, message
from world.gateway import PROVIDER_DATA, SERVE, Gateway, copy_project, eventually, free_port, processes
from world.vendors import KEYS, Vendors

CHAT = "/v1/chat/completions"
GOOD = chat(MODELS[0], "good call")


class Others:
    """Another caller, who asks all the time. A context manager; afterwards `waited` has the seconds of each of its calls.

    Raises AssertionError at the end if one of its calls was not answered well.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.waited: list[float] = []
        self.problems: list[str] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.ask)

    def ask(self) -> None:
        with httpx.Client(base_url=self.gateway.url, trust_env=False, timeout=60) as client:
            while True:
                start = time.monotonic()
                try:
                    response = client.post(CHAT, headers=ALL_KEYS, json=GOOD)
                    if not response.is_success:
                        self.problems.append(f"{response.status_code} {response.text}")
                except httpx.HTTPError as error:
                    self.problems.append(repr(error))
                self.waited.append(time.monotonic() - start)
                if self.done.wait(0.05):
                    return

    @property
    def worst(self) -> float:
        return max(self.waited)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        assert self.problems == []


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> float:
    """The seconds until `condition` holds. Raises AssertionError after `seconds`."""
    start = time.monotonic()
    assert eventually(condition, seconds), "It did not come to that."
    return time.monotonic() - start


@contextlib.contextmanager
def open_stream(gateway: Gateway, model: str, prompt: str = "Hello") -> Iterator[None]:
    """A stream of which the first line has come, and whose caller stays."""
    with (
        httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client,
        client.stream("POST", CHAT, headers=ALL_KEYS, json=chat(model, prompt, stream=True)) as response,
    ):
        lines = response.iter_lines()  # Kept, because httpx hangs up when it is dropped.
        next(lines)
        yield


def assert_clean(gateway: Gateway) -> None:
    """No key, prompt or traceback is in the log."""
    log = gateway.log
    assert not [word for word in (*KEYS.values(), "Traceback", "good call", "secret prompt") if word in log]


def finished(response: httpx.Response) -> bool:
    """Whether a streamed answer says that it is complete."""
    return any(choice["finish_reason"] for event in events(response) for choice in event.get("choices", []))


# Vendors


class Accepts:
    """A server on loopback that takes connections and says `greeting`, through TLS if it has a `context`."""

    def __init__(self, greeting: bytes = b"", context: Any = None) -> None:
        self.greeting, self.context = greeting, context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.kept: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.kept.append(connection)
                with contextlib.suppress(OSError):
                    if self.context:
                        connection = self.context.wrap_socket(connection, server_side=True)
                    if self.greeting:
                        connection.sendall(self.greeting)
                        connection.close()

    def close(self) -> None:
        for each in (self.listener, *self.kept):
            each.close()


@pytest.fixture(scope="module")
def unreachable(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The shipped gateway with three more vendors, each out of reach for a reason of its own."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    untrusted, not_http = Accepts(b"HTTP/1.1 200 OK\r\n\r\n", context), Accepts(b"220 mail.example ESMTP\r\n")
    urls = {
        "refuses": f"http://127.0.0.1:{free_port()}",
        "nameless": "https://vendor.invalid",
        "untrusted": f"https://127.0.0.1:{untrusted.port}",
        "not-http": f"http://127.0.0.1:{not_http.port}",
    }
    more = [
        {
            "provider_id": name,
            "provider_type": "remote::passthrough",
            "config": {"base_url": url, "forward_headers": {"openai_authorization": "Authorization"}},
        }
        for name, url in urls.items()
    ]
    folder = copy_project(tmp_path_factory.mktemp("unreachable") / "project")
    config = RUN_YAML | {"providers": {"inference": RUN_YAML["providers"]["inference"] + more}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    environ = vendors.environ() | {"NO_PROXY": "127.0.0.1,.invalid"}
    with Gateway(folder / "home", SERVE, folder, **environ) as gateway:
        yield gateway
    untrusted.close()
    not_http.close()


UNREACHABLE = {
    "refuses": "vendor refuses the connection",
    "nameless": "vendor's name does not resolve",
    "untrusted": "vendor's certificate is not trusted",
    "not-http": "vendor does not speak HTTP",
}


@pytest.mark.parametrize("fault", UNREACHABLE)
@pytest.mark.parametrize("stream", [False, True], ids=["regular", "stream"])
def test_a_vendor_out_of_reach_is_an_error(unreachable: Gateway, figures: list[Figure], fault: str, stream: bool) -> None:
    start = time.monotonic()
    with Others(unreachable) as others:
        response = httpx.post(
            unreachable.url + CHAT,
            headers=ALL_KEYS,
            json=chat(f"{fault}/any", "secret prompt", stream=stream),
            trust_env=False,
            timeout=60,
        )
    assert response.status_code == 500
    assert message(response) == "Internal server error: An unexpected error occurred."
    if not stream:
        figures.append(Figure(UNREACHABLE[fault], "500", time.monotonic() - start, others.worst))
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
    figures.append(
        Figure(
            "vendor answers what is not JSON",
            "400, as if the caller were to blame; in a stream an error event",
            time.monotonic() - start,
            others.worst,
        )
    )


WHOLE = "This is a stand-in for OpenAI, not cut-{size} itself. You said: Hi"


def assert_never_looks_complete(client: httpx.Client, size: int) -> None:
    """A stream of which the vendor sends `size` bytes ends with an error event, or has all of the text."""
    response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"openai/cut-{size}", "Hi", stream=True))
    assert response.status_code == 200
    if finished(response):
        choices = [choice for event in events(response) for choice in event.get("choices", [])]
        assert "".join(choice["delta"]["content"] or "" for choice in choices) == WHOLE.format(size=size)
    else:
        assert events(response)[-1]["error"]["message"]


@pytest.mark.parametrize("size", [0, 1, 6, 100, 250, 777, 1500, 1900])
def test_a_stream_cut_anywhere_never_looks_complete(client: httpx.Client, size: int) -> None:
    assert_never_looks_complete(client, size)


@pytest.mark.slow
def test_a_stream_cut_at_every_byte_never_looks_complete(gateway: Gateway, client: httpx.Client, figures: list[Figure]) -> None:
    start = time.monotonic()
    with Others(gateway) as others:
        for size in range(2_400):
            assert_never_looks_complete(client, size)
    seconds = (time.monotonic() - start) / 2_400
    figures.append(Figure("vendor cuts a stream, at each of 2,400 bytes", "an error event, each time", seconds, others.worst))
    assert_clean(gateway)


@pytest.mark.parametrize("size", [0, 1, 100, 300])
def test_an_answer_cut_anywhere_is_an_error(client: httpx.Client, size: int) -> None:
    response = client.post(CHAT, headers=ALL_KEYS, json=chat(f"openai/cut-{size}", "Hi"))
    assert response.status_code == 500
    assert message(response)


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
        response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/stall", "no answer", timeout=0.3))
    assert response.status_code == 500
    assert message(response)
    attempts = vendors.seen_with("no answer")
    assert len(attempts) == 3
    assert "timeout" not in attempts[0].json
    figures.append(Figure('vendor never answers, `"timeout": 0.3` in the body', "500", time.monotonic() - start, others.worst))
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


# Callers


@pytest.mark.parametrize(
    ("model", "when"), [("slow", "while the vendor talks"), ("stall", "while the vendor is silent")], ids=["slow", "stall"]
)
def test_a_caller_that_hangs_up_ends_the_vendors_stream(
    gateway: Gateway, vendors: Vendors, figures: list[Figure], model: str, when: str
) -> None:
    wait_for(lambda: vendors.streaming == 0)
    with open_stream(gateway, f"openai/{model}", "one two three four five six seven eight nine ten " * 10):
        assert vendors.streaming == 1
    with Others(gateway) as others:
        seconds = wait_for(lambda: vendors.streaming == 0, 60)
        time.sleep(0.2)
    figures.append(Figure(f"caller hangs up {when}", "the vendor's stream is closed", seconds, others.worst))


@pytest.mark.slow
def test_a_caller_that_hangs_up_does_not_end_a_regular_call(gateway: Gateway, vendors: Vendors, figures: list[Figure]) -> None:
    """The server goes on asking the vendor, its retries included."""
    body = chat("openai/stall", "left alone", timeout=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=body, trust_env=False, timeout=0.5)
    seconds = wait_for(lambda: len(vendors.seen_with("left alone")) == 3)
    figures.append(Figure("caller hangs up on a regular call", "it goes on, its retries too", seconds, None))


def test_a_caller_that_sends_10_mb(gateway: Gateway, client: httpx.Client, vendors: Vendors, figures: list[Figure]) -> None:
    prompt = "0123456789" * 1_000_000
    start = time.monotonic()
    with Others(gateway) as others:
        response = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/structured", prompt))
    assert response.is_success
    assert any(seen.body.count(b"0123456789") == 1_000_000 for seen in vendors.seen if len(seen.body) > 10_000_000)
    figures.append(Figure("caller sends 10 MB", "all of it reaches the vendor", time.monotonic() - start, others.worst))


def test_500_connections_that_say_nothing_or_half_a_request(gateway: Gateway, figures: list[Figure]) -> None:
    address = ("127.0.0.1", gateway.port)
    with contextlib.ExitStack() as stack:
        for i in range(500):
            connection = stack.enter_context(socket.create_connection(address))
            if i % 2:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        with Others(gateway) as others:
            time.sleep(2)
    figures.append(Figure("500 connections idle or half-way through a request", "others are served", None, others.worst))


@pytest.mark.slow
def test_errors_close_the_connection_unannounced(gateway: Gateway, figures: list[Figure]) -> None:
    """How a client that keeps its connections and does not retry fares with the next call after an error."""
    lost = 0
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
        for _ in range(1_000):
            refused = client.post(CHAT, headers=ALL_KEYS, json=chat("openai/no-such-model"))
            assert refused.status_code == 404
            assert "connection" not in refused.headers
            try:
                assert client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success
            except httpx.TransportError:
                lost += 1
    figures.append(
        Figure("1,000 calls, each on a connection that an error came over, without retries", f"{lost} lost", None, None)
    )


# Anything at all

SECRET = "sk-fake-openai-SECRET"
NAMES = ["openai_authorization", "passthrough_api_key", "passthrough_url", "gemini_api_key", "__authenticated_user", "__x"]
PARAMETERS = ["messages", "stream", "tools", "tool_choice", "response_format", "n", "timeout", "extra_body", "extra_headers"]

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(f"Bearer {SECRET}")
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(PARAMETERS), inner, max_size=3)
    ),
    max_leaves=8,
)
# Any bytes that an HTTP client agrees to send.
header_bytes = (
    st.binary(max_size=60)
    .filter(lambda raw: not set(raw) & set(b"\0\r\n\v\f"))
    .map(lambda raw: raw.lstrip(b" \t") + SECRET.encode())
)
header_values = header_bytes | (
    (anything | st.dictionaries(st.sampled_from(NAMES), anything)).map(lambda value: json.dumps(value).encode())
)
bodies = st.binary(max_size=60) | st.dictionaries(st.sampled_from(PARAMETERS), anything, max_size=3).map(
    lambda more: json.dumps(chat("openai/any", "Hi") | more).encode()
)


def assert_survives(gateway: Gateway, header: bytes | None, body: bytes) -> None:
    """Whatever the call, it is answered, without a traceback or a key, and the next good call is too."""
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
        headers = {PROVIDER_DATA: header or ALL_KEYS[PROVIDER_DATA], "content-type": "application/json"}
        headers["authorization"] = f"Bearer {SECRET}"
        response = client.post(CHAT, headers=headers, content=body)
        assert 200 <= response.status_code < 600
        assert "Traceback" not in response.text
        if SECRET.encode() not in body:
            assert SECRET not in response.text
    with httpx.Client(base_url=gateway.url, trust_env=False, timeout=30) as client:
        assert client.post(CHAT, headers=ALL_KEYS, json=GOOD).is_success


def fuzz(examples: int, **more: Any) -> Any:
    """How hypothesis looks: without its database and its clock, because the gateway's pace is not what is tested."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, database=None, suppress_health_check=checks, **more)


@fuzz(25, derandomize=True)
@given(header=header_values)
def test_any_header(gateway: Gateway, header: bytes) -> None:
    assert_survives(gateway, header, json.dumps(chat("openai/any", "Hi")).encode())


@fuzz(25, derandomize=True)
@given(body=bodies)
def test_any_body(gateway: Gateway, body: bytes) -> None:
    assert_survives(gateway, None, body)


@pytest.mark.slow
@fuzz(500)
@given(header=header_values, body=bodies)
def test_any_header_with_any_body(gateway: Gateway, header: bytes, body: bytes) -> None:
    assert_survives(gateway, header, body)


def test_after_all_of_that_no_key_is_in_the_log(gateway: Gateway) -> None:
    assert SECRET not in gateway.log
    assert_clean(gateway)


# Operators


class Stream(threading.Thread):
    """A caller of a stream: `started` is set with its first line, `problem` is why it broke off."""

    def __init__(self, gateway: Gateway, model: str) -> None:
        super().__init__()
        self.gateway, self.model = gateway, model
        self.started = threading.Event()
        self.lines: list[str] = []
        self.problem: httpx.HTTPError | None = None
        self.start()
        assert self.started.wait(30)

    def run(self) -> None:
        body = chat(self.model, "secret prompt", stream=True)
        try:
            with (
                httpx.Client(base_url=self.gateway.url, trust_env=False, timeout=30) as client,
                client.stream("POST", CHAT, headers=ALL_KEYS, json=body) as response,
            ):
                for line in response.iter_lines():
                    self.lines.append(line)
                    self.started.set()
        except httpx.HTTPError as error:
            self.problem = error

    @property
    def finished(self) -> bool:
        return any('"finish_reason":"stop"' in line for line in self.lines)


def test_sigkill_restart_and_sigterm(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    gateway = Gateway(tmp_path, **vendors.environ()).start()
    try:
        streams = [Stream(gateway, "openai/slow") for _ in range(5)]
        start = time.monotonic()
        os.kill(gateway.server, signal.SIGKILL)
        for stream in streams:
            stream.join(10)
            assert stream.problem
            assert not stream.finished
        figures.append(
            Figure("SIGKILL with 5 streams in flight", "each caller's connection breaks", time.monotonic() - start, None)
        )
        assert gateway.process.wait(10) != 0
        wait_for(lambda: processes(gateway.process.pid) == [])
        start = time.monotonic()
        gateway.start()
        assert httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=GOOD, trust_env=False).is_success
        figures.append(Figure("restart after that", "boots and serves", time.monotonic() - start, None))

        streams = [Stream(gateway, "openai/slow") for _ in range(5)]
        start = time.monotonic()
        gateway.signal(signal.SIGTERM)
        wait_for(lambda: not gateway.answers(), 5)
        for stream in streams:
            stream.join(30)
            assert stream.finished
        gateway.process.wait(20)
        figures.append(
            Figure(
                "SIGTERM with 5 streams in flight", "new calls are refused, the streams finish", time.monotonic() - start, None
            )
        )
        wait_for(lambda: processes(gateway.process.pid) == [])
        assert_clean(gateway)
        left = [path.name for path in (tmp_path / ".llama").rglob("*") if not path.is_dir()]
        assert left == ["keeps-nothing.db"]
    finally:
        gateway.stop()


@pytest.mark.slow
def test_sigterm_waits_for_a_vendor_that_never_answers(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """As long as the caller does."""
    with Gateway(tmp_path, **vendors.environ()) as gateway:
        with open_stream(gateway, "openai/stall"):
            gateway.signal(signal.SIGTERM)
            wait_for(lambda: not gateway.answers(), 10)
            time.sleep(5)
            assert processes(gateway.process.pid)
        seconds = wait_for(lambda: processes(gateway.process.pid) == [])
    outcome = "waits until the caller hangs up"
    figures.append(Figure("SIGTERM with a vendor that never answers", outcome, seconds, None))


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_a_server_that_only_sigkill_ends(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    """It skips the server's own end, and the threads of the in-memory database keep the process. It serves nobody."""
    with Gateway(tmp_path, **vendors.environ()) as gateway:
        with open_stream(gateway, "openai/stall"):
            for _ in range(2):
                gateway.signal(signal.SIGINT)
                wait_for(lambda: not gateway.answers(), 10)
                time.sleep(1)
        time.sleep(5)
        assert processes(gateway.process.pid)
        gateway.signal(signal.SIGKILL)
        wait_for(lambda: processes(gateway.process.pid) == [])
    figures.append(Figure("Ctrl-C twice with a stream in flight", "does not end; SIGKILL ends it", None, None))


@pytest.mark.slow
def test_a_boot_waits_for_a_vendor_that_accepts_and_never_answers(tmp_path: Path, figures: list[Figure]) -> None:
    """It asks each vendor for its models first, with the 600 s and three attempts of any call; SIGTERM waits as well."""
    silent = Accepts()
    gateway = Gateway(tmp_path, OPENAI_PASSTHROUGH_URL=f"http://127.0.0.1:{silent.port}", HTTPS_PROXY="http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="did not start"):
        gateway.start(40)
    assert len(silent.kept) == 1
    silent.close()
    figures.append(Figure("vendor accepts and never answers while the gateway boots", "still not up after 40 s", None, None))


@pytest.mark.slow
def test_a_killed_worker_is_replaced(vendors: Vendors, tmp_path: Path, figures: list[Figure]) -> None:
    with Gateway(tmp_path, LLAMA_STACK_WORKERS="2", **vendors.environ()) as gateway:

        def workers() -> list[int]:
            return [int(pid) for pid, *line in processes(gateway.process.pid) if "spawn_main" in " ".join(line)]

        def calls(count: int) -> int:
            """How many of `count` calls were answered."""
            good = 0
            for _ in range(count):
                with contextlib.suppress(httpx.TransportError):
                    good += httpx.post(gateway.url + CHAT, headers=ALL_KEYS, json=GOOD, trust_env=False, timeout=30).is_success
            return good

        wait_for(lambda: len(workers()) == 2)
        wait_for(lambda: gateway.log.count("Application startup complete") == 2)
        victim = workers()[0]
        os.kill(victim, signal.SIGKILL)
        good = calls(20)
        assert good >= 19
        seconds = wait_for(lambda: gateway.log.count("Application startup complete") == 3)
        assert len(workers()) == 2
        assert victim not in workers()
        assert calls(20) == 20
        figures.append(Figure("one of 2 workers killed", f"replaced; {good} of the next 20 calls served", seconds, None))
