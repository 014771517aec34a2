"""`make bench PAIRED=1`: pairs of contenders, measured one right after the other, and what differs between the two.

The machine drifts by more than what is looked for here. So the two of a pair take turns within seconds, in the opposite order in
every other round, and only what they differ by in the same round counts: the median of that, and where it lies with 95 % certainty.
One gateway runs twice: what differs between these two is noise.
"""

import math
import statistics

from support.table import table

from .measure import Bench
from .report import number

# Those that are compared stand next to each other.
STEPS = {
    "rps@8": ("again", "previous", "both-1", "egress", "native", "portkey"),
    "p50@1": ("again", "previous", "both-1", "egress", "native", "direct"),
    "chunk@50": ("again", "previous", "both-1", "egress", "native", "direct"),
    "complete@300": ("both-1", "native"),
}
NAMES = list(dict.fromkeys(name for names in STEPS.values() for name in names))

# What is compared: a metric, of whom, with whom.
PAIRS = [
    (metric, one, other)
    for one, other in (("again", "previous"), ("both-1", "previous"), ("both-1", "egress"))
    for metric in ("rps@8", "cpu@8", "p50@1", "chunk@50", "chunk_cpu@50")
] + [("rps@8", "native", "portkey"), ("p50@1", "native", "direct"), ("chunk@50", "native", "direct")]

WORDS = {
    "rps@8": "requests/s, 8 callers",
    "cpu@8": "ms of CPU a call, 8 callers",
    "p50@1": "ms a call, 1 caller",
    "chunk@50": "ms a chunk, 50 streams",
    "chunk_cpu@50": "ms of CPU a chunk, 50 streams",
}


def interval(values: list[float]) -> tuple[float, float]:
    """Between which two of `values` the true median lies with 95 % certainty, whatever their distribution (order statistics).

    The lowest and the highest where there are too few of them to say so.
    """
    values, dropped, count = sorted(values), 0, len(values)
    while 2 * sum(math.comb(count, below) for below in range(dropped + 2)) / 2**count <= 0.05:
        dropped += 1
    return values[dropped], values[-1 - dropped]


def measure(bench: Bench, rounds: int) -> None:
    """All rounds."""
    for round_ in bench.rounds(rounds):
        for metric, names in STEPS.items():
            for name in names if round_ % 2 else names[::-1]:
                match metric:
                    case "rps@8":
                        bench.turn(name, bench.regular, 8)
                    case "p50@1":
                        bench.turn(name, bench.regular, 1, 1)
                    case "chunk@50":
                        bench.turn(name, bench.paced, 50, 30)
                    case "complete@300" if round_ % 2:
                        bench.turn(name, bench.paced, 300, 20)


def report(bench: Bench) -> str:
    """The tables, as they go into paired.md."""
    rows = []
    titles = {name: bench.contenders[name].title if name in bench.contenders else name for name in NAMES}
    for metric, one, other in PAIRS:
        both = [bench.samples[name][metric] for name in (one, other)]
        if not (rounds := both[0].keys() & both[1].keys()):
            continue
        mine, theirs = ([values[round_] for round_ in sorted(rounds)] for values in both)
        if metric == "rps@8":
            differences, unit = [a / b for a, b in zip(mine, theirs, strict=True)], "x"
        else:
            differences, unit = [a - b for a, b in zip(mine, theirs, strict=True)], " ms"
        low, high = interval(differences)
        sign = "" if unit == "x" else "+"
        rows.append(
            [
                WORDS[metric],
                titles[one],
                titles[other],
                number(statistics.median(mine)),
                number(statistics.median(theirs)),
                f"{statistics.median(differences):{sign}.2f}{unit}",
                f"{low:{sign}.2f} to {high:{sign}.2f}",
                str(len(rounds)),
            ]
        )
    streams = [
        [titles[name], f"{min(values.values()):.0f} %"]
        for name in STEPS["complete@300"]
        if (values := bench.samples[name]["complete@300"])
    ]
    skipped = "".join(f"\n- {name} was skipped: {reason}" for name, reason in bench.skipped.items())
    versions = "\n".join(
        f"- {contender.title}: {contender.version}" for contender in bench.contenders.values() if contender.version
    )
    return (
        f"\n\n{table(['', 'A', 'B', 'A: median', 'B: median', 'A beside B', 'with 95 % certainty', 'rounds'], rows, text=3)}\n\n"
        f"{table(['300 streams at once: the fewest that completed in a round', ''], streams)}\n\n{versions}{skipped}\n"
    )
