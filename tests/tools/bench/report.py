"""From results.json to what people read: the tables, the picture, and the README's part of them."""

import math
from pathlib import Path
from xml.sax.saxutils import escape

from support.table import table

TESTS = Path(__file__).parent.parent.parent
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"

CALLERS = (1, 8, 64)
FAR_CALLERS = (1, 8)
STREAMS = (50, 300)
PATIENCE = 20  # seconds that a caller waits for an answer while wrong keys pour in


def readme_file() -> Path | None:
    """The document with the markers between which the README's part of the results belongs, if there is one."""
    files = [file for file in (TESTS / "README.md", TESTS.parent / "README.md") if file.exists()]
    return next((file for file in files if BEGIN in file.read_text()), None)


def number(value: float) -> str:
    """A number with the digits that mean something: 0.31, 4.2, 87, 1,403."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.1f}" if abs(value) >= 2 else f"{value:.2f}"


def shown(metric: str, value: float) -> str:
    """A figure as the tables have it: one that reached the end of the caller's patience is longer by nobody knows how much."""
    return f"over {PATIENCE}" if metric == "storm_worst" and value >= PATIENCE else number(value)


def plural(count: int, noun: str) -> str:
    """`1 worker`, `2 workers`."""
    return f"{count} {noun}{'s' * (count != 1)}"


class Results:
    """Reads results.json. A figure that is not there is NaN."""

    def __init__(self, results: dict) -> None:
        self.raw, self.contenders, self.skipped = results, results["contenders"], results["skipped"]

    def values(self, name: str, metric: str) -> list[float]:
        """The median, lowest and highest of a metric, or nothing."""
        return self.contenders.get(name, {}).get("metrics", {}).get(metric, [])

    def get(self, name: str, metric: str) -> float:
        """The median of a metric."""
        return (self.values(name, metric) or [math.nan])[0]

    def spread(self, name: str, metric: str) -> str:
        """The median of a metric with its lowest and highest: `231 (225 to 236)`."""
        middle, low, high = (shown(metric, value) for value in self.values(name, metric) or [math.nan] * 3)
        return middle if low == high else f"{middle} ({low} to {high})"

    def added(self, name: str, metric: str) -> float:
        """What a contender adds to the vendor's own figure."""
        return self.get(name, metric) - self.get("direct", metric)

    def ratio(self, metric: str, name: str, other: str) -> float:
        """How many times `other`'s figure `name`'s is."""
        return self.get(name, metric) / (self.get(other, metric) or math.nan)


def by_contender(r: Results, columns: dict[str, str]) -> str:
    """A table with a row for each contender and a column for each metric: medians with their spread. Nothing if none has any."""
    names = [name for name in r.contenders if any(r.values(name, metric) for metric in columns.values())]
    rows = [[r.contenders[name]["title"], *(r.spread(name, metric) for metric in columns.values())] for name in names]
    return table(["", *columns], rows) if rows else ""


READ_THIS = """\
- Everything is on one machine: callers, gateways, and the vendor, which all gateways reach over TLS. Only requests/s that were
  served count; latencies are whole, and left out where calls failed.
- LiteLLM checks a master key at each call. The other gateways run open, but for the row with tokens, which checks a signed token
  of an identity provider.
- CPU time and memory are those of all processes that the start command leaves running. For `make server` these are the start, its
  watchdog and HAProxy beside the server; peers are started directly.
- The previous start is that of commit 4155940, with its egress proxy.
- A chunk's time is from the vendor's sending it to the caller's reading it. Without a gateway the caller reads plain HTTP, as
  gateways hand it on, and pays for no TLS.
- Streams are out of step with each other. The same run.yaml started bare leaves out 64 callers and 300 streams, which take it
  half a minute to get over.
- Contenders are measured once what came before has been worked off. One that takes over 10 s for that is started anew."""


def heading(title: str, about: dict) -> str:
    """The first lines of a file of figures: what was measured, where, and how to read it."""
    seed = f", SEED={about['seed']}" if "seed" in about else ""
    return (
        f"# {title}, {about['date']}\n\n{about['machine']['cores']} cores, {about['machine']['system']} {about['machine']['arch']}, "
        f"Python {about['python']}. {plural(about['rounds'], 'round')}, {about['seconds']} s a step{seed}, {about['minutes']:.0f} minutes."
    )


def results_md(r: Results) -> str:
    """The whole result, for the terminal and for results.md."""
    callers = {plural(count, "caller"): count for count in CALLERS}
    far_callers = {plural(count, "caller"): count for count in FAR_CALLERS}
    streams = {plural(count, "stream"): count for count in STREAMS}
    sections = {
        "Regular calls: requests/s": by_contender(r, {text: f"rps@{count}" for text, count in callers.items()}),
        "Regular calls: ms of CPU time a call": by_contender(r, {text: f"cpu@{count}" for text, count in callers.items()}),
        "Regular calls: latency in ms": by_contender(
            r, {f"{text}, {key}": f"{key}@{count}" for text, count in callers.items() for key in ("p50", "p99")}
        ),
        "Regular calls that failed, of a step": by_contender(r, {text: f"failed@{count}" for text, count in callers.items()}),
        "Streams, a chunk every 50 ms: ms to the first chunk, and % that complete": by_contender(
            r,
            {f"{text}, {key}": f"{metric}@{count}" for text, count in streams.items() for key, metric in FIRST.items()},
        ),
        "Streams, a chunk every 50 ms: ms that a chunk travels": by_contender(
            r, {f"{text}, {key}": f"{metric}@{count}" for text, count in streams.items() for key, metric in CHUNK.items()}
        ),
        "Wrong keys from 8 callers": by_contender(
            r,
            {
                "errors/s": "error_rps",
                "successes that an error costs": "error_cost",
                "worst good call meanwhile, s": "storm_worst",
                "good calls in 4 s": "storm_calls",
                "that failed": "storm_failed",
            },
        ),
        "A vendor 40 ms away: latency in ms": by_contender(
            r, {f"{text}, {key}": f"far_{key}@{count}" for text, count in far_callers.items() for key in ("p50", "p99")}
        ),
        "A vendor 40 ms away: ms to the first chunk, and new connections per 1,000 calls": by_contender(
            r, {f"{text}, {key}": f"far_{metric}@{count}" for text, count in far_callers.items() for key, metric in FAR.items()}
        ),
        "Memory in MB (PSS of all processes), boot in s, installed size in MB": by_contender(
            r,
            {
                "at rest": "memory_rest",
                "in the end": "memory_after",
                "requests by then": "served",
                "boot": "boot",
                "installed": "size",
                "starts anew": "restarts",
                "breakdowns": "broke_down",
            },
        ),
        "Versions": "\n".join(
            [f"- {c['title']}: {c['version']}" for c in r.contenders.values() if c["version"]]
            + [f"- {name} was skipped: {reason}" for name, reason in r.skipped.items()]
        ),
    }
    about = f"{heading('make bench', r.raw)} Medians of the rounds, with the lowest and the highest.\n\n{READ_THIS}\n"
    return about + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items() if text)


FIRST = {"first": "ttft", "complete": "complete"}
CHUNK = {"p50": "chunk", "p99": "chunk99"}
FAR = {"first": "ttft", "new": "opened"}

# What the picture shows, and of whom.
CHARTS = {
    "requests/s, 8 callers": "rps@8",
    "ms that a call takes, 8 callers": "p50@8",
    "ms that a chunk travels, 50 streams": "chunk@50",
    "s that the worst good call waits while wrong keys pour in": "storm_worst",
}


def compared(r: Results) -> list[str]:
    """Every gateway, in the order in which they were started."""
    return [name for name in r.contenders if name != "direct"]


def svg(r: Results) -> str:
    """Four small bar charts, in one grey and one blue that are legible on GitHub's white and on its dark background."""
    names = compared(r)
    row, label, width = 22, 250, 460
    height = 48 + row * len(names)
    marks = []
    for index, (title, metric) in enumerate(CHARTS.items()):
        left, top = index % 2 * (width + 30), index // 2 * height
        marks.append(f'<text x="{left}" y="{top + 18}" font-weight="600">{escape(title)}</text>')
        known = [value for name in names if not math.isnan(value := r.get(name, metric))]
        for line, name in enumerate(names):
            value, y = r.get(name, metric), top + 34 + line * row
            bar = 0 if math.isnan(value) else max(1.0, value / (max(known) or 1) * (width - label - 55))
            colour = "#2f81f7" if r.contenders[name]["title"].startswith("make server") else "#8b949e"
            title = escape(r.contenders[name]["title"])
            marks.append(
                f'<text x="{left + label - 8}" y="{y + 11}" text-anchor="end">{title}</text>'
                f'<rect x="{left + label}" y="{y}" width="{bar:.1f}" height="14" rx="2" fill="{colour}"/>'
                f'<text x="{left + label + bar + 6:.1f}" y="{y + 11}">{shown(metric, value)}</text>'
            )
    versions = ", ".join(dict.fromkeys(c["version"] for c in r.contenders.values() if c["version"]))
    foot = f"{versions}; {r.raw['machine']['cores']} cores shared by callers, gateway and vendor; {r.raw['date']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * width + 30} {2 * height + 22}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#768390">\n<title>{escape("; ".join(CHARTS))}</title>\n'
        + "\n".join(marks)
        + f'\n<text x="0" y="{2 * height + 14}" font-size="11">{escape(foot)}</text>\n</svg>\n'
    )


def readme(results: dict) -> str:
    """The README's part: a row for each gateway, ratios first."""
    r = Results(results)
    rows = [
        [
            r.contenders[name]["title"],
            number(r.ratio("rps@8", name, "litellm-1")) + "x",
            number(r.get(name, "rps@8")),
            number(r.get(name, "cpu@8")),
            number(r.added(name, "p50@8")),
            number(r.added(name, "chunk@50")),
            shown("storm_worst", r.get(name, "storm_worst")),
            number(r.get(name, "memory_after")),
            number(r.get(name, "size")),
            r.contenders[name]["version"],
        ]
        for name in compared(r)
    ]
    head = ["", "of LiteLLM", "requests/s", "ms CPU", "ms added", "ms a chunk", "s in a storm", "MB memory", "MB disk", "version"]
    return table(head, rows)


def files(results: dict) -> dict[str, str]:
    """What is made from results.json and kept beside it, by file name."""
    r = Results(results)
    return {"results.md": results_md(r), "bench.svg": svg(r)}


def update_readme(results: dict) -> None:
    """Replace what stands between the markers in the README, if it has them."""
    if file := readme_file():
        before, begin, rest = file.read_text().partition(BEGIN)
        _, end, after = rest.partition(END)
        if end:
            file.write_text(f"{before}{begin}\n{readme(results)}\n{end}{after}")
