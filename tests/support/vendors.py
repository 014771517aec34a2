"""Stand-ins for the three vendors, reached under the vendors' real hostnames.

One TLS server on loopback answers for all three, and a CONNECT proxy leads their hostnames to it. A process started with
`Vendors.environ()` in its environment talks to the stand-ins as it would to the vendors: same names, same paths, same
certificate checks. Any other hostname is refused and remembered in `Vendors.strangers`.

What a stand-in does is chosen by the model's name (see `answer_chat`), so a test or a reader needs no side channel:
`openai/status-429` is a model that is always rate limited.
"""

import asyncio
import base64
import contextlib
import json
import re
import struct
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

HTML_ERROR = "<html><body><h1>502 Bad Gateway</h1></body></html>"

# What vendors report beside an answer (platform.openai.com/docs/api-reference/debugging-requests).
REPORTED = {"x-request-id": "req_fake", "x-ratelimit-remaining-requests": "59"}

# What the models `tool-call` and `tool-calls` ask for, and the JSON text that `structured` answers with.
TOOL_CALL = {"id": "call_fake", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOL_CALLS = [TOOL_CALL, TOOL_CALL | {"id": "call_two", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}]
STRUCTURED = '{"city": "Paris", "degrees": 21}'


def openai_error(status: int, message: str) -> dict:
    """OpenAI's error body (platform.openai.com/docs/guides/error-codes)."""
    kind = {401: "invalid_request_error", 429: "rate_limit_error"}.get(status, "api_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": "invalid_api_key" if status == 401 else None}}


def gemini_error(status: int, message: str) -> list:
    """Google's error body, which its OpenAI-compatible endpoint wraps in a list (ai.google.dev/gemini-api/docs/openai)."""
    names = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}
    return [{"error": {"code": status, "message": message, "status": names.get(status, "INTERNAL")}}]


def anthropic_error(status: int, message: str) -> dict:
    """Anthropic's error body (docs.anthropic.com/en/api/errors)."""
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 529: "overloaded_error"}
    return {"type": "error", "error": {"type": names.get(status, "api_error"), "message": message}, "request_id": "req_fake"}


class Vendor(NamedTuple):
    """What tells one vendor's OpenAI-compatible API from another's."""

    name: str
    title: str
    prefixes: tuple[str, ...]
    error: Callable[[int, str], Any]
    bad_key: tuple[int, str]

    @property
    def key(self) -> str:
        """The key that this stand-in accepts; anything that starts like it will do, so that callers can have their own."""
        return f"sk-fake-{self.name}"


VENDORS = {
    "api.openai.com": Vendor(
        "openai",
        "OpenAI",
        ("/v1",),
        openai_error,
        (401, "Incorrect API key provided. You can find your API key at https://platform.openai.com/account/api-keys."),
    ),
    # Google answers at the doubled path as well.
    "generativelanguage.googleapis.com": Vendor(
        "gemini",
        "Google",
        ("/v1beta/openai", "/v1beta/openai/v1"),
        gemini_error,
        (400, "API key not valid. Please pass a valid API key."),
    ),
    "api.anthropic.com": Vendor("anthropic", "Anthropic", ("/v1",), anthropic_error, (401, "invalid x-api-key")),
}
KEYS = {vendor.name: vendor.key for vendor in VENDORS.values()}

# The keys as clients find them in .env.
KEY_VARIABLES = {f"{name.upper()}_API_KEY": key for name, key in KEYS.items()}


class Seen(NamedTuple):
    """One request as it arrived at a vendor."""

    vendor: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str | None:
        return self.headers.get("authorization")

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def new_id() -> str:
    """An id for an answer. No two are alike, because the server would keep two chats of one id as one."""
    return f"chatcmpl-fake-{uuid.uuid4().hex}"


def text_of(messages: list[dict]) -> str:
    """The text of the last message, whether its content is a string or a list of parts."""
    content = messages[-1].get("content") or ""
    if isinstance(content, list):
        content = " ".join(part.get("text", f"[{part['type']}]") for part in content)
    return content


def usage(prompt: str, reply: str) -> dict:
    """Token counts, a word being a token here."""
    asked, answered = len(prompt.split()), len(reply.split())
    return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}


def vector(text: str, dimensions: int = 8) -> list[float]:
    """A short vector that depends on the text."""
    return [((sum(text.encode()) * (i + 1)) % 97) / 97 for i in range(dimensions)]


def tool_calls(body: dict) -> list[dict]:
    """The tools that an answer to `body` calls: none once their results are there."""
    if body["messages"][-1]["role"] == "tool":
        return []
    return {"tool-call": [TOOL_CALL], "tool-calls": TOOL_CALLS}.get(body["model"], [])


def deltas(model: str, reply: str, calls: list[dict]) -> Iterator[dict]:
    """The pieces in which `reply` is streamed: words, or those of tool calls."""
    for i, call in enumerate(calls):
        function = call["function"]
        yield {"tool_calls": [call | {"index": i, "function": function | {"arguments": ""}}]}
        for piece in function["arguments"].partition(" "):
            yield {"tool_calls": [{"index": i, "function": {"arguments": piece}}]}
    if calls:
        return
    if model.startswith("big-"):
        for start in range(0, len(reply), 10_000):
            yield {"content": reply[start : start + 10_000]}
    else:
        for i, word in enumerate(reply.split(" ")):
            yield {"content": word if i == 0 else f" {word}"}


async def chunks(vendor: Vendor, model: str, prompt: str, body: dict) -> AsyncIterator[bytes]:
    """A streamed answer as server-sent events, or what is left of it when `model` names a fault."""
    reply = answer_text(vendor, model, prompt)
    calls = tool_calls(body)
    done = "tool_calls" if calls else "length" if model == "length" else "stop"
    pause = float(model.removeprefix("every-")) if model.startswith("every-") else 0.3 if model == "slow" else 0
    head = {"id": new_id(), "object": "chat.completion.chunk", "created": 1_700_000_000, "model": model}

    def event(delta: dict, finish: str | None = None, **more: Any) -> bytes:
        chunk = head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]} | more
        return f"data: {json.dumps(chunk)}\n\n".encode()

    yield event({"role": "assistant", "content": ""})
    pieces = list(deltas(model, reply, calls))
    for i, piece in enumerate(pieces):
        if i == 3:
            if model == "hang-up":
                raise ConnectionResetError("the stand-in hangs up")
            if model == "stall":
                await asyncio.Event().wait()
            if model == "no-finish":
                return
            if model == "error-event":
                error = openai_error(500, "The stand-in failed in the middle of its answer.")
                yield f"data: {json.dumps(error)}\n\n".encode()
                return
            if model == "garbage":
                yield b"data: {not JSON\n\n"
        await asyncio.sleep(pause)
        # Gemini ends with a chunk that has both text and finish_reason; the others send an empty one.
        last = done if vendor.name == "gemini" and i == len(pieces) - 1 else None
        yield event(piece, last)
    if vendor.name != "gemini":
        yield event({}, done)
    if (body.get("stream_options") or {}).get("include_usage"):
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(prompt, reply)})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def answer_text(vendor: Vendor, model: str, prompt: str) -> str:
    """What a stand-in replies. It says what it is, and gives the prompt back so that callers can be told apart."""
    if model == "structured":
        return STRUCTURED
    if size := re.fullmatch(r"big-(\d+)", model):
        return "x" * int(size[1]) * 1_000_000
    return f"This is a stand-in for {vendor.title}, not {model} itself. You said: {prompt}"


async def answer_chat(vendor: Vendor, body: dict) -> Response:
    """POST chat/completions. Models that do something else than talk:

    `tool-call` calls a tool and `tool-calls` one twice at once, until the results are there; `structured` answers with JSON,
    `logprobs` with the odds of its first word, `length` with an end that is out of tokens.

    Models that misbehave:

    `status-NNN` answers with that status and the vendor's error body, `html` with a proxy's HTML page, `garbage` with what
    is not JSON, `big-N` with N MB;
    `hang-up` closes the connection, `stall` goes silent, `no-finish` ends a stream early but cleanly and `error-event`
    ends it with an error (each after a few words if streamed); `cut-N` closes the connection after N bytes of its answer;
    `slow` takes 0.3 s a word and `every-N` N seconds.
    """
    model, prompt = body["model"], text_of(body["messages"])
    if status := re.fullmatch(r"status-(\d{3})", model):
        code = int(status[1])
        # Without a hint of when to try again, the server's OpenAI SDK would spend 0.5 s and more on each of its two retries.
        hint = {"retry-after-ms": "20", "retry-after": "7"}
        return JSONResponse(vendor.error(code, f"{vendor.title} says {code}."), code, hint)
    if model == "html":
        return HTMLResponse(HTML_ERROR, 502, {"retry-after-ms": "20"})
    if body.get("stream"):
        stream = chunks(vendor, model, prompt, body)
        if size := re.fullmatch(r"cut-(\d+)", model):
            stream = cut(stream, int(size[1]))
        return StreamingResponse(stream, media_type="text/event-stream")
    if model == "garbage":
        return Response("{not JSON", media_type="application/json")
    if model == "hang-up":
        return StreamingResponse(chunks(vendor, model, prompt, body), media_type="application/json")
    if model == "stall":
        await asyncio.Event().wait()
    reply = answer_text(vendor, model, prompt)
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": reply},
        "finish_reason": "length" if model == "length" else "stop",
    }
    if calls := tool_calls(body):
        choice |= {"message": {"role": "assistant", "content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}
    if model == "logprobs":
        odds = {"token": "This", "logprob": -0.1, "bytes": [84, 104, 105, 115]}
        choice["logprobs"] = {"content": [odds | {"top_logprobs": [odds]}], "refusal": None}
    head = {"id": new_id(), "object": "chat.completion", "created": 1_700_000_000, "model": model}
    answer = JSONResponse(head | {"choices": [choice], "usage": usage(prompt, reply)})
    if size := re.fullmatch(r"cut-(\d+)", model):
        headers = {"content-length": str(len(answer.body)), "content-type": "application/json"}
        return StreamingResponse(cut(once(bytes(answer.body)), int(size[1])), headers=headers)
    return answer


async def once(body: bytes) -> AsyncIterator[bytes]:
    """An answer in one piece."""
    yield body


async def cut(stream: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """The first `size` bytes of an answer, and then the connection is closed."""
    async for piece in stream:
        yield piece[:size]
        size -= len(piece)
        if size <= 0:
            raise ConnectionResetError("the stand-in hangs up")


def answer_embeddings(vendor: Vendor, body: dict) -> Response:
    """POST embeddings. Anthropic has none; Gemini leaves out `usage`, and `index` where it is 0."""
    if vendor.name == "anthropic":
        return JSONResponse(vendor.error(404, "Not found"), 404)
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    data = []
    for i, text in enumerate(texts):
        numbers: Any = vector(str(text), body.get("dimensions") or 8)
        if body.get("encoding_format") == "base64":
            numbers = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        data.append({"object": "embedding", "embedding": numbers, "index": i})
    answer = {"object": "list", "data": data, "model": body["model"]}
    if vendor.name == "gemini":
        del data[0]["index"]
    else:
        answer["usage"] = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return JSONResponse(answer)


class InBackground:
    """A context manager that runs the coroutine `serve` in a thread. It sets `ready`, and ends when `stop` is set."""

    def __enter__(self) -> Self:
        self.ready = threading.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(),), daemon=True)
        self.thread.start()
        if not self.ready.wait(10):
            raise RuntimeError(f"{type(self).__name__} did not start within 10 seconds.")
        return self

    async def run(self) -> None:
        """Serve, in a loop that `stop` and other threads' calls belong to."""
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        await self.serve()

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)


class Vendors(InBackground):
    """The running stand-ins, as a context manager.

    `seen` holds the last requests in order of arrival, `strangers` the other hostnames that were asked for, `streaming` the
    number of answers that are being streamed. Their certificate is for `hosts`, the vendors' own names unless told.
    """

    def __init__(self, hosts: Iterable[str] = VENDORS) -> None:
        self.hosts = hosts
        self.seen: deque[Seen] = deque(maxlen=20_000)
        self.strangers: list[str] = []
        self.streaming = 0

    def environ(self) -> dict[str, str]:
        """The variables that lead a process to the stand-ins, and let it trust them."""
        return {"HTTPS_PROXY": f"http://127.0.0.1:{self.proxy_port}", "SSL_CERT_FILE": str(self.ca_file)}

    def seen_with(self, marker: str) -> list[Seen]:
        """The requests whose body contains `marker`."""
        return [request for request in list(self.seen) if marker.encode() in request.body]

    async def answer(self, request: Request) -> Response:
        """Any request to any vendor: remember it, check its path and key, and answer in the vendor's manner."""
        vendor = VENDORS[request.url.hostname or ""]
        body, path = await request.body(), request.url.path
        self.seen.append(Seen(vendor.name, request.method, path, dict(request.headers), body))
        calls = {
            f"{prefix}{call}": call for prefix in vendor.prefixes for call in ("/models", "/chat/completions", "/embeddings")
        }
        if path not in calls:
            return JSONResponse(vendor.error(404, f"No such path: {path}"), 404)
        if not request.headers.get("authorization", "").startswith(f"Bearer {vendor.key}"):
            status, message = vendor.bad_key
            return JSONResponse(vendor.error(status, message), status)
        if calls[path] == "/models":
            return JSONResponse({"object": "list", "data": [{"id": f"{vendor.name}-other", "object": "model"}]})
        call = json.loads(body)
        if call["model"] == "no-such-model":
            return JSONResponse(vendor.error(404, "The model no-such-model does not exist."), 404)
        try:
            response = answer_embeddings(vendor, call) if calls[path] == "/embeddings" else await answer_chat(vendor, call)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return JSONResponse(vendor.error(400, f"The call makes no sense: {error!r}"), 400)
        response.headers.update(REPORTED)
        if isinstance(response, StreamingResponse):
            response.body_iterator = self.counted(response.body_iterator)
        return response

    async def counted(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """A streamed answer that counts as `streaming` until it ends or its reader leaves."""
        self.streaming += 1
        try:
            async for piece in stream:
                yield piece
        finally:
            self.streaming -= 1

    async def tunnel(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One CONNECT request to the proxy, and everything that follows on its connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            host = head.split()[1].decode().rpartition(":")[0]
            if host in VENDORS:
                there, back = await asyncio.open_connection("127.0.0.1", self.tls_port)
                writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(pump(reader, back), pump(there, writer))
            else:
                self.strangers.append(host)
                writer.write(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
        writer.close()

    async def serve(self) -> None:
        """Run the TLS server and the proxy until `stop` is set."""
        app = Starlette(routes=[Route("/{path:path}", self.answer, methods=["GET", "POST"])])
        settings = {"lifespan": "off", "log_level": "critical", "backlog": 4096}
        server = uvicorn.Server(uvicorn.Config(app, port=0, ssl_certfile=self.certificate_file, **settings))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.tls_port = server.servers[0].sockets[0].getsockname()[1]
        proxy = await asyncio.start_server(self.tunnel, "127.0.0.1", backlog=4096)
        self.proxy_port = proxy.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        proxy.close()
        server.should_exit = server.force_exit = True
        await serving

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory()
        authority = trustme.CA()
        self.ca_file = Path(self.folder.name, "stand-in-ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self.certificate_file = Path(self.folder.name, "stand-in.pem")
        authority.issue_cert(*self.hosts).private_key_and_cert_chain_pem.write_to_path(self.certificate_file)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.folder.cleanup()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the source ends, then end the destination too."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
