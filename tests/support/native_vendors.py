"""Stand-ins for the vendors' own APIs, where a test must see each byte that arrives. They speak TLS under the vendors' names.

Vendors' answers are in the shapes of their documents: platform.openai.com/docs/api-reference/responses,
docs.anthropic.com/en/api/messages, ai.google.dev/api/generate-content.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import ssl
import tempfile
from pathlib import Path
from typing import NamedTuple, Self

import httpx
import trustme

from .vendors import InBackground

HOSTS = {"openai": "api.openai.com", "gemini": "generativelanguage.googleapis.com", "anthropic": "api.anthropic.com"}
NAMES = {host: name for name, host in HOSTS.items()}

# What a vendor must not do to the one origin that serves the page and all vendors' content.
INTRUSIVE = {
    "Set-Cookie": "session=of-the-vendor",
    "Access-Control-Allow-Origin": "*",
    "Alt-Svc": 'h3=":443"',
    "Strict-Transport-Security": "max-age=31536000",
    "Clear-Site-Data": '"*"',
    "Service-Worker-Allowed": "/",
    "Refresh": "0; url=https://elsewhere.example",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy-Report-Only": "default-src 'none'; report-uri https://elsewhere.example",
    "Content-Security-Policy": "script-src *",
}


class Arrived(NamedTuple):
    """One request as it arrived: the name that TLS asked for, and the bytes of the head and of the body, chunks put together."""

    name: str | None
    head: bytes
    body: bytes

    @property
    def vendor(self) -> str:
        """The vendor that TLS asked for. Raises KeyError if it is none."""
        return NAMES[self.name or ""]

    @property
    def target(self) -> str:
        """What follows the method."""
        return self.head.split(b" ", 2)[1].decode()

    @property
    def headers(self) -> httpx.Headers:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return httpx.Headers([tuple(line.split(": ", 1)) if ": " in line else (line.rstrip(":"), "") for line in lines if line])

    @property
    def keys(self) -> dict[str, str]:
        """The headers in which a key may come."""
        names = ("authorization", "x-api-key", "x-goog-api-key", "x-llamastack-provider-data", "cookie")
        return {name: self.headers[name] for name in names if name in self.headers}


def event(data: dict, name: str = "") -> bytes:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "").encode() + f"data: {json.dumps(data)}\n\n".encode()


def messages(streamed: bool) -> list[bytes]:
    """Anthropic's Messages."""
    usage = {"input_tokens": 1, "output_tokens": 2}
    whole = {"id": "msg_fake", "type": "message", "role": "assistant", "model": "claude", "stop_sequence": None, "usage": usage}
    if not streamed:
        text = [{"type": "text", "text": "Hello from Anthropic"}]
        return [json.dumps(whole | {"stop_reason": "end_turn", "content": text}).encode()]
    words = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
        for word in ("Hello", " from", " Anthropic")
    ]
    steps = [
        {"type": "message_start", "message": whole | {"stop_reason": None, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *words,
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]
    return [event(step, step["type"]) for step in steps]


def generated(streamed: bool) -> list[bytes]:
    """Google's generateContent."""
    texts = ("Hello", " from Google") if streamed else ("Hello from Google",)
    answers = [{"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, "index": 0}]} for text in texts]
    return [event(answer) if streamed else json.dumps(answer).encode() for answer in answers]


def response(streamed: bool) -> list[bytes]:
    """OpenAI's Responses, with encrypted reasoning."""
    text = {"type": "output_text", "text": "Hello from OpenAI", "annotations": []}
    output = [
        {"type": "reasoning", "id": "rs_fake", "summary": [], "encrypted_content": "sealed"},
        {"type": "message", "id": "msg_fake", "role": "assistant", "status": "completed", "content": [text]},
    ]
    whole = {"id": "resp_fake", "object": "response", "created_at": 1, "model": "gpt", "status": "completed", "output": output}
    whole |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    if not streamed:
        return [json.dumps(whole).encode()]
    delta = {"type": "response.output_text.delta", "item_id": "msg_fake", "output_index": 1, "content_index": 0}
    steps = [
        {"type": "response.created", "response": whole | {"status": "in_progress", "output": []}},
        *(delta | {"delta": word, "logprobs": []} for word in ("Hello", " from", " OpenAI")),
        {"type": "response.completed", "response": whole},
    ]
    return [event(step | {"sequence_number": i}, step["type"]) for i, step in enumerate(steps)]


def chat(vendor: str) -> list[bytes]:
    """A chat completion, as all three have it."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Hello from {vendor}"}}
    return [json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}).encode()]


class NativeVendors(InBackground):
    """The stand-ins, as a context manager. `arrived` holds the requests in order of arrival, `opened` counts connections.

    A path that ends in `/status/NNN` is answered with that status, `/redirect` leads elsewhere, `/intrusive` has INTRUSIVE in its
    answer, `/echo` gives the body back, `/silent` no answer and `/cut` one without an end; a web socket is echoed byte by byte.
    """

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.opened = self.waiting = 0

    def settings(self, nameserver: int) -> dict[str, str]:
        """What leads HAProxy to the stand-ins instead of the vendors."""
        return {
            "EGRESS_CA": str(self.ca_file),
            "EGRESS_NAMESERVER": f"127.0.0.1:{nameserver}",
            "EGRESS_VENDOR_PORT": str(self.port),
        }

    @property
    def last(self) -> Arrived:
        """The latest request."""
        return self.arrived[-1]

    async def body(self, reader: asyncio.StreamReader, headers: httpx.Headers) -> bytes:
        """The body that follows a head."""
        if headers.get("transfer-encoding") != "chunked":
            return await reader.readexactly(int(headers.get("content-length", 0)))
        body = bytearray()
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += (await reader.readexactly(size + 2))[:-2]
        while (await reader.readline()).strip():
            pass
        return bytes(body)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the proxy, with calls one after the other."""
        self.opened += 1
        name = writer.get_extra_info("ssl_object").context_name
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                headers = Arrived(name, head, b"").headers
                call = Arrived(name, head, await self.body(reader, headers))
                self.arrived.append(call)
                if headers.get("upgrade") == "websocket":
                    await self.web_socket(reader, writer, headers)
                    break
                if call.target.endswith("/silent"):
                    self.waiting += 1
                    await reader.read()
                    self.waiting -= 1
                    break
                await self.answer(writer, call)
        writer.close()

    async def web_socket(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: httpx.Headers) -> None:
        """Accept it (RFC 6455, section 4.2.2), and give back whatever comes."""
        key = f"{headers['sec-websocket-key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        answer = (
            f"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}"
        )
        writer.write(f"{answer}\r\n\r\n".encode())
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()

    async def answer(self, writer: asyncio.StreamWriter, call: Arrived) -> None:
        """Answer in the vendor's manner, in chunks."""
        status, more = 200, {"x-request-id": "req_fake", "retry-after": "7"}
        path = call.target.partition("?")[0]
        streamed = b'"stream":true' in call.body.replace(b" ", b"") or ":streamGenerate" in path
        pieces = [json.dumps({"vendor": call.vendor}).encode()]
        if "/status/" in path:
            status = int(path.rstrip("/").rpartition("/")[2])
            pieces = [json.dumps({"error": {"message": f"The vendor says {status}.", "type": "x", "code": status}}).encode()]
        elif path.endswith("/redirect"):
            status, more = 302, more | {"location": "https://elsewhere.example/file"}
        elif path.endswith("/intrusive"):
            more |= INTRUSIVE
        elif path.endswith("/echo"):
            pieces = [call.body]
        elif path.endswith("/upload/v1beta/files"):
            more |= {
                "x-goog-upload-url": f"https://{HOSTS['gemini']}/upload/v1beta/files?upload_id=1",
                "x-goog-upload-status": "active",
            }
        elif path.endswith("/messages"):
            pieces = messages(streamed)
        elif ":generateContent" in path or ":streamGenerateContent" in path:
            pieces = generated(streamed)
        elif path.endswith("/responses"):
            pieces = response(streamed)
        elif path.endswith("/chat/completions"):
            pieces = chat(call.vendor)
        more |= {"content-type": "text/event-stream" if streamed else "application/json", "transfer-encoding": "chunked"}
        head = "".join(f"{name}: {value}\r\n" for name, value in more.items())
        writer.write(f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode())
        for piece in filter(None, pieces):
            writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await writer.drain()
        if path.endswith("/cut"):
            raise ConnectionResetError("the stand-in hangs up")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def serve(self) -> None:
        """Listen until `stop` is set."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate_file)

        def named(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
            connection.context_name = name

        context.sni_callback = named
        server = await asyncio.start_server(self.connected, "127.0.0.1", ssl=context, backlog=4096, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.stop.wait()
        server.close()

    def __enter__(self) -> Self:
        self.folder = tempfile.TemporaryDirectory()
        authority = trustme.CA()
        self.ca_file, self.certificate_file = Path(self.folder.name, "ca.pem"), Path(self.folder.name, "stand-in.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        authority.issue_cert(*HOSTS.values()).private_key_and_cert_chain_pem.write_to_path(self.certificate_file)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.folder.cleanup()
