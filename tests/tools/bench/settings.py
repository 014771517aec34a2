"""`make profile SETTINGS=1`: what each setting adds to a call or takes off it. Writes settings.md. SETTINGS=gc: those with that word.

One gateway for each setting, and one as it ships, run side by side without doors, and take turns at short bursts of calls to a near
vendor over plain HTTP, as the egress door speaks it. What counts is the ratio to the one that ships in the same round.
"""

import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from support.gateway import START, copy_project
from support.table import table

from . import peers
from .load import result, wrk
from .paired import interval
from .upstream import Upstream

ROUNDS, SECONDS, CALLERS = 10, 2, 8
CLOSED = "http://127.0.0.1:9"
NAMED = "127.0.0.1,api.openai.com,generativelanguage.googleapis.com,api.anthropic.com"
PYTHONS = ("3.13",)  # beside the project's own
OF_THE_COMMAND = ("deploy/start/__main__.py", "from llama_stack.cli.llama import main")


@dataclass(frozen=True, eq=False)
class Setting:
    """Something to set: variables of the server beside those that the start sets, and `edits` of the shipped files."""

    title: str
    variables: dict[str, str] = field(default_factory=dict)
    edits: tuple[tuple[str, str, str], ...] = ()  # file, old, new
    python: str = ""


def thresholds(*values: int, python: str = "") -> Setting:
    """Those of Python's garbage collector, set as the last thing before the server's own code."""
    code = f"import gc; gc.set_threshold({', '.join(map(str, values))}); {OF_THE_COMMAND[1]}"
    title = f"`gc.set_threshold{values}`" + f", Python {python}" * bool(python)
    return Setting(title, edits=((*OF_THE_COMMAND, code),), python=python)


SHIPPED = Setting("as it ships")
SHIPPED_ON = {python: Setting(f"as it ships, Python {python} (gc)", python=python) for python in PYTHONS}
SETTINGS = (
    Setting("as it ships, once more (what differs here is noise; gc)"),
    thresholds(700, 10, 10),  # Python 3.12's own
    thresholds(10_000, 20, 20),
    thresholds(50_000, 50, 100),
    *SHIPPED_ON.values(),
    *(
        thresholds(*values, python=python)
        for python in PYTHONS
        for values in ((2_000, 10, 10), (10_000, 20, 20), (50_000, 50, 100))
    ),
    Setting("chats in the server's own table, kept", edits=(("run.yaml", "backend: sql_nowhere", "backend: sql_default"),)),
    Setting("`OTEL_SDK_DISABLED=true`", {"OTEL_SDK_DISABLED": "true"}),
    Setting("`PYTHONOPTIMIZE=1`", {"PYTHONOPTIMIZE": "1"}),
    Setting("`MALLOC_ARENA_MAX=1`", {"MALLOC_ARENA_MAX": "1"}),
    Setting("`SSL_CERT_DIR`: an empty folder", {"SSL_CERT_DIR": "/nonexistent"}),
    Setting("no `CORS` block", edits=(("run.yaml", "  cors:\n", "  x-cors:\n"),)),
    Setting(
        "proxies: HTTP_PROXY, HTTPS_PROXY and ALL_PROXY at a closed port",
        dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), CLOSED) | {"NO_PROXY": NAMED},
    ),
)


def base(setting: Setting) -> Setting:
    """What a setting is compared with: what ships, on the same Python."""
    return SHIPPED_ON.get(setting.python, SHIPPED) if setting.edits or setting.variables else SHIPPED


def gateway(setting: Setting, up: Upstream, home: Path) -> peers.Server:
    """A gateway with `setting`, not yet started. Raises Skipped if the shipped files no longer have what it edits."""
    project = copy_project(home / "project")
    # As the last thing that the start does, so that nothing in it undoes them.
    last = "return without_proxies(environ) | proxies(settings, vendors, environ)"
    variables = ("deploy/start/environment.py", last, f"{last} | {setting.variables}")
    for name, old, new in (*setting.edits, variables):
        text = (project / name).read_text()
        if old not in text:
            raise peers.Skipped(f"{name} no longer has {old.strip()}")
        (project / name).write_text(text.replace(old, new))
    python = peers.own_environment(setting.python) / "bin/python"
    return peers.Server(
        home,
        (python, *START[1:]),
        cwd=project,
        FRONT="0",
        EGRESS="0",
        SSL_CERT_DIR=str(up.hashed),
        SQLITE_STORE_DIR=str(home / "store"),
        **dict.fromkeys(peers.vendor_urls(up), f"{up.plain}/near"),
    )


def measure(settings: list[Setting], rounds: int = ROUNDS, seconds: int = SECONDS) -> list[list[str]]:
    """Run them all beside what ships. Returns the rows of the table."""
    skipped: dict[Setting, str] = {}
    seen: dict[Setting, dict[int, dict[str, float]]] = defaultdict(dict)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        up = stack.enter_context(Upstream(Path(folder)))
        servers: dict[Setting, peers.Server] = {}
        try:
            for number, setting in enumerate((SHIPPED, *settings)):
                print(f"starting a gateway: {setting.title}", flush=True)
                try:
                    servers[setting] = stack.enter_context(gateway(setting, up, Path(folder) / str(number)))
                except (peers.Skipped, RuntimeError) as reason:
                    skipped[setting] = str(reason).splitlines()[-1]
            for round_ in range(rounds + 1):
                print(f"round {round_} of {rounds}" if round_ else "warming up", flush=True)
                for setting in random.sample(list(servers), len(servers)):
                    server = servers[setting]
                    before = server.cpu()
                    found = result(wrk(peers.provider_data_calls(server)["near"], CALLERS, seconds, Path(folder)))
                    server.idle()
                    if not found["served"] or found["errors"] or found["broken"]:
                        skipped[setting] = f"{found['errors'] + found['broken']:.0f} of {found['requests']:.0f} calls failed"
                    elif round_:
                        cpu = (server.cpu() - before) / found["requests"] * 1e3
                        memory = server.resident() / 1e6
                        seen[setting][round_] = {"rps": found["per_second"], "cpu": cpu, "p99": found["p99"], "memory": memory}
        finally:
            peers.deaf()
    return [row(setting, seen[setting], seen[base(setting)], skipped.get(setting, "")) for setting in (SHIPPED, *settings)]


def row(setting: Setting, mine: dict[int, dict[str, float]], others: dict[int, dict[str, float]], skipped: str) -> list[str]:
    """A setting's row: medians, and the median of the ratios to what it is compared with."""
    rounds = sorted(mine.keys() & others.keys())
    if skipped or not rounds:
        return [setting.title, *["-"] * 5, f"not possible: {skipped[:90]}"]
    middle = {metric: statistics.median(mine[round_][metric] for round_ in rounds) for metric in mine[rounds[0]]}
    ratios = {
        metric: [mine[round_][metric] / others[round_][metric] for round_ in rounds if others[round_][metric]]
        for metric in middle
    }
    return [
        setting.title,
        f"{middle['rps']:.0f}",
        f"{middle['cpu']:.2f}",
        f"{middle['p99']:.0f}",
        f"{middle['memory']:.0f}",
        *(
            "{:.3f} ({:.2f} to {:.2f})".format(statistics.median(values), *interval(values))
            for values in (ratios["rps"], ratios["cpu"])
        ),
    ]


def main() -> None:
    """Measure, print, and write settings.md if all were measured. The first argument is a word in the titles of those to measure."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    rounds, seconds = int(os.environ.get("ROUNDS") or ROUNDS), int(os.environ.get("SECONDS") or SECONDS)
    settings = [setting for setting in SETTINGS if word in setting.title]
    if not settings:
        sys.exit(f"No setting has {word!r} in its title.")
    rows = measure(settings, rounds, seconds)
    head = ["set", "requests/s", "ms CPU", "ms p99", "MB", "requests/s, ratio", "CPU, ratio"]
    text = (
        f"# What settings cost\n\nWritten by `make profile SETTINGS=1`: regular calls, one worker without doors, {CALLERS} callers, the "
        f"vendor near and spoken to over plain HTTP. Medians of {rounds} rounds of {seconds} s; the largest process's memory; the median "
        f"of the ratios to what ships (on the same Python) in the same round, in brackets where that lies with 95 % certainty.\n\n"
        f"{table(head, rows)}\n"
    )
    if not word and rounds >= ROUNDS:
        Path(__file__).with_suffix(".md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    peers.run_tool("profile SETTINGS=1", main)
