"""Callers who mean harm, by the Responses API: nothing in a call makes the server connect to where its operator did not send it."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import httpx
import pytest
import uvicorn
from mcp.server.fastmcp import FastMCP
from support.calls import ALL_KEYS, MODELS, PIXEL, WEATHER_FUNCTION, caller, chat, events, output_text, responses
from support.gateway import ALONE, PROVIDER_DATA, Gateway, wait_for
from support.vendors import KEYS, InBackground, Vendors


class Listener:
    """Whoever waits on loopback to be called. A context manager; `calls` has the first bytes of each connection."""

    def __init__(self, answer: bytes = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n") -> None:
        self.answer = answer
        self.calls: list[bytes] = []

    def __enter__(self) -> Self:
        self.sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self.sockets[0].getsockname()[1]
        self.sockets.append(socket.create_server(("127.0.0.2", self.port)))
        with contextlib.suppress(OSError):  # A machine without IPv6.
            self.sockets.append(socket.create_server(("::1", self.port), family=socket.AF_INET6))
        for each in self.sockets:
            threading.Thread(target=self.listen, args=(each,), daemon=True).start()
        return self

    def listen(self, server: socket.socket) -> None:
        """Note each connection and answer it, until the socket is closed."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    self.calls.append(b"")
                    self.calls[-1] = connection.recv(65536)
                    connection.sendall(self.answer)

    def __exit__(self, *_: object) -> None:
        for each in self.sockets:
            each.shutdown(socket.SHUT_RDWR)
            each.close()


class Weathercaster(InBackground):
    """An MCP server on loopback with one tool. A context manager; `asked` has the cities that it was asked about."""

    async def serve(self) -> None:
        self.asked: list[str] = []
        server = FastMCP("weathercaster", stateless_http=True)

        @server.tool()
        def weather(city: str) -> str:
            """The weather in a city."""
            self.asked.append(city)
            return f"21 degrees in {city}"

        config = uvicorn.Config(server.streamable_http_app(), port=0, log_level="critical")
        serving = uvicorn.Server(config)
        task = asyncio.create_task(serving.serve())
        while not serving.started:
            await asyncio.sleep(0.01)
        self.url = f"http://127.0.0.1:{serving.servers[0].sockets[0].getsockname()[1]}"
        self.ready.set()
        await self.stop.wait()
        serving.should_exit = serving.force_exit = True
        await task


# Vendors, a gateway and a caller of this file's own: what is tried here is remembered in `strangers`.


@pytest.fixture(scope="module")
def vendors() -> Iterator[Vendors]:
    with Vendors() as vendors:
        yield vendors


@pytest.fixture(scope="module")
def gateway(vendors: Vendors, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Without a front, which would turn some of these away before."""
    with Gateway(tmp_path_factory.mktemp("gateway"), **ALONE, **vendors.environ()) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    with caller(gateway.url, timeout=120) as client:
        yield client


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


def with_mcp(url: str, model: str = MODELS[0], **more: object) -> dict:
    """The body of a call with the tools of an MCP server."""
    tool = {"type": "mcp", "server_label": "attacker", "server_url": url, "require_approval": "never"}
    return responses(model, tools=[tool], **more)


def refused(answer: httpx.Response) -> bool:
    """Whether a call with a tool failed, and did not for want of a body that makes sense."""
    if answer.status_code == 200:
        last = events(answer)[-1]
        return "error" in last or last["type"] == "response.failed"
    return answer.status_code in (500, 502, 503, 504)


URLS = [
    "http://127.0.0.1:{}/mcp",
    "http://127.0.0.1:{}/sse",
    "http://127.0.0.2:{}/mcp",
    "http://[::1]:{}/mcp",
    "http://[::ffff:127.0.0.1]:{}/mcp",
    "http://localhost:{}/mcp",
    "HTTP://LocalHost:{}/mcp",
    "http://localhost.:{}/mcp",
    "http://127.1:{}/mcp",
    "http://2130706433:{}/mcp",
    "http://0x7f000001:{}/mcp",
    "http://0.0.0.0:{}/mcp",
    "http://api.openai.com@127.0.0.1:{}/mcp",
    "http://127.0.0.1:{}#.api.openai.com/",
    "https://127.0.0.1:{}/mcp",
    "https://localhost:{}/mcp",
    "https://[::1]:{}/mcp",
]


@pytest.mark.parametrize("url", URLS)
def test_a_tool_cannot_make_the_server_call_loopback(client: httpx.Client, listener: Listener, url: str) -> None:
    for stream in (False, True):
        answer = client.post("/v1/responses", headers=ALL_KEYS, json=with_mcp(url.format(listener.port), stream=stream))
        assert listener.calls == []
        assert refused(answer)


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest/meta-data/", "https://169.254.169.254/", "http://metadata:1/"])
def test_a_tool_cannot_make_the_server_call_its_clouds_metadata(client: httpx.Client, url: str) -> None:
    assert refused(client.post("/v1/responses", headers=ALL_KEYS, json=with_mcp(url)))


def test_over_tls_the_operators_proxy_decides(client: httpx.Client, vendors: Vendors, listener: Listener) -> None:
    vendors.strangers.clear()
    client.post("/v1/responses", headers=ALL_KEYS, json=with_mcp(f"https://attacker.example:{listener.port}/mcp"))
    assert set(vendors.strangers) == {"attacker.example"}


def test_a_form_of_some_web_page_does_no_better(client: httpx.Client, listener: Listener) -> None:
    """The server takes forms, which a browser sends from any page without asking."""
    body = with_mcp(f"http://127.0.0.1:{listener.port}/mcp")
    form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in body.items()}
    answer = client.post("/v1/responses", data=form, headers={"origin": "https://attacker.example"})
    assert listener.calls == []
    assert refused(answer)


def test_images_and_files_are_the_vendors_to_fetch(client: httpx.Client, vendors: Vendors, listener: Listener) -> None:
    url = f"http://127.0.0.1:{listener.port}/secret"
    parts = [
        {"type": "input_image", "image_url": url},
        {"type": "input_file", "filename": "a.pdf", "file_url": url},
        {"type": "input_file", "filename": "a.pdf", "file_data": url},
    ]
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": [*parts, {"type": "input_image", "image_url": PIXEL}]}
    vendors.seen.clear()
    for part in parts:
        body = responses(MODELS[0], [{"role": "user", "content": [part]}])
        assert client.post("/v1/responses", headers=ALL_KEYS, json=body).is_success
    client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], [call, result], tools=[WEATHER_FUNCTION]))
    body = chat(MODELS[0]) | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    assert client.post("/v1/chat/completions", headers=ALL_KEYS, json=body).is_success
    assert len(vendors.seen_with(url)) >= 4
    assert listener.calls == []


# What an operator permits


@pytest.fixture(scope="module")
def weathercaster() -> Iterator[Weathercaster]:
    with Weathercaster() as weathercaster:
        yield weathercaster


@pytest.fixture(scope="module")
def redirector() -> Iterator[Listener]:
    with Listener() as redirector:
        yield redirector


@pytest.fixture(scope="module")
def permitting(
    vendors: Vendors, weathercaster: Weathercaster, redirector: Listener, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A caller of a gateway whose operator named two servers in NO_PROXY. A port is told in a URL alone."""
    permitted = f"{weathercaster.url},http://127.0.0.1:{redirector.port}"
    settings = vendors.environ() | {"NO_PROXY": permitted}
    with Gateway(tmp_path_factory.mktemp("permitting"), **settings) as gateway, caller(gateway.url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True], ids=["regular", "stream"])
def test_an_mcp_server_that_the_operator_named_is_used(
    permitting: httpx.Client, weathercaster: Weathercaster, vendors: Vendors, stream: bool
) -> None:
    weathercaster.asked.clear()
    body = with_mcp(f"{weathercaster.url}/mcp", "openai/tool-call", stream=stream)
    answer = permitting.post("/v1/responses", headers=ALL_KEYS, json=body)
    final = events(answer)[-1]["response"] if stream else answer.json()
    assert [item["type"] for item in final["output"]] == ["mcp_list_tools", "mcp_call", "message"]
    assert final["output"][-1]["content"][0]["text"].endswith("You said: 21 degrees in Paris")
    assert weathercaster.asked == ["Paris"]
    assert [message["role"] for message in vendors.seen[-1].json["messages"]] == ["user", "assistant", "tool"]


def test_no_other_server_is_open_beside_it(permitting: httpx.Client, listener: Listener) -> None:
    answer = permitting.post("/v1/responses", headers=ALL_KEYS, json=with_mcp(f"http://127.0.0.1:{listener.port}/mcp"))
    assert listener.calls == []
    assert refused(answer)


@pytest.mark.parametrize("status", [302, 307, 308])
def test_a_redirect_leads_nowhere(permitting: httpx.Client, redirector: Listener, listener: Listener, status: int) -> None:
    place = f"http://127.0.0.1:{listener.port}/mcp"
    redirector.answer = f"HTTP/1.1 {status} Go\r\nLocation: {place}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    redirector.calls.clear()
    answer = permitting.post("/v1/responses", headers=ALL_KEYS, json=with_mcp(f"http://127.0.0.1:{redirector.port}/mcp"))
    assert redirector.calls
    assert listener.calls == []
    assert refused(answer)


# Other callers, size, number and an end in between


def test_another_callers_response_cannot_be_continued(client: httpx.Client, vendors: Vendors) -> None:
    first = client.post("/v1/responses", headers=ALL_KEYS, json=responses(MODELS[0], "my secret", store=True)).json()
    other = {PROVIDER_DATA: json.dumps({"openai_authorization": f"Bearer {KEYS['openai']}-other"})}
    body = responses(MODELS[0], "what was said before?", previous_response_id=first["id"])
    assert client.post("/v1/responses", headers=other, json=body).status_code == 404
    assert client.get(f"/v1/responses/{first['id']}", headers=other).status_code == 403
    assert client.get("/v1/responses", headers=other).json()["data"] == []
    assert vendors.seen_with("what was said before?") == []


def test_a_tools_output_of_5_mb_arrives_whole(client: httpx.Client, vendors: Vendors) -> None:
    output = "y" * 5_000_000
    call = {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": output}
    body = responses(MODELS[0], [call, result], tools=[WEATHER_FUNCTION])
    answer = client.post("/v1/responses", headers=ALL_KEYS, json=body)
    assert output_text(answer).endswith(f"You said: {output}")
    assert vendors.seen[-1].json["messages"][-1]["content"] == output


def test_300_streams_at_once_all_complete(gateway: Gateway) -> None:
    async def stream(client: httpx.AsyncClient, number: int) -> None:
        body = responses(f"{list(KEYS)[number % 3]}/slow", f"stream-{number}", stream=True)
        answer = await client.post("/v1/responses", headers=ALL_KEYS, json=body)
        last = events(answer)[-1]
        assert last["type"] == "response.completed"
        assert last["response"]["output"][0]["content"][0]["text"].endswith(f"You said: stream-{number}")

    async def streams() -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=gateway.url, timeout=300, trust_env=False, limits=limits) as client:
            await asyncio.gather(*(stream(client, number) for number in range(300)))

    asyncio.run(streams())


def test_responses_in_flight_are_finished_after_sigterm(vendors: Vendors, tmp_path: Path) -> None:
    """A regular one and a stream."""
    with (
        Gateway(tmp_path, **vendors.environ()) as gateway,
        caller(gateway.url, timeout=60) as client,
        ThreadPoolExecutor(2) as pool,
    ):
        bodies = [responses("openai/slow", "in flight", stream=stream) for stream in (False, True)]
        calls = [pool.submit(client.post, "/v1/responses", headers=ALL_KEYS, json=body) for body in bodies]
        wait_for(lambda: vendors.streaming == 2, seen=lambda: f"{vendors.streaming} calls at the vendor: {gateway.log}")
        gateway.process.terminate()
        regular, stream = (call.result(60) for call in calls)
        for final in (regular.json(), events(stream)[-1]["response"]):
            assert final["status"] == "completed", final
            assert final["output"][0]["content"][0]["text"].endswith("You said: in flight")
        gateway.process.wait(30)
