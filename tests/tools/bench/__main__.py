"""`make bench`: measure every contender, and write what was seen beside this file. With --paired: see paired.py.

Contenders take turns within each step of each round, in an order that is drawn anew for each step, and only once all of them
are idle: so that a machine that drifts drifts under all of them, and none pays for what another one left behind.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import paired, peers, report
from .measure import Bench
from .peers import CACHE
from .report import CALLERS, FAR_CALLERS, STREAMS

HERE = Path(__file__).parent
CHUNKS = {50: 30, 300: 20}  # of a stream, by how many there are at once
FAR = ("direct", "both-1", "both-2", "native", "neither", "litellm-1", "portkey")
# `bare` is at work for half a minute after each of these. What tokens cost shows in regular calls.
LEFT_OUT = {"bare": ("rps@64", "complete@300"), "tokens": ("complete", "wrong")}


def measure(bench: Bench, rounds: int, seed: int) -> None:
    """All steps of all rounds."""
    draw = random.Random(seed)

    def take_turns(step: str, measure: Callable[..., None], *arguments: int, only: tuple[str, ...] = ()) -> None:
        here = [
            name
            for name in bench.contenders
            if not step.startswith(LEFT_OUT.get(name, ("no step",))) and (not only or name in only)
        ]
        for name in draw.sample(here, len(here)):
            bench.turn(name, measure, *arguments)

    for _ in bench.rounds(rounds, rest=len(bench.contenders) * (bench.seconds + 6) + 100):
        for callers in CALLERS:
            bench.say(f"  regular calls, {callers} at a time")
            take_turns(f"rps@{callers}", bench.regular, callers)
        for streams in STREAMS:
            bench.say(f"  streams, {streams} at a time, a chunk every 50 ms")
            take_turns(f"complete@{streams}", bench.paced, streams, CHUNKS[streams])
    # Once, because what a distance adds differs little from one round to the next.
    for callers in FAR_CALLERS:
        bench.say(f"vendor 40 ms away, {callers} at a time")
        take_turns("far", bench.far, callers, only=FAR)
    bench.say("memory")
    take_turns("memory", bench.memory)
    # Last, because what a storm leaves behind in a contender would be in everything after it.
    bench.say("wrong keys")
    take_turns("wrong", bench.wrong)


def results(bench: Bench, seed: int) -> dict:
    """Everything measured, as it goes into results.json: the median, lowest and highest of each metric."""
    return about(bench) | {
        "seed": seed,
        "skipped": bench.skipped,
        "contenders": {
            contender.name: {
                "title": contender.title,
                "version": contender.version,
                "metrics": {
                    metric: [round(pick(values.values()), 3) for pick in (statistics.median, min, max)]
                    for metric, values in bench.samples[contender.name].items()
                    if values
                },
            }
            for contender in bench.contenders.values()
        },
    }


def about(bench: Bench) -> dict:
    """Where, when and how long it was measured."""
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "arch": platform.machine()},
        "python": platform.python_version(),
        "rounds": bench.round,
        "minutes": round(bench.elapsed / 60, 1),
        "seconds": bench.seconds,
    }


def main() -> None:
    """Parse the options, run, report."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--paired", action="store_true", help="what differs between this start and others, in pairs")
    parser.add_argument("--rounds", type=int, help="3, or 10 in pairs")
    parser.add_argument("--seconds", type=int, default=2, help="how long each step lasts")
    parser.add_argument("--minutes", type=float, help="begin no round that would not end within this time: 15, or 10 in pairs")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="draws the order of the contenders")
    parser.add_argument("--only", nargs="*", choices=peers.MAKERS, default=[], metavar="NAME", help=" ".join(peers.MAKERS))
    options = parser.parse_args()
    usual_rounds, minutes, names = (
        (10, 10, paired.NAMES) if options.paired else (3, 15, [name for name in peers.MAKERS if name != "again"])
    )
    names = [name for name in names if not options.only or name in options.only]
    rounds = options.rounds or usual_rounds

    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(options.seconds, options.minutes or minutes, Path(folder))
        with bench.started(names):
            if options.paired:
                paired.measure(bench, rounds)
            else:
                bench.say(f"the order of the contenders is drawn with SEED={options.seed}")
                measure(bench, rounds, options.seed)
    # A quick look does not replace the results of a whole run.
    whole = rounds >= usual_rounds and options.seconds >= 2 and not options.only
    out = HERE if whole else CACHE
    if options.paired:
        texts = {"paired.md": report.heading("make bench PAIRED=1", about(bench)) + paired.report(bench)}
    else:
        found = results(bench, options.seed)
        texts = {"results.json": json.dumps(found, indent=1) + "\n"} | report.files(found)
        if whole:
            report.update_readme(found)
    for name, text in texts.items():
        (out / name).write_text(text)
    print("\n" + next(text for name, text in texts.items() if name.endswith(".md")))
    bench.say(f"results in {out.relative_to(peers.PROJECT)}/")


if __name__ == "__main__":
    peers.run_tool("bench", main)
