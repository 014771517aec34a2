"""`make bench`: measure every contender, say which claims hold, and write the results beside this file.

Contenders take turns within each step of each round, so that a machine that drifts drifts under all of them.
"""

import argparse
import contextlib
import http.client
import json
import os
import platform
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from . import peers, report
from .load import Call, percentile, result, stream, wrk
from .peers import CACHE, Contender, Skipped
from .upstream import Upstream

HERE = Path(__file__).parent
CALLERS = (1, 8, 64)
FAR = ("direct", "ours-1", "egress", "litellm-1", "portkey")


class Bench:
    """One run. `samples[contender][metric]` grows by a value a round."""

    def __init__(self, rounds: int, seconds: int, folder: Path) -> None:
        self.rounds, self.seconds, self.folder = rounds, seconds, folder
        self.samples: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.contenders: list[Contender] = []
        self.skipped: dict[str, str] = {}
        self.start = time.monotonic()

    def say(self, line: str) -> None:
        """Print progress."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        print(f"{minutes:3}:{seconds:02}  {line}", flush=True)

    def note(self, contender: Contender, **values: float) -> None:
        """Add values to the samples, and show them."""
        for metric, value in values.items():
            self.samples[contender.name][metric].append(value)
        self.say(f"    {contender.title:<28}" + "  ".join(f"{name} {report.number(value)}" for name, value in values.items()))

    def turns(self, step: int, only: tuple[str, ...] = ()) -> Iterator[Contender]:
        """Every contender, or those in `only`, each step beginning with another one."""
        here = [c for c in self.contenders if (c.name in only if only else c.name != "egress")]
        first = step % max(1, len(here))
        yield from here[first:] + here[:first]

    def measure(self) -> None:
        """All steps of all rounds."""
        for number in range(self.rounds):
            self.say(f"round {number + 1} of {self.rounds}")
            for step, callers in enumerate(CALLERS):
                self.say(f"  regular calls, {callers} at a time")
                for contender in self.turns(number + step):
                    self.regular(contender, callers)
            for step, (streams, chunks) in enumerate(((1, 40), (50, 40), (300, 20))):
                self.say(f"  streams, {streams} at a time, a chunk every 50 ms")
                for contender in self.turns(number + step):
                    self.paced(contender, streams, chunks * min(self.seconds, 3) // 3)
            self.say("  streams, 50 at a time, chunks as fast as they are taken")
            for contender in self.turns(number):
                seen = stream(contender.calls["paced"], 50, 100, 0)
                contender.served += seen.started
                self.note(contender, chunks_per_second=seen.chunks / seen.seconds)
            for step, callers in enumerate(CALLERS):
                self.say(f"  vendor 40 ms away, {callers} at a time")
                for contender in self.turns(number + step, FAR):
                    self.far(contender, callers)
        self.say("memory")
        self.memory()
        # Last, because what a storm leaves behind in a contender would be in everything after it.
        for number in range(min(self.rounds, 2)):
            self.say(f"wrong keys, round {number + 1} of {min(self.rounds, 2)}")
            for contender in self.turns(number):
                self.wrong(contender)

    def wrk(self, kind: str, contender: Contender, callers: int, seconds: int) -> dict[str, float]:
        """Run wrk to its end, and count what was served."""
        seen = result(wrk(contender.calls[kind], callers, seconds, self.folder))
        contender.served += int(seen["requests"])
        return seen

    def regular(self, contender: Contender, callers: int) -> None:
        """Regular calls for `seconds`: requests/s, and latencies in ms."""
        seen = self.wrk("near", contender, callers, self.seconds)
        values = {"rps": seen["per_second"]} | latencies(seen)
        if failed := seen["errors"] + seen["broken"]:
            values["failed"] = failed
        self.note(contender, **{f"{name}@{callers}": value for name, value in values.items()})

    def paced(self, contender: Contender, streams: int, chunks: int) -> None:
        """`streams` streams at once, a chunk every 50 ms: times in ms, and the share that came to its end."""
        seen = stream(contender.calls["paced"], streams, chunks, 50)
        contender.served += streams
        values = {"complete": seen.complete / streams * 100}
        if seen.first:
            values |= {
                "ttft": percentile(seen.first, 50) * 1e3,
                "chunk": percentile(seen.delays, 50) * 1e3,
                "chunk99": percentile(seen.delays, 99) * 1e3,
            }
        self.note(contender, **{f"{name}@{streams}": value for name, value in values.items()})

    def far(self, contender: Contender, callers: int) -> None:
        """Regular calls and first tokens with the vendor 40 ms away, in ms, and the connections opened there per 1,000 calls."""
        call = contender.calls["far"]
        seen = self.wrk("far", contender, callers, self.seconds)
        # wrk hangs up in the middle of its last calls, which costs connections: pools are full again before they are counted.
        stream(call, callers, 3, 5, calls=2)
        opened = self.upstream.opened.value
        streams = stream(call, callers, 3, 5, calls=20 if callers == 1 else 10)
        opened = self.upstream.opened.value - opened
        contender.served += 2 * callers + streams.started
        values = latencies(seen)
        if streams.first:
            values["ttft"] = percentile(streams.first, 50) * 1e3
        if contender.server:
            values["opened"] = opened / streams.started * 1000
        self.note(contender, **{f"far_{name}@{callers}": value for name, value in values.items()})

    def memory(self) -> None:
        """Have the one-worker contenders serve 20,000 requests, all at the same time, and weigh them on the way.

        It ends when this project's gateway has served them, or in `80 * seconds`: slower ones serve what they can until then.
        """
        names = ("ours-1", "ogx", "litellm-1", "portkey")
        waiting = [c for c in self.contenders if c.name in names]
        first = waiting[:1]
        deadline = time.monotonic() + 80 * self.seconds
        while any(c.served < 20_000 for c in first) and time.monotonic() < deadline:
            runs = [(c, wrk(c.calls["near"], 4, min(5, self.seconds), self.folder)) for c in waiting]
            for contender, running in runs:
                contender.served += int(result(running)["requests"])
                if contender.served >= 10_000:
                    contender.memory.setdefault(10_000, contender.server.memory())
            waiting = [c for c in waiting if c.served < 20_000]
        for contender in self.turns(0):
            if contender.server:
                halfway = {"memory_10k": contender.memory[10_000]} if 10_000 in contender.memory else {}
                self.note(contender, **halfway, memory_after=contender.server.memory(), served=contender.served)

    def wrong(self, contender: Contender) -> None:
        """What an error costs beside a success, and the good calls of one caller while eight pour in wrong keys."""
        self.settle(contender)
        good = self.wrk("near", contender, 8, self.seconds)
        bad = self.wrk("wrong", contender, 8, self.seconds)
        self.settle(contender)
        storm = wrk(contender.calls["wrong"], 8, 10, self.folder)
        try:
            time.sleep(0.5)
            waits = list(calls_until(contender.calls["near"], time.monotonic() + 4))
        finally:
            storm.kill()
            storm.communicate()
        values = {"storm_worst": max(waits), "storm_calls": len(waits)}
        if bad["requests"]:
            values |= {"error_rps": bad["per_second"], "error_cost": good["per_second"] / bad["per_second"]}
        self.note(contender, **values)

    def settle(self, contender: Contender) -> None:
        """Wait until it has worked off what it was sent, or start it anew where that takes over 10 s."""
        if not contender.server:
            return
        for _ in range(20):
            before = contender.server.cpu()
            time.sleep(0.5)
            if contender.server.cpu() - before < 0.05:
                return
        contender.server.stop(seconds=1)
        contender.server.start()

    def run(self, names: list[str]) -> dict:
        """Install, start, measure, stop. Returns the results."""
        with contextlib.ExitStack() as stack:
            self.upstream = stack.enter_context(Upstream(self.folder))
            for name in names:
                self.say(f"installing and starting {name}")
                try:
                    self.enter(name, stack)
                except (Skipped, RuntimeError) as reason:
                    self.skipped[name] = str(reason)
                    self.say(f"    skipped: {reason}")
            self.measure()
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
            "rounds": self.rounds,
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
    """The percentiles that wrk saw, in ms, if anything was answered while it ran."""
    return {"p50": seen["p50"], "p99": seen["p99"]} if seen["requests"] else {}


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


def calls_until(call: Call, deadline: float) -> Iterator[float]:
    """Make one call after another until `deadline`; yield how long each took, in seconds, 20 where no answer came."""
    while time.monotonic() < deadline:
        start = time.monotonic()
        try:
            one_call(call, 20)
            yield time.monotonic() - start
        except (OSError, http.client.HTTPException):
            yield 20


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
    parser.add_argument("--only", nargs="*", choices=peers.MAKERS, default=[], metavar="NAME", help=" ".join(peers.MAKERS))
    options = parser.parse_args()
    peers.prepare("bench")

    # A quick look does not replace the results of a whole run.
    whole = options.rounds >= 3 and options.seconds >= 3 and not options.only
    out = HERE if whole else CACHE
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(options.rounds, options.seconds, Path(folder))
        results = bench.run(options.only or list(peers.MAKERS))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for name, text in report.files(results).items():
        (out / name).write_text(text)
    if whole:
        report.update_readme(results)
    print("\n" + report.files(results)["results.md"])
    bench.say(f"results in {out.relative_to(peers.PROJECT)}/")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error}\n{error.stderr or ''}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")
