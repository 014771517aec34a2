"""From results.json to what people read: the claims, the tables, the picture, and the README's part of them."""

import math
from pathlib import Path
from xml.sax.saxutils import escape

from world.table import table

README = Path(__file__).parent.parent.parent / "README.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


def number(value: float) -> str:
    """A number with the digits that mean something: 0.31, 4.2, 87, 1,403."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 20 else f"{value:.1f}" if abs(value) >= 2 else f"{value:.2f}"


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
        middle, low, high = map(number, self.values(name, metric) or [math.nan] * 3)
        return middle if low == high else f"{middle} ({low} to {high})"

    def added(self, name: str, metric: str) -> float:
        """What a contender adds to the vendor's own figure."""
        return self.get(name, metric) - self.get("direct", metric)

    def ratio(self, metric: str, name: str, other: str) -> float:
        """How many times `other`'s figure `name`'s is."""
        return self.get(name, metric) / self.get(other, metric)


def claims(r: Results) -> list[tuple[str, str, bool]]:
    """What this project claims, what was measured, and whether it holds. Claims about who was absent are left out."""
    lite = {
        f"{plural(workers, 'worker')}, {plural(callers, 'caller')}": r.ratio(
            f"rps@{callers}", f"ours-{workers}", f"litellm-{workers}"
        )
        for workers in (1, 2)
        for callers in (1, 8, 64)
    }
    lite = {where: value for where, value in lite.items() if not math.isnan(value)} or {"": math.nan}
    where = min(lite, key=lite.__getitem__)
    flat = (r.get("ours-1", "memory_after") / r.get("ours-1", "memory_10k") - 1) * 100
    opened = max(r.get("egress", f"far_opened@{callers}") for callers in (1, 8, 64))
    figures: list[tuple[str, float, str, bool]] = []

    def claim(text: str, value: float, unit: str, holds: bool) -> None:
        if not math.isnan(value):
            figures.append((text, value, unit, holds))

    claim(f"at least 2x LiteLLM's requests/s at equal workers (least: {where})", lite[where], "x", lite[where] >= 2)
    value = r.ratio("rps@8", "ours-1", "bare")
    claim("at least 5x the requests/s of the same run.yaml started bare (8 callers)", value, "x", value >= 5)
    value = r.get("ours-1", "error_cost")
    claim("an error costs at most 2 successes", value, "x", value <= 2)
    value = r.get("ours-1", "storm_worst")
    claim("no good call waits over 2 s while wrong keys pour in", value, " s", value <= 2)
    value = r.ratio("rps@64", "ours-2", "ours-1")
    claim("2 workers serve at least 1.7x of 1 (64 callers)", value, "x", value >= 1.7)
    value = r.added("ours-1", "chunk@50")
    claim("at most 2 ms added to a chunk (50 streams)", value, " ms", value <= 2)
    value = r.get("ours-1", "complete@300")
    claim("300 streams at a time all complete", value, " %", value == 100)
    claim("memory is flat: at most 5 % more after 20,000 requests than after 10,000", flat, " %", flat <= 5)
    value = r.added("egress", "far_p50@1")
    claim("vendor 40 ms away, egress on: at most 10 ms over a warm direct call", value, " ms", value <= 10)
    claim("vendor 40 ms away, egress on: fewer than 5 new connections per 1,000 calls", opened, "", opened < 5)
    return [(text, number(value) + unit, holds) for text, value, unit, holds in figures]


def by_contender(r: Results, columns: dict[str, str]) -> str:
    """A table with a row for each contender and a column for each metric: medians with their spread."""
    names = [name for name in r.contenders if any(r.values(name, metric) for metric in columns.values())]
    rows = [[r.contenders[name]["title"], *(r.spread(name, metric) for metric in columns.values())] for name in names]
    return table(["", *columns], rows)


def results_md(r: Results) -> str:
    """The whole result, for the terminal and for results.md."""
    raw = r.raw
    callers = {plural(count, "caller"): count for count in (1, 8, 64)}
    streams = {plural(count, "stream"): count for count in (1, 50, 300)}
    held = [[text, measured, "yes" if holds else "NO"] for text, measured, holds in claims(r)]
    sections = {
        "Claims": table(["", "measured", "met"], held),
        "Regular calls: requests/s": by_contender(r, {text: f"rps@{count}" for text, count in callers.items()}),
        "Regular calls: latency in ms": by_contender(
            r, {f"{text}, {key}": f"{key}@{count}" for text, count in callers.items() for key in ("p50", "p99")}
        ),
        "Streams, a chunk every 50 ms: ms to the first chunk": by_contender(
            r, {text: f"ttft@{count}" for text, count in streams.items()}
        ),
        "Streams, a chunk every 50 ms: ms that a chunk travels": by_contender(
            r,
            {
                f"{text}, {title}": f"{key}@{count}"
                for text, count in streams.items()
                for title, key in (("p50", "chunk"), ("p99", "chunk99"))
            },
        ),
        "Streams: % that complete, and most chunks/s (50 streams)": by_contender(
            r, {**{text: f"complete@{count}" for text, count in streams.items()}, "chunks/s": "chunks_per_second"}
        ),
        "Wrong keys from 8 callers": by_contender(
            r,
            {
                "errors/s": "error_rps",
                "successes that an error costs": "error_cost",
                "worst good call meanwhile, s": "storm_worst",
                "good calls in 4 s": "storm_calls",
            },
        ),
        "A vendor 40 ms away: latency in ms": by_contender(
            r, {f"{text}, {key}": f"far_{key}@{count}" for text, count in callers.items() for key in ("p50", "p99")}
        ),
        "A vendor 40 ms away: ms to the first chunk, and new connections per 1,000 calls": by_contender(
            r,
            {
                f"{text}, {title}": f"far_{key}@{count}"
                for text, count in callers.items()
                for title, key in (("first", "ttft"), ("new", "opened"))
            },
        ),
        "Memory in MB (PSS of all processes), boot in s, installed size in MB": by_contender(
            r,
            {
                "at rest": "memory_rest",
                "after 10,000": "memory_10k",
                "in the end": "memory_after",
                "requests by then": "served",
                "boot": "boot",
                "installed": "size",
            },
        ),
        "Versions": "\n".join(
            [f"- {c['title']}: {c['version']}" for c in r.contenders.values() if c["version"]]
            + [f"- {name} was skipped: {reason}" for name, reason in r.skipped.items()]
        ),
    }
    about = (
        f"{raw['machine']['cores']} cores, {raw['machine']['system']} {raw['machine']['arch']}, Python {raw['python']}. "
        f"{plural(raw['rounds'], 'round')}, {raw['seconds']} s a step, everything on one machine, the vendor over TLS. Medians "
        "of the rounds, with the lowest and the highest. Latencies are whole: less the vendor's own, they are what a gateway adds."
    )
    return f"# make bench, {raw['date']}\n\n{about}\n" + "".join(f"\n## {title}\n\n{text}\n" for title, text in sections.items())


# What the picture shows, and of whom.
CHARTS = {
    "requests/s, 8 callers": "rps@8",
    "ms that a call takes, 8 callers": "p50@8",
    "ms that a chunk travels, 50 streams": "chunk@50",
    "s that the worst good call waits while wrong keys pour in": "storm_worst",
}
BARS = ("ours-1", "ours-2", "bare", "ogx", "litellm-1", "litellm-2", "portkey")


def svg(r: Results) -> str:
    """Four small bar charts, in one grey and one blue that are legible on GitHub's white and on its dark background."""
    names = [name for name in BARS if name in r.contenders]
    row, label, width = 22, 190, 400
    height = 48 + row * len(names)
    marks = []
    for index, (title, metric) in enumerate(CHARTS.items()):
        left, top = index % 2 * (width + 30), index // 2 * height
        marks.append(f'<text x="{left}" y="{top + 18}" font-weight="600">{escape(title)}</text>')
        known = [value for name in names if not math.isnan(value := r.get(name, metric))]
        for line, name in enumerate(names):
            value, y = r.get(name, metric), top + 34 + line * row
            bar = 0 if math.isnan(value) else max(1.0, value / (max(known) or 1) * (width - label - 55))
            colour = "#2f81f7" if name.startswith("ours") else "#8b949e"
            title = escape(r.contenders[name]["title"])
            marks.append(
                f'<text x="{left + label - 8}" y="{y + 11}" text-anchor="end">{title}</text>'
                f'<rect x="{left + label}" y="{y}" width="{bar:.1f}" height="14" rx="2" fill="{colour}"/>'
                f'<text x="{left + label + bar + 6:.1f}" y="{y + 11}">{number(value)}</text>'
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
    """The README's part: a row for each gateway, ratios first, and which claims were not met."""
    r = Results(results)
    rows = [
        [
            contender["title"],
            number(r.ratio("rps@8", name, "ours-1")) + "x",
            number(r.get(name, "rps@8")),
            number(r.added(name, "p50@8")),
            number(r.added(name, "chunk@50")),
            number(r.get(name, "storm_worst")),
            number(r.get(name, "memory_after")),
            number(r.get(name, "size")),
            contender["version"],
        ]
        for name, contender in r.contenders.items()
        if name in BARS
    ]
    head = ["", "speed", "requests/s", "ms added", "ms a chunk", "s in a storm", "MB memory", "MB disk", "version"]
    missed = [f"{text}: {measured}" for text, measured, holds in claims(r) if not holds]
    return f"{table(head, rows)}\n\n" + (f"Not met: {'; '.join(missed)}." if missed else "Every claim of the benchmark was met.")


def files(results: dict) -> dict[str, str]:
    """What is made from results.json and kept beside it, by file name."""
    r = Results(results)
    return {"results.md": results_md(r), "bench.svg": svg(r)}


def update_readme(results: dict) -> None:
    """Replace what stands between the markers in the README, if it has them."""
    text = README.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if end:
        README.write_text(f"{before}{begin}\n{readme(results)}\n{end}{after}")
