"""The vendor that every contender talks to, on loopback and over TLS, made so that it is never what limits them.

nginx ends TLS and answers regular calls itself: a fixed completion, or a 401 where the key is not `GOOD_KEY`. Streams, which
nginx cannot pace, it passes to an asyncio server. The prompt says how one is to go: "40 chunks, 50 ms apart". Each chunk
carries the moment it was sent, so that a reader on the same machine knows how long it travelled.

Base URLs: `near` for regular calls, `paced` for streams, and `far` for both, through a relay that keeps the vendor a 40 ms
round trip away and counts new connections. `plain` has near and paced without TLS, for callers without a gateway.

The egress door looks for vendors by name, all at one port: `names` is a name server that leads it there, to OpenAI as the
near vendor, Anthropic as the paced and Gemini as the far one, which has an address of its own for that.
"""

import asyncio
import contextlib
import functools
import json
import multiprocessing
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import certifi
import trustme
from dnslib.server import BaseResolver, DNSLogger, DNSServer
from dnslib.zoneresolver import ZoneResolver
from support.gateway import free_port

GOOD_KEY = "sk-fake-good"
WRONG_KEY = "sk-fake-wrong"
ROUND_TRIP = 0.040  # seconds
FAR_ADDRESS = "127.0.0.2"
ADDRESSES = {
    "api.openai.com": "127.0.0.1",
    "api.anthropic.com": "127.0.0.1",
    "generativelanguage.googleapis.com": FAR_ADDRESS,
}
QUIET = DNSLogger("-request,-reply,-truncated,-error")

ANSWER = json.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "gpt-4o",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "All work and no play. " * 40}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 200, "completion_tokens": 200, "total_tokens": 400},
    }
)
REFUSAL = json.dumps(
    {"error": {"message": "Incorrect API key provided.", "type": "invalid_request_error", "code": "invalid_api_key"}}
)
NO_MODELS = json.dumps({"object": "list", "data": []})

# One worker is enough: a core of nginx answers tens of thousands of calls a second. keepalive_requests is raised so that
# contenders that pool connections are not made to open new ones.
NGINX = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log error;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  default_type application/json;
  keepalive_requests 10000000;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  map $http_authorization $refused {{ default 1; "Bearer {key}" 0; }}
  ssl_certificate {folder}/server.pem;
  ssl_certificate_key {folder}/server.key;
  proxy_http_version 1.1;
  proxy_set_header Connection "";
  proxy_buffering off;
  upstream vendor {{ server 127.0.0.1:{vendor}; keepalive 1024; keepalive_requests 10000000; }}
  server {{
    {listen}
    location / {{ return 200 '{models}'; }}
    location ~ ^/(near/)?v1/chat/completions$ {{
      if ($refused) {{ return 401 '{refusal}'; }}
      return 200 '{answer}';
    }}
    location = /paced/v1/chat/completions {{ proxy_pass http://vendor; }}
  }}
  server {{
    {listen}
    server_name api.anthropic.com;
    location / {{ proxy_pass http://vendor; }}
  }}
  server {{
    {listen_far}
    location / {{ proxy_pass http://vendor; }}
  }}
}}
"""


class Vendor(asyncio.Protocol):
    """One connection to the asyncio server. Speaks just the HTTP/1.1 that clients of a completions API send."""

    shape = re.compile(rb"(\d+) chunks, (\d+) ms apart")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n"

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport, self.received, self.task = transport, b"", None
        self.writable = asyncio.Event()
        self.writable.set()

    def pause_writing(self) -> None:
        self.writable.clear()

    def resume_writing(self) -> None:
        self.writable.set()

    def connection_lost(self, _: Exception | None) -> None:
        if self.task:
            self.task.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, body = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if len(body) < int(length[1] if length else 0):
            return
        self.received = b""
        if re.search(rb'"stream": ?true', body):
            chunks, gap = map(int, self.shape.search(body).groups())  # type: ignore[union-attr]
            self.task = asyncio.get_running_loop().create_task(self.stream(chunks, gap / 1000))
        else:
            self.transport.write(self.head % (b"application/json", b"Content-Length: %d" % len(ANSWER)) + ANSWER.encode())

    async def stream(self, chunks: int, gap: float) -> None:
        """Send `chunks` chunks, `gap` seconds apart or, where that is 0, as fast as the reader takes them."""
        loop = asyncio.get_running_loop()
        self.transport.write(self.head % (b"text/event-stream", b"Transfer-Encoding: chunked"))
        self.send({"role": "assistant", "content": ""})
        # From the second chunk on streams are out of step with each other, as the world's are: nobody has to take them in bursts.
        start = loop.time() - gap * random.random()
        for number in range(chunks):
            if gap:
                await asyncio.sleep(start + number * gap - loop.time())
            else:
                await self.writable.wait()
                await asyncio.sleep(0)
            self.send({"content": f"@{time.monotonic():.6f} "})
        self.send({}, "stop")
        self.event(b"[DONE]")
        self.transport.write(b"0\r\n\r\n")

    def send(self, delta: dict, finish_reason: str | None = None) -> None:
        """Send one completion chunk, as OpenAI words it."""
        chunk = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "gpt-4o"}
        self.event(json.dumps(chunk | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}).encode())

    def event(self, data: bytes) -> None:
        """Send one server-sent event in an HTTP chunk of its own."""
        event = b"data: " + data + b"\n\n"
        self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))


class Relay(asyncio.Protocol):
    """One direction of a relayed connection: what arrives leaves half a round trip later.

    A real connection also takes a round trip to open, before the caller may send. On loopback it opens at once, so the first
    bytes from the caller are held for a whole round trip more.
    """

    def __init__(self, target: int, opened: Any) -> None:
        self.target, self.opened, self.peer, self.early = target, opened, None, []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.not_before = 0.0
        if self.peer is None:
            self.opened.value += 1
            self.not_before = self.loop.time() + 1.5 * ROUND_TRIP
            self.task = self.loop.create_task(self.connect())

    async def connect(self) -> None:
        """Open the vendor's side."""
        other = Relay(self.target, self.opened)
        other.peer = self
        try:
            await self.loop.create_connection(lambda: other, "127.0.0.1", self.target)
        except OSError:  # The vendor is about to end.
            self.transport.abort()
            return
        self.peer = other
        for data in self.early:
            self.pass_on(data)

    def data_received(self, data: bytes) -> None:
        if self.peer is None:
            self.early.append(data)
        else:
            self.pass_on(data)

    def pass_on(self, data: bytes) -> None:
        """Hand `data` to the other side when its time has come."""
        self.loop.call_at(self.due(), self.peer.transport.write, data)

    def due(self) -> float:
        """When what happens now reaches the other side. Never the same moment twice: equal timers may fire in any order."""
        self.not_before = max(self.not_before + 1e-6, self.loop.time() + ROUND_TRIP / 2)
        return self.not_before

    def connection_lost(self, _: Exception | None) -> None:
        if self.peer:
            self.loop.call_at(self.due(), self.peer.transport.close)


def serve(addresses: list[tuple[str, int]], protocol: Callable[[], asyncio.Protocol]) -> None:
    """Serve on loopback until killed, in both address families where `localhost` has two."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    async def forever() -> None:
        loop = asyncio.get_running_loop()
        servers = [await loop.create_server(protocol, host, port, backlog=1024) for host, port in addresses]
        await asyncio.gather(*(server.serve_forever() for server in servers))

    with contextlib.suppress(OSError):  # Its port was taken meanwhile: whoever waits for it says so.
        asyncio.run(forever())


def listens(port: int) -> bool:
    """Whether something accepts connections on loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(port: int, ready: Callable[[], bool], running: Callable[[], bool], seconds: float = 20) -> None:
    """Return as soon as `ready`. Raises RuntimeError if what is to serve on `port` is no longer running, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and running():
        if ready():
            return
        time.sleep(0.05)
    raise RuntimeError(f"The bench's own vendor did not start on port {port}. Is the port in use? Run it again.")


class Resolver(BaseResolver):
    """Knows the vendors' IPv4 addresses. Asked for others of theirs, it says that there are none, not that there is no vendor."""

    def __init__(self) -> None:
        self.zone = ZoneResolver("\n".join(f"{name}. 1 IN A {address}" for name, address in ADDRESSES.items()))

    def resolve(self, request: Any, handler: Any) -> Any:
        reply = self.zone.resolve(request, handler)
        if str(request.q.qname).rstrip(".") in ADDRESSES:
            reply.header.rcode = 0
        return reply


class Upstream:
    """All of it, as a context manager. `near`, `paced` and `far` are base URLs; the CA comes in the three forms programs want.

    `ca` is the throwaway CA alone, `bundle` a file of public CAs with it added (what a program that loads a bundle has to
    read), `hashed` a directory of CA files named by hash. `vendor_port` is where all vendors are, as a name server on port
    `names` has it. Entering raises RuntimeError, with a sentence, if a port was taken meanwhile.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder, self.vendor_port = folder, port or free_port()
        self.opened = multiprocessing.get_context("fork").Value("L", 0, lock=False)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.start(stack)
            self.stack = stack.pop_all()
        return self

    def start(self, stack: contextlib.ExitStack) -> None:
        """Start everything, and have `stack` end it."""
        self.certify()
        front, (http, back, vendor, relay) = self.vendor_port, (free_port() for _ in range(4))
        self.near, self.paced = f"https://localhost:{front}/near", f"https://localhost:{front}/paced"
        self.far, self.plain = f"https://localhost:{relay}", f"http://127.0.0.1:{http}"
        addresses = {address[4][0] for address in socket.getaddrinfo("localhost", front, type=socket.SOCK_STREAM)}
        listen = "".join(f"listen {f'[{a}]' if ':' in a else a}:{front} ssl; " for a in addresses)
        listen += f"listen 127.0.0.1:{http};"
        settings = {"listen": listen, "listen_far": f"listen 127.0.0.1:{back} ssl;", "vendor": vendor, "key": GOOD_KEY}
        config = self.folder / "nginx.conf"
        config.write_text(NGINX.format(folder=self.folder, models=NO_MODELS, refusal=REFUSAL, answer=ANSWER, **settings))
        said = stack.enter_context((self.folder / "nginx.txt").open("w"))
        nginx = subprocess.Popen(["nginx", "-p", self.folder, "-c", config], stderr=said, start_new_session=True)
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        # It writes its number once it listens on all its ports.
        wait_for(front, (self.folder / "nginx.pid").exists, lambda: nginx.poll() is None)
        fork = multiprocessing.get_context("fork")
        for where, protocol in (
            ([("localhost", vendor)], Vendor),
            ([("localhost", relay), (FAR_ADDRESS, front)], lambda: Relay(back, self.opened)),
        ):
            child = fork.Process(target=serve, args=(where, protocol), daemon=True)
            child.start()
            stack.callback(child.join)
            stack.callback(child.terminate)
            port = where[0][1]
            wait_for(port, functools.partial(listens, port), child.is_alive)
        names = DNSServer(Resolver(), address="127.0.0.1", port=0, logger=QUIET)
        self.names = names.server.server_address[1]
        names.start_thread()
        stack.callback(names.server.server_close)
        stack.callback(names.stop)

    def certify(self) -> None:
        """Make the throwaway CA and one certificate for `localhost` and the vendors' names."""
        ca = trustme.CA()
        certificate = ca.issue_cert("localhost", *ADDRESSES)
        certificate.private_key_pem.write_to_path(self.folder / "server.key")
        for blob in certificate.cert_chain_pems:
            blob.write_to_path(self.folder / "server.pem", append=True)
        self.ca, self.bundle, self.hashed = self.folder / "ca.pem", self.folder / "bundle.pem", self.folder / "hashed"
        ca.cert_pem.write_to_path(self.ca)
        self.bundle.write_text(certifi.contents() + self.ca.read_text())
        name = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", self.ca], check=True, capture_output=True, text=True)
        self.hashed.mkdir()
        shutil.copy(self.ca, self.hashed / f"{name.stdout.strip()}.0")

    def __exit__(self, *_: object) -> None:
        self.stack.close()
