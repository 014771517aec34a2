"""Servers of the tests that run in a thread, and how they copy bytes."""

import asyncio
import contextlib
import threading
from typing import Self


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


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the source ends, then end the destination too."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
