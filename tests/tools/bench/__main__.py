"""`make bench`: measure every contender, say which claims hold, and write the results beside this file.

Contenders take turns within each step of each round, in an order that is drawn anew for each step, and only once all of them
are idle: so that a machine that drifts drifts under all of them, and none pays for what another one left behind.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import random
import ssl
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from . import peers, report
from .load import Call, percentile, result, stream, wrk
from .peers import CACHE, Contender, Skipped
from .report import CALLERS, PATIENCE, STREAMS
from .upstream import Upstream

HERE = Path(__file__).parent
CHUNKS = {1: 40, 50: 40, 300: 20}  # of a stream, by how many there are at once
FAR = ("direct", "egress-1", "egress-2", "ours-1", "litellm-1", "portkey")
WEIGHED = ("egress-1", "ours-1")
# `bare` is at work for half a minute after each of these. What tokens cost shows in regular calls.
LEFT_OUT = {"bare": ("rps@64", "complete@300", "wrong@2"), "tokens": ("complete", "chunks", "wrong")}


class Bench:
    """One run. `samples[contender][metric]` grows by a value a round."""

    def __init__(self, rounds: int, seconds: int, minutes: float, seed: int, folder: Path) -> None:
        self.rounds, self.seconds, self.minutes, self.seed, self.folder = rounds, seconds, minutes, seed, folder
        self.random = random.Random(seed)
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.contenders: list[Contender] = []
        self.active: list[Contender] = []  # who may still be at work
        self.skipped: dict[str, str] = {}
        self.start, self.done = time.monotonic(), 0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def say(self, line: str) -> None:
        """Print progress."""
        minutes, seconds = divmod(int(self.elapsed), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", flush=True)

    def note(self, contender: Contender, **values: float) -> None:
        """Add values to the samples, and show them."""
        for metric, value in values.items():
            self.samples[contender.name][metric].append(value)
        self.say(f"    {contender.title:<34}" + "  ".join(f"{name} {report.number(value)}" for name, value in values.items()))

    def take_turns(self, step: str, measure: Callable[..., None], *arguments: int, only: tuple[str, ...] = ()) -> None:
        """Measure every contender that takes part in `step`, or those in `only`, in any order, each once all of them are idle.

        One that breaks down does not end the run.
        """
        here = [
            contender
            for contender in self.contenders
            if not step.startswith(LEFT_OUT.get(contender.name, ("no step",))) and (not only or contender.name in only)
        ]
        for contender in self.random.sample(here, len(here)):
            self.settle()
            if contender in self.contenders:
                self.active = [contender]
                try:
                    measure(contender, *arguments)
                except (OSError, RuntimeError) as error:
                    self.say(f"    {contender.title:<34}broke down: {error}")
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
        contender.memory.clear()
        try:
            contender.server.start()
            self.note(contender, restarts=1)
        except RuntimeError as error:
            self.skipped[contender.name] = f"it did not start again: {error}"
            self.contenders.remove(contender)

    def measure(self) -> None:
        """All steps of all rounds. No round begins that would not end in time."""
        last = 50 * self.seconds + 2 * len(self.contenders) * (2 * self.seconds + 6) + 30  # what follows the rounds
        for number in self.in_time("round", self.rounds, last):
            self.round(number)
            self.done = number + 1
        self.say("memory")
        self.memory()
        # Last, because what a storm leaves behind in a contender would be in everything after it.
        for number in self.in_time("wrong keys, round", min(2, self.rounds)):
            self.take_turns(f"wrong@{number + 1}", self.wrong)

    def in_time(self, what: str, count: int, rest: float = 0) -> Iterator[int]:
        """Count from 0 to `count`, but stop where as long again as the longest turn so far, and `rest`, would be too long."""
        longest = 0.0
        for number in range(count):
            if number and self.elapsed + longest + rest > self.minutes * 60:
                self.say(f"{what} {number + 1} is left out: it would not end within {self.minutes:.0f} minutes")
                return
            began = self.elapsed
            self.say(f"{what} {number + 1} of {count}")
            yield number
            longest = max(longest, self.elapsed - began)

    def round(self, number: int) -> None:
        """One round. What a distance adds differs little from one to the next: two have it."""
        for callers in CALLERS:
            self.say(f"  regular calls, {callers} at a time")
            self.take_turns(f"rps@{callers}", self.regular, callers)
        for streams in STREAMS:
            self.say(f"  streams, {streams} at a time, a chunk every 50 ms")
            self.take_turns(f"complete@{streams}", self.paced, streams, max(10, CHUNKS[streams] * min(self.seconds, 3) // 3))
        self.say("  streams, 50 at a time, chunks as fast as they are taken")
        self.take_turns("chunks", self.fast)
        for callers in CALLERS if number < 2 else ():
            self.say(f"  vendor 40 ms away, {callers} at a time")
            self.take_turns("far", self.far, callers, only=FAR)

    def wrk(self, kind: str, contender: Contender, callers: int, seconds: int) -> dict[str, float]:
        """Run wrk to its end, and count what was served."""
        seen = result(wrk(contender.calls[kind], callers, seconds, self.folder))
        contender.served += int(seen["served"])
        return seen

    def regular(self, contender: Contender, callers: int) -> None:
        """Regular calls for `seconds`: requests/s, latencies in ms, and CPU time a call in ms."""
        before = contender.server.cpu() if contender.server else 0
        seen = self.wrk("near", contender, callers, self.seconds)
        values = {"rps": seen["per_second"]} | latencies(seen)
        if contender.server and seen["served"]:
            values["cpu"] = (contender.server.cpu() - before) / seen["served"] * 1e3
        if failed := seen["errors"] + seen["broken"]:
            values["failed"] = failed
        self.note(contender, **{f"{name}@{callers}": value for name, value in values.items()})

    def paced(self, contender: Contender, streams: int, chunks: int) -> None:
        """`streams` streams at once, a chunk every 50 ms: times in ms, and the share that came to its end."""
        seen = stream(contender.calls["paced"], streams, chunks, 50)
        contender.served += seen.complete
        values = {"complete": seen.complete / streams * 100}
        if seen.first:
            values |= {
                "ttft": percentile(seen.first, 50) * 1e3,
                "chunk": percentile(seen.delays, 50) * 1e3,
                "chunk99": percentile(seen.delays, 99) * 1e3,
            }
        self.note(contender, **{f"{name}@{streams}": value for name, value in values.items()})

    def fast(self, contender: Contender) -> None:
        """The most chunks/s that 50 streams bring."""
        seen = stream(contender.calls["paced"], 50, 100, 0)
        contender.served += seen.complete
        if seen.complete == 50:
            self.note(contender, chunks_per_second=seen.chunks / seen.seconds)

    def far(self, contender: Contender, callers: int) -> None:
        """Regular calls and first tokens with the vendor 40 ms away, in ms, and the connections opened there per 1,000 calls."""
        call = contender.calls["far"]
        seen = self.wrk("far", contender, callers, self.seconds)
        # wrk hangs up in the middle of its last calls, which costs connections: pools are full again before they are counted.
        contender.served += stream(call, callers, 3, 5, calls=2).complete
        opened = self.upstream.opened.value
        streams = stream(call, callers, 3, 5, calls=20 if callers == 1 else 10)
        opened = self.upstream.opened.value - opened
        contender.served += streams.complete
        values = latencies(seen)
        if streams.first:
            values["ttft"] = percentile(streams.first, 50) * 1e3
        if contender.server and streams.complete == streams.started:
            values["opened"] = opened / streams.started * 1000
        self.note(contender, **{f"far_{name}@{callers}": value for name, value in values.items()})

    def memory(self) -> None:
        """Have this project's gateways with one worker serve 20,000 requests, side by side, and weigh all contenders after that.

        It ends after `50 * seconds` in any case. Peers stay at what they have served until now.
        """
        self.settle()
        waiting = [c for c in self.contenders if c.name in WEIGHED and c.served < 20_000]
        deadline = time.monotonic() + 50 * self.seconds
        with contextlib.ExitStack() as stack:
            while waiting and time.monotonic() < deadline:
                runs = [(c, wrk(c.calls["near"], 4, min(5, self.seconds), self.folder)) for c in waiting]
                for _, running in runs:
                    stack.callback(running.kill)
                for contender, running in runs:
                    try:
                        contender.served += int(result(running)["served"])
                    except RuntimeError as error:
                        self.say(f"    {contender.title:<34}broke down: {error}")
                        waiting.remove(contender)
                    if contender.served >= 10_000:
                        contender.memory.setdefault(10_000, contender.server.memory())
                waiting = [c for c in waiting if c.served < 20_000]
        self.active = [c for c in self.contenders if c.name in WEIGHED]
        self.settle()
        for contender in self.contenders:
            if contender.server:
                halfway = {"memory_10k": contender.memory[10_000]} if 10_000 in contender.memory else {}
                self.note(contender, **halfway, memory_after=contender.server.memory(), served=contender.served)

    def wrong(self, contender: Contender) -> None:
        """What an error costs beside a success, and the good calls of one caller while eight pour in wrong keys."""
        good = self.wrk("near", contender, 8, self.seconds)
        bad = result(wrk(contender.calls["wrong"], 8, self.seconds, self.folder))
        if contender.server and not contender.server.idle(10):
            self.renew(contender)
        storm = wrk(contender.calls["wrong"], 8, 10, self.folder)
        try:
            time.sleep(0.5)
            answers = list(calls_until(contender.calls["near"], time.monotonic() + 4))
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
            errors = bad["errors"] / bad["seconds"]
            values |= {"error_rps": errors, "error_cost": good["per_second"] / errors}
        self.note(contender, **values)

    def run(self, names: list[str]) -> dict:
        """Install, start, measure, stop. Returns the results."""
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
                self.say(f"the order of the contenders is drawn with SEED={self.seed}")
                self.measure()
            finally:
                peers.deaf()
        return self.results()

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
        self.contenders.append(contender)

    def results(self) -> dict:
        """Everything measured, as it goes into results.json: the median, lowest and highest of each metric."""
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": {"cores": os.cpu_count(), "system": platform.system(), "arch": platform.machine()},
            "python": platform.python_version(),
            "rounds": self.done,
            "seed": self.seed,
            "minutes": round(self.elapsed / 60, 1),
            "seconds": self.seconds,
            "skipped": self.skipped,
            "contenders": {
                c.name: {
                    "title": c.title,
                    "version": c.version,
                    "metrics": {
                        metric: [round(pick(values), 3) for pick in (statistics.median, min, max)]
                        for metric, values in self.samples[c.name].items()
                    },
                }
                for c in self.contenders
            },
        }


def latencies(seen: dict[str, float]) -> dict[str, float]:
    """The percentiles that wrk saw, in ms, unless calls failed: those that fail fast are not fast."""
    return {"p50": seen["p50"], "p99": seen["p99"]} if seen["served"] and not seen["errors"] else {}


def one_call(call: Call, timeout: float) -> tuple[int, str]:
    """Make one call on a connection of its own. Returns status and text. Raises OSError or HTTPException if none came."""
    url = urlsplit(call.url)
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(
            url.hostname, url.port, timeout=timeout, context=ssl._create_unverified_context()
        )
    else:
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("POST", url.path, call.body(), {"Content-Type": "application/json"} | call.headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def calls_until(call: Call, deadline: float) -> Iterator[tuple[float, bool]]:
    """Make one call after another until `deadline`; yield how long each took, in seconds, and whether it was served."""
    while time.monotonic() < deadline:
        start = time.monotonic()
        try:
            status, _ = one_call(call, PATIENCE)
        except (OSError, http.client.HTTPException):
            status = 0
        yield time.monotonic() - start, status == 200


def check(contender: Contender) -> None:
    """See that each kind of call gets the answer that is to be measured. Raises Skipped with what came instead."""
    for kind, call in contender.calls.items():
        try:
            status, text = one_call(call, 60)
        except (OSError, http.client.HTTPException) as error:
            raise Skipped(f"no answer to a {kind} call: {error}") from error
        if status != (401 if kind == "wrong" else 200):
            raise Skipped(f"a {kind} call was answered with {status}: {text[:300]}")
    if stream(contender.calls.get("paced", contender.calls["far"]), 2, 3, 10).complete != 2:
        raise Skipped("a stream did not come to its end")


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3, help="how long each step lasts")
    parser.add_argument("--minutes", type=float, default=28, help="begin no round that would not end within this time")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="draws the order of the contenders")
    parser.add_argument("--only", nargs="*", choices=peers.MAKERS, default=[], metavar="NAME", help=" ".join(peers.MAKERS))
    options = parser.parse_args()

    # A quick look does not replace the results of a whole run.
    whole = options.rounds >= 3 and options.seconds >= 3 and not options.only
    out = HERE if whole else CACHE
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(options.rounds, options.seconds, options.minutes, options.seed, Path(folder))
        results = bench.run(options.only or list(peers.MAKERS))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, text in report.files(results).items():
        (out / name).write_text(text)
    if whole:
        report.update_readme(results)
    print("\n" + report.files(results)["results.md"])
    bench.say(f"results in {out.relative_to(peers.PROJECT)}/")


if __name__ == "__main__":
    peers.run_tool("bench", main)
