"""Stand-ins for the three vendors, reached under the vendors' real hostnames.

One TLS server on loopback answers for all three, and a CONNECT proxy leads their hostnames to it. A process started with
`Vendors.environ()` in its environment talks to the stand-ins as it would to the vendors: same names, same paths, same
certificate checks. Any other hostname is refused and remembered in `Vendors.strangers`.

What a stand-in does is chosen by the model's name (see `answer_chat`), so a test or a reader needs no side channel:
`openai/status-429` is a model that is always rate limited. Each vendor has its own shape, in a module of its own.
"""

import asyncio
import base64
import contextlib
import json
import re
import struct
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple, Self

import trustme
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .answer import REFUSAL, STRUCTURED, TOOL_CALL, TOOL_CALLS, Answer, Refused, answer, text_of
from .anthropic import BESIDE, Anthropic
from .background import InBackground, pump
from .gemini import MALFORMED, SIGNATURE, Gemini
from .openai import REPORTED, OpenAI
from .vendor import Vendor

__all__ = [
    "BESIDE",
    "KEYS",
    "KEY_VARIABLES",
    "MALFORMED",
    "REFUSAL",
    "REPORTED",
    "SIGNATURE",
    "STRUCTURED",
    "TOOL_CALL",
    "TOOL_CALLS",
    "VENDORS",
    "Answer",
    "InBackground",
    "Scripted",
    "Seen",
    "Vendor",
    "Vendors",
    "pump",
    "text_of",
    "vector",
]

HTML_ERROR = "<html><body><h1>502 Bad Gateway</h1></body></html>"

# Without a hint of when to try again, the server's OpenAI SDK would spend 0.5 s and more on each of its two retries.
HINT = {"retry-after-ms": "20"}

VENDORS: dict[str, Vendor] = {
    "api.openai.com": OpenAI(),
    "generativelanguage.googleapis.com": Gemini(),
    "api.anthropic.com": Anthropic(),
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


class Scripted(NamedTuple):
    """An answer byte for byte, sent piece by piece."""

    status: int
    headers: dict[str, str]
    pieces: list[bytes]

    def response(self) -> Response:
        """The answer to send."""
        return StreamingResponse(each(self.pieces), self.status, HINT | self.headers)


def vector(text: str, dimensions: int = 8) -> list[float]:
    """A short vector that depends on the text."""
    return [((sum(text.encode()) * (i + 1)) % 97) / 97 for i in range(dimensions)]


async def chunks(vendor: Vendor, said: Answer, with_usage: bool) -> AsyncIterator[bytes]:
    """A streamed answer as server-sent events, or what is left of it when the model names a fault."""
    model = said.model
    pause = float(model.removeprefix("every-")) if model.startswith("every-") else 0.3 if model == "slow" else 0
    for i, chunk in enumerate(vendor.chunks(said, with_usage)):
        if i == 4:
            match model:
                case "hang-up":
                    raise ConnectionResetError("the stand-in hangs up")
                case "stall":
                    await asyncio.Event().wait()
                case "no-finish":
                    return
                case "error-event":
                    yield event(vendor.error(500, "The stand-in failed in the middle of its answer."))
                    return
                case "garbage":
                    yield b"data: {not JSON\n\n"
        await asyncio.sleep(pause if i else 0)
        yield event(chunk)
    yield b"data: [DONE]\n\n"


def event(data: Any) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


async def answer_chat(vendor: Vendor, body: dict) -> Response:
    """POST chat/completions. Models that do something else than talk:

    `tool-call` calls a tool and `tool-calls` one twice at once, until the results are there; `structured` answers with JSON,
    `logprobs` with the odds of its first word and `no-top-logprobs` with those alone; `length` ends out of tokens,
    `content-filter` at a filter; `refusal` refuses. `gemini/gemini-3` signs what it thought and wants that back,
    `gemini/malformed` has made a call that is none, `gemini/no-id` streams chunks without ids, `openai/o3` takes no
    `parallel_tool_calls`.

    Models that misbehave:

    `status-NNN` answers with that status and the vendor's error body, `html` with a proxy's HTML page, `garbage` with what
    is not JSON, `big-N` with N MB, `error-200` with an error and a status that says all is well;
    `hang-up` closes the connection, `stall` goes silent, `no-finish` ends a stream early but cleanly and `error-event`
    ends it with an error (each after a few words if streamed); `cut-N` closes the connection after N bytes of its answer;
    `slow` takes 0.3 s a word and `every-N` N seconds.
    """
    model, said = body["model"], answer(vendor.title, body)
    if status := re.fullmatch(r"status-(\d{3})", model):
        code = int(status[1])
        return JSONResponse(vendor.error(code, f"{vendor.title} says {code}."), code, HINT | {"retry-after": "7"})
    if model == "error-200":
        return JSONResponse(vendor.error(500, f"{vendor.title} failed, and says 200."))
    if model == "html":
        return HTMLResponse(HTML_ERROR, 502, HINT)
    vendor.check(body)
    stream = chunks(vendor, said, bool((body.get("stream_options") or {}).get("include_usage")))
    size = re.fullmatch(r"cut-(\d+)", model)
    if body.get("stream"):
        return StreamingResponse(cut(stream, int(size[1])) if size else stream, media_type="text/event-stream")
    if model == "garbage":
        return Response("{not JSON", media_type="application/json")
    if model == "hang-up":
        return StreamingResponse(stream, media_type="application/json")
    if model == "stall":
        await asyncio.Event().wait()
    whole = JSONResponse(vendor.chat(said))
    if size:
        headers = {"content-length": str(len(whole.body)), "content-type": "application/json"}
        return StreamingResponse(cut(each([bytes(whole.body)]), int(size[1])), headers=headers)
    return whole


async def each(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """An answer, piece by piece."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


async def cut(stream: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """The first `size` bytes of an answer, and then the connection is closed."""
    async for piece in stream:
        yield piece[:size]
        size -= len(piece)
        if size <= 0:
            raise ConnectionResetError("the stand-in hangs up")


def answer_embeddings(vendor: Vendor, body: dict) -> Response:
    """POST embeddings. Anthropic has none."""
    if vendor.name == "anthropic":
        raise Refused(404, vendor.error(404, "Not found"))
    data = []
    for i, text in enumerate(body["input"] if isinstance(body["input"], list) else [body["input"]]):
        numbers: Any = vector(str(text), body.get("dimensions") or 8)
        if body.get("encoding_format") == "base64":
            numbers = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        data.append({"object": "embedding", "embedding": numbers, "index": i})
    return JSONResponse(vendor.embeddings(body["model"], data))


class Vendors(InBackground):
    """The running stand-ins, as a context manager.

    `seen` holds the last requests in order of arrival, `strangers` the other hostnames that were asked for, `streaming` the
    number of answers that are being streamed. `scripted` has, by a model's name, what is answered to every call of it.
    Their certificate is for `hosts`, the vendors' own names unless told.
    """

    def __init__(self, hosts: Iterable[str] = VENDORS) -> None:
        self.hosts = hosts
        self.seen: deque[Seen] = deque(maxlen=20_000)
        self.strangers: list[str] = []
        self.streaming = 0
        self.scripted: dict[str, Scripted] = {}

    def environ(self) -> dict[str, str]:
        """The variables that lead a process to the stand-ins, and let it trust them."""
        return {"HTTPS_PROXY": f"http://127.0.0.1:{self.proxy_port}", "SSL_CERT_FILE": str(self.ca_file)}

    def seen_with(self, marker: str) -> list[Seen]:
        """The requests whose body contains `marker`."""
        return [request for request in list(self.seen) if marker.encode() in request.body]

    async def answer(self, request: Request) -> Response:
        """Any request to any vendor: remember it, and answer in the vendor's manner."""
        vendor = VENDORS[request.url.hostname or ""]
        body, path = await request.body(), request.url.path
        self.seen.append(Seen(vendor.name, request.method, path, dict(request.headers), body))
        try:
            response = await self.answer_call(vendor, path, request.headers.get("authorization", ""), body)
        except Refused as refused:
            response = JSONResponse(refused.body, refused.status)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            response = JSONResponse(vendor.error(400, f"The call makes no sense: {error!r}"), 400)
        response.headers.update(vendor.headers())
        if isinstance(response, StreamingResponse):
            response.body_iterator = self.counted(response.body_iterator)
        return response

    async def answer_call(self, vendor: Vendor, path: str, key: str, body: bytes) -> Response:
        """The answer to a call. Raises `Refused` where the path, the key or the model is wrong."""
        calls = {
            f"{prefix}{call}": call for prefix in vendor.prefixes for call in ("/models", "/chat/completions", "/embeddings")
        }
        if path not in calls:
            raise Refused(404, vendor.error(404, f"No such path: {path}"))
        if not key.startswith(f"Bearer {vendor.key}"):
            status, message = vendor.bad_key
            raise Refused(status, vendor.error(status, message))
        if calls[path] == "/models":
            return JSONResponse({"object": "list", "data": [{"id": f"{vendor.name}-other", "object": "model"}]})
        call = json.loads(body)
        if call["model"] == "no-such-model":
            raise Refused(404, vendor.error(404, vendor.no_such_model(call["model"])))
        if scripted := self.scripted.get(call["model"]):
            return scripted.response()
        return answer_embeddings(vendor, call) if calls[path] == "/embeddings" else await answer_chat(vendor, call)

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
