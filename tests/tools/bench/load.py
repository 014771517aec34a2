"""The callers: wrk for regular calls, an asyncio client for streams, whose chunks wrk cannot time."""

import asyncio
import json
import re
import ssl
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

PROMPT = "The quick brown fox jumps over the lazy dog. " * 20

# wrk prints its percentiles rounded; its script interface has them whole, in microseconds.
WRK = """
wrk.method = "POST"
wrk.body = %s
%s
function done(summary, latency)
  io.write(string.format(
    '{"requests":%%d,"seconds":%%f,"errors":%%d,"broken":%%d,"p50":%%f,"p99":%%f,"max":%%f}',
    summary.requests, summary.duration / 1e6, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3))
end
"""


@dataclass(frozen=True)
class Call:
    """What one kind of call to one contender looks like: where, with which headers, naming which model."""

    url: str
    headers: dict[str, str]
    model: str

    def body(self, prompt: str = PROMPT, **more: object) -> str:
        """The JSON body of this call."""
        return json.dumps({"model": self.model, "messages": [{"role": "user", "content": prompt}], **more})


def lua(text: str) -> str:
    """`text` as a Lua string literal."""
    return "[==[" + text + "]==]"


def wrk(call: Call, callers: int, seconds: int, folder: Path) -> subprocess.Popen:
    """Start `callers` connections that each send `call` over and over; `result` has what came of it."""
    headers = {"Content-Type": "application/json"} | call.headers
    script = folder / f"{abs(hash((call.url, call.model, *headers.items())))}.lua"
    lines = "\n".join(f"wrk.headers[ {lua(name)} ] = {lua(value)}" for name, value in headers.items())
    script.write_text(WRK % (lua(call.body()), lines))
    command = ["wrk", "-t1", f"-c{callers}", f"-d{seconds}s", "--timeout", "30s", "-s", script, call.url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def result(process: subprocess.Popen) -> dict[str, float]:
    """What a `wrk` saw: requests, seconds, errors (statuses from 400), broken (no answer), p50, p99 and max in ms.

    Those `served` are the requests that were no errors, and `per_second` counts them alone.

    Raises RuntimeError with what it printed if it could not run.
    """
    try:
        printed, _ = process.communicate()
    finally:
        process.kill()
    line = printed.rpartition("{")[2]
    if process.returncode or not line:
        raise RuntimeError(f"wrk failed: {printed}")
    seen = json.loads("{" + line)
    served = seen["requests"] - seen["errors"]
    return seen | {"served": served, "per_second": served / seen["seconds"]}


def percentile(values: Iterable[float], percent: int) -> float:
    """A percentile of `values` by linear interpolation, or of the only value there is."""
    values = sorted(values)
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


@dataclass
class Streams:
    """What a reader of many streams saw. Times in seconds."""

    started: int = 0
    complete: int = 0
    chunks: int = 0
    first: list[float] = field(default_factory=list)  # from sending the request to the first chunk with content
    delays: list[float] = field(default_factory=list)  # from a chunk's leaving the vendor to its arrival here
    seconds: float = 0.0


class Reader(asyncio.Protocol):
    """One caller's connection: sends a streaming call, reads it to its end, and again, `calls` times over."""

    stamp = re.compile(rb"@(\d+\.\d+) ")
    last = re.compile(rb'"finish_reason": ?"stop"')

    def __init__(self, request: bytes, calls: int, seen: Streams) -> None:
        self.request, self.left, self.seen = request, calls, seen
        self.finished = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.call()

    def call(self) -> None:
        """Send the next call, or hang up after the last."""
        if not self.left:
            self.transport.close()
            return
        self.left -= 1
        self.seen.started += 1
        self.tail, self.waiting, self.stopped, self.sent = b"", True, False, time.monotonic()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.tail and not data.startswith(b"HTTP/1.1 200"):
            self.transport.close()
            return
        data = self.tail + data
        end = 0
        for match in self.stamp.finditer(data):
            end = match.end()
            self.seen.chunks += 1
            self.seen.delays.append(now - float(match[1]))
            if self.waiting:
                self.waiting = False
                self.seen.first.append(now - self.sent)
        self.stopped = self.stopped or bool(self.last.search(data, end))
        # A stamp or the ending may be cut in two by the network: keep what could be the start of either.
        self.tail = data[max(end, len(data) - 64) :]
        if self.tail.endswith(b"\r\n0\r\n\r\n"):
            self.seen.complete += self.stopped
            self.call()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.finished.done():
            self.finished.set_result(None)


def stream(call: Call, at_a_time: int, chunks: int, gap: float, calls: int = 1, seconds: float = 60) -> Streams:
    """Read `at_a_time` streams of `chunks` chunks, `gap` ms apart, at once; each caller `calls` of them, one after another.

    What has not ended after `seconds` is hung up on, and counts as started but not complete.
    """
    url = urlsplit(call.url)
    body = call.body(f"{chunks} chunks, {gap:.0f} ms apart. {PROMPT}", stream=True)
    headers = {"Host": url.netloc, "Content-Type": "application/json", "Content-Length": str(len(body))} | call.headers
    request = (f"POST {url.path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in headers.items()) + f"\r\n{body}").encode()
    # The readers measure time, not trust: the certificate is checked by the contenders.
    context = ssl._create_unverified_context() if url.scheme == "https" else None

    async def run() -> Streams:
        seen, loop = Streams(), asyncio.get_running_loop()
        start = time.monotonic()
        opening = [
            loop.create_connection(lambda: Reader(request, calls, seen), url.hostname, url.port, ssl=context)
            for _ in range(at_a_time)
        ]
        readers = [reader for _, reader in await asyncio.gather(*opening)]
        await asyncio.wait([reader.finished for reader in readers], timeout=seconds)
        seen.seconds = time.monotonic() - start
        for reader in readers:
            reader.transport.abort()
        return seen

    return asyncio.run(run())
