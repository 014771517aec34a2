"""The front with stand-ins on all its sides: a caller before it, a gateway and the vendors' own APIs behind it."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from .calls import message
from .gateway import wait_for
from .haproxy import BOTH, HAProxy, Recorder
from .native_vendors import NativeVendors
from .network import NameServer

# A path that a key list, provider data or a bare key is tried on, for each vendor.
NATIVE = {
    "openai": "/openai/v1/responses",
    "anthropic": "/anthropic/v1/messages",
    "gemini": "/gemini/v1beta/models/gemini-2.5-flash-lite:generateContent",
}


class Front(NamedTuple):
    """The front and all that is around it."""

    haproxy: HAProxy
    gateway: Recorder
    vendors: NativeVendors
    client: httpx.Client

    def call(self, path: str = "/v1/chat/completions", headers: Any = None, method: str = "POST", **more: Any) -> httpx.Response:
        """One call, with a body if it is a POST. `headers` may be a list, for a header that comes twice."""
        body = {"json": {}} if method == "POST" and "content" not in more else {}
        return self.client.request(method, path, headers=headers, **body | more)

    def seen(self) -> int:
        """How many calls have arrived behind the front."""
        return len(self.gateway.heads) + len(self.vendors.arrived)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Nothing arrives behind the front meanwhile."""
        before = self.seen()
        yield
        arrived = [*self.gateway.heads[-1:], *self.vendors.arrived[-1:]]
        assert self.seen() == before, f"Something arrived. The latest: {arrived}"

    def refused(self, status: int, *call: Any, **more: Any) -> str:
        """What a call is told that is answered with this status, and of which nothing arrives behind the front."""
        with self.untouched():
            response = self.call(*call, **more)
        assert response.status_code == status, response.text
        return message(response)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[socket.socket]:
        """A call that the gateway has and does not answer, because it is one that stalls."""
        with self.haproxy.connect() as connection:
            connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            wait_for(lambda: self.gateway.alive == 1, seen=lambda: self.haproxy.log)
            yield connection

    def raw(self, head: str, body: bytes = b"") -> tuple[int, bytes]:
        """The status and the rest of the answer to a request of these lines."""
        request = "\r\n".join([*head.strip().splitlines(), "Connection: close", "", ""])
        answer = self.haproxy.raw(request.encode("latin-1") + body)
        return int(answer.split(b" ", 2)[1]) if answer else 0, answer


@contextlib.contextmanager
def front(folder: Path, files: tuple[str, ...] = BOTH, gateway: Recorder | None = None, **settings: str) -> Iterator[Front]:
    """A front that is up, in front of a recorder and the stand-ins of the vendors' own APIs."""
    with gateway or Recorder() as recorder, NativeVendors() as vendors, NameServer() as names:
        settings = vendors.settings(names.port) | {"GATEWAY_A": recorder.address} | settings
        with (
            HAProxy(folder, files, **settings) as haproxy,
            httpx.Client(base_url=haproxy.url, trust_env=False, timeout=60) as client,
        ):
            if settings.get("EGRESS") != "0":
                resolved = [f"vendor-{name},address1," for name in NATIVE]
                wait_for(lambda: all(up(haproxy, name) for name in resolved), seen=lambda: haproxy.admin("show stat"))
            yield Front(haproxy, recorder, vendors, client)


def up(haproxy: HAProxy, server: str) -> bool:
    """Whether HAProxy can use this server."""
    return any(line.startswith(server) and ",MAINT" not in line for line in haproxy.admin("show stat").splitlines())
