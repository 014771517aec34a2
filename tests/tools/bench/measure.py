"""What `make bench` does to a contender, step by step, and what it notes of it."""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from . import peers
from .load import Call, percentile, result, stream, wrk
from .peers import Contender, Skipped
from .report import PATIENCE, number
from .upstream import Upstream


class Bench:
    """One run. `samples[contender][metric]` has a value for each round in which it was measured."""

    def __init__(self, seconds: int, minutes: float, folder: Path) -> None:
        self.seconds, self.minutes, self.folder = seconds, minutes, folder
        self.samples: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        self.contenders: dict[str, Contender] = {}
        self.active: list[Contender] = []  # who may still be at work
        self.skipped: dict[str, str] = {}
        self.began, self.round = time.monotonic(), 0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def say(self, line: str) -> None:
        """Print progress."""
        minutes, seconds = divmod(int(self.elapsed), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", flush=True)

    def note(self, contender: Contender, **values: float) -> None:
        """Keep this round's values, and show them."""
        for metric, value in values.items():
            self.samples[contender.name][metric][self.round] = value
        self.say(f"    {contender.title:<40}" + "  ".join(f"{name} {number(value)}" for name, value in values.items()))

    @contextlib.contextmanager
    def started(self, names: list[str]) -> Iterator[None]:
        """The vendor and all contenders, installed, started, seen to answer as they should, and stopped in the end."""
        with contextlib.ExitStack() as stack:
            try:
                self.upstream = stack.enter_context(Upstream(self.folder))
                for name in names:
                    self.say(f"installing and starting {name}")
                    try:
                        self.enter(name, stack)
                    except (Skipped, RuntimeError) as reason:
                        self.skipped[name] = str(reason).strip()[-300:]
                        self.say(f"    skipped: {reason}")
                yield
            finally:
                peers.deaf()

    def enter(self, name: str, stack: contextlib.ExitStack) -> None:
        """Install and start one contender, time that, and see that it answers as it should.

        Raises Skipped or RuntimeError if it cannot take part.
        """
        contender = peers.MAKERS[name](self.upstream, self.folder / name)
        if contender.server:
            start = time.monotonic()
            stack.enter_context(contender.server)
            boot = time.monotonic() - start
            check(contender)
            time.sleep(1)
            self.note(contender, boot=boot, memory_rest=contender.server.memory(), size=contender.size)
        self.contenders[name] = contender

    def rounds(self, count: int, rest: float = 0) -> Iterator[int]:
        """Count from 1 to `count`, but stop where as long again as the longest round so far, and `rest`, would be too long."""
        longest = 0.0
        for number_ in range(1, count + 1):
            if number_ > 1 and self.elapsed + longest + rest > self.minutes * 60:
                self.say(f"round {number_} is left out: it would not end within {self.minutes:.0f} minutes")
                return
            began, self.round = self.elapsed, number_
            self.say(f"round {number_} of {count}")
            yield number_
            longest = max(longest, self.elapsed - began)

    def turn(self, name: str, measure: Callable[..., None], *arguments: int) -> None:
        """Measure one contender, once all of them are idle. One that breaks down does not end the run."""
        self.settle()
        if contender := self.contenders.get(name):
            self.active = [contender]
            try:
                measure(contender, *arguments)
            except (OSError, RuntimeError) as error:
                self.say(f"    {contender.title:<40}broke down: {error}")
                self.note(contender, broke_down=1)

    def settle(self) -> None:
        """Wait until all contenders have worked off what they were sent. One that takes over 10 s is started anew."""
        for contender in self.active:
            if contender.server and not contender.server.idle(10):
                self.renew(contender)
        self.active = []

    def renew(self, contender: Contender) -> None:
        """Start a contender anew, or leave it out from now on if it does not start."""
        contender.server.stop(seconds=1)
        contender.served = 0
        try:
            contender.server.start()
            self.note(contender, restarts=1)
        except RuntimeError as error:
            self.skipped[contender.name] = f"it did not start again: {error}"
            del self.contenders[contender.name]

    def regular(self, contender: Contender, callers: int, seconds: int = 0) -> None:
        """Regular calls for `seconds`: requests/s, latencies in ms, and CPU time a call in ms."""
        before = contender.server.cpu() if contender.server else 0
        seen = result(wrk(contender.calls["near"], callers, seconds or self.seconds, self.folder))
        contender.served += int(seen["served"])
        values = {"rps": seen["per_second"]} | latencies(seen)
        if contender.server and seen["served"]:
            values["cpu"] = (contender.server.cpu() - before) / seen["served"] * 1e3
        if failed := seen["errors"] + seen["broken"]:
            values["failed"] = failed
        self.note(contender, **{f"{name}@{callers}": value for name, value in values.items()})

    def paced(self, contender: Contender, streams: int, chunks: int) -> None:
        """`streams` streams at once, a chunk every 50 ms: times and CPU time in ms, and the share that came to its end."""
        before = contender.server.cpu() if contender.server else 0
        seen = stream(contender.calls["paced"], streams, chunks, 50)
        contender.served += seen.complete
        values = {"complete": seen.complete / streams * 100}
        if seen.first:
            values |= {
                "ttft": percentile(seen.first, 50) * 1e3,
                "chunk": percentile(seen.delays, 50) * 1e3,
                "chunk99": percentile(seen.delays, 99) * 1e3,
            }
        if contender.server and seen.chunks:
            values["chunk_cpu"] = (contender.server.cpu() - before) / seen.chunks * 1e3
        self.note(contender, **{f"{name}@{streams}": value for name, value in values.items()})

    def far(self, contender: Contender, callers: int) -> None:
        """Regular calls and first tokens with the vendor 40 ms away, in ms, and the connections opened there per 1,000 calls."""
        call = contender.calls["far"]
        seen = result(wrk(call, callers, self.seconds, self.folder))
        # wrk hangs up in the middle of its last calls, which costs connections: pools are full again before they are counted.
        contender.served += int(seen["served"]) + stream(call, callers, 3, 5, calls=2).complete
        opened = self.upstream.opened.value
        streams = stream(call, callers, 3, 5, calls=10)
        opened = self.upstream.opened.value - opened
        contender.served += streams.complete
        values = latencies(seen)
        if streams.first:
            values["ttft"] = percentile(streams.first, 50) * 1e3
        if contender.server and streams.complete == streams.started:
            values["opened"] = opened / streams.started * 1000
        self.note(contender, **{f"far_{name}@{callers}": value for name, value in values.items()})

    def wrong(self, contender: Contender) -> None:
        """What an error costs beside a success, and the good calls of one caller while eight pour in wrong keys."""
        bad = result(wrk(contender.calls["wrong"], 8, self.seconds, self.folder))
        if contender.server and not contender.server.idle(10):
            self.renew(contender)
        storm = wrk(contender.calls["wrong"], 8, 10, self.folder)
        try:
            time.sleep(0.5)
            answers = list(calls_for(4, contender.calls["near"]))
        finally:
            storm.kill()
            storm.communicate()
        served = [seconds for seconds, good in answers if good]
        contender.served += len(served)
        values = {"storm_calls": len(served), "storm_failed": len(answers) - len(served)}
        # A call that failed fast was not fast: only those count that were served, or waited for in vain.
        if waits := [seconds for seconds, good in answers if good or seconds >= PATIENCE]:
            values["storm_worst"] = min(max(waits), PATIENCE)
        if bad["errors"]:
            values["error_rps"] = bad["errors"] / bad["seconds"]
            if good := self.samples[contender.name]["rps@8"].values():
                values["error_cost"] = statistics.median(good) / values["error_rps"]
        self.note(contender, **values)

    def memory(self, contender: Contender) -> None:
        """Its memory at the end, and what it has served until then."""
        if contender.server:
            self.note(contender, memory_after=contender.server.memory(), served=contender.served)


def latencies(seen: dict[str, float]) -> dict[str, float]:
    """The percentiles that wrk saw, in ms, unless calls failed: those that fail fast are not fast."""
    return {"p50": seen["p50"], "p99": seen["p99"]} if seen["served"] and not seen["errors"] else {}


def one_call(client: httpx.Client, call: Call) -> httpx.Response:
    """Make one call."""
    return client.post(call.url, content=call.body(), headers={"Content-Type": "application/json"} | call.headers)


def caller(timeout: float) -> httpx.Client:
    """Somebody who opens a connection for each call."""
    return httpx.Client(verify=False, trust_env=False, timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0))


def calls_for(seconds: float, call: Call) -> Iterator[tuple[float, bool]]:
    """Make one call after another for `seconds`; yield how long each took, in seconds, and whether it was served."""
    with caller(PATIENCE) as client:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            start, served = time.monotonic(), False
            with contextlib.suppress(httpx.HTTPError):
                served = one_call(client, call).is_success
            yield time.monotonic() - start, served


def check(contender: Contender) -> None:
    """See that each kind of call gets the answer that is to be measured. Raises Skipped with what came instead."""
    with caller(60) as client:
        for kind, call in contender.calls.items():
            try:
                answer = one_call(client, call)
            except httpx.HTTPError as error:
                raise Skipped(f"no answer to a {kind} call: {error!r}") from error
            if answer.status_code != (401 if kind == "wrong" else 200):
                raise Skipped(f"a {kind} call was answered with {answer.status_code}: {answer.text[:300]}")
    if stream(contender.calls["paced"], 2, 3, 10).complete != 2:
        raise Skipped("a stream did not come to its end")
