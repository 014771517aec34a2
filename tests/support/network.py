"""What lies between the egress door and the vendors: a name server and a wire, both on loopback, that tests can change."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Self

from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

from .vendors import InBackground, pump


class NameServer(BaseResolver):
    """A DNS server that gives the IPv4 address `address` for every name. A context manager; change `address` at will.

    Where `address` is None, no name exists. `more` are further addresses of every name.
    """

    def __init__(self, address: str | None = "127.0.0.1", *more: str) -> None:
        self.address, self.more = address, more

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        """The answer to one query: no record unless an A record is asked for."""
        reply = request.reply()
        if self.address is None:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            for address in (self.address, *self.more):
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=1))
        return reply

    def __enter__(self) -> Self:
        self.server = DNSServer(self, "127.0.0.1", 0, logger=DNSLogger(logf=lambda _: None))
        self.port = self.server.server.server_address[1]
        self.server.start_thread()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.server.server.server_close()


class Wire(InBackground):
    """A TCP relay from `address` to `target`, a port on 127.0.0.1. A context manager.

    `opened` counts the connections that were ever opened, `alive` those that are open. `fault` is what happens once, to the
    connection on which the next call comes: with "closed" the vendor has just closed it and sees nothing of the call; with
    "no answer" the vendor sees the call, and the connection breaks before the answer comes back.
    """

    def __init__(self, target: int, address: str = "127.0.0.1", port: int = 0) -> None:
        self.target, self.address, self.port = target, address, port
        self.opened = 0
        self.fault: str | None = None
        self.writers: set[asyncio.StreamWriter] = set()

    @property
    def alive(self) -> int:
        """How many connections are open now."""
        return len(self.writers)

    def down(self) -> None:
        """Close every connection and refuse new ones, as a vendor that stops does."""
        self.wait_for(self._down())

    def up(self) -> None:
        """Accept connections again, on the same port."""
        self.wait_for(self._up())

    async def _down(self) -> None:
        self.server.close()
        for writer in list(self.writers):
            writer.close()

    async def _up(self) -> None:
        self.server = await asyncio.start_server(self.relay, self.address, self.port, backlog=1024)
        self.port = self.server.sockets[0].getsockname()[1]

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection from the proxy to the vendor."""
        self.opened += 1
        self.writers.add(writer)
        with contextlib.suppress(ConnectionError):
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            with contextlib.closing(back):  # Also where the proxy resets the connection.
                answers = asyncio.create_task(pump(there, writer))
                while data := await reader.read(65536):
                    fault, self.fault = self.fault, None
                    if fault == "no answer":
                        answers.cancel()
                        await asyncio.wait([answers])
                        back.write(data)
                        rest = asyncio.create_task(pump(reader, back))  # The body may come after the headers.
                        await there.read(1)
                        rest.cancel()
                    if fault:
                        break
                    back.write(data)
                    await back.drain()
        writer.close()
        self.writers.discard(writer)

    def wait_for(self, work: Coroutine) -> None:
        """Run a coroutine in the relay's thread and wait for it."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    async def serve(self) -> None:
        """Relay until `stop` is set."""
        await self._up()
        self.ready.set()
        await self.stop.wait()
        await self._down()
