"""The callers: wrk for regular calls, aiohttp for streams, whose chunks wrk cannot time."""

import asyncio
import contextlib
import json
import re
import statistics
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

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


STAMP = re.compile(rb"@(\d+\.\d+) ")
LAST = re.compile(rb'"finish_reason": ?"stop"')


def stream(call: Call, at_a_time: int, chunks: int, gap: float, calls: int = 1, seconds: float = 60) -> Streams:
    """Read `at_a_time` streams of `chunks` chunks, `gap` ms apart, at once; each caller `calls` of them, one after another.

    What has not ended after `seconds` is hung up on, and counts as started but not complete.
    """
    seen = Streams()
    body = call.body(f"{chunks} chunks, {gap:.0f} ms apart. {PROMPT}", stream=True)
    headers = {"Content-Type": "application/json"} | call.headers

    async def read(session: aiohttp.ClientSession) -> None:
        """Read one stream, and note when its chunks arrive."""
        seen.started += 1
        sent, stopped, arrived = time.monotonic(), False, 0
        # The readers measure time, not trust: the certificate is checked by the contenders.
        async with session.post(call.url, data=body, headers=headers, ssl=False) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if stamp := STAMP.search(line):
                    now = time.monotonic()
                    seen.delays.append(now - float(stamp[1]))
                    if not arrived:
                        seen.first.append(now - sent)
                    arrived += 1
                stopped = stopped or bool(LAST.search(line))
        seen.chunks += arrived
        seen.complete += stopped

    async def caller(session: aiohttp.ClientSession) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            for _ in range(calls):
                await read(session)

    async def run() -> None:
        start = time.monotonic()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            callers = [asyncio.create_task(caller(session)) for _ in range(at_a_time)]
            _, late = await asyncio.wait(callers, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        seen.seconds = time.monotonic() - start

    asyncio.run(run())
    return seen
