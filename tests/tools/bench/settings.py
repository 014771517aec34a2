"""`make profile SETTINGS=1`: what each setting adds to a call or takes off it, as CPU time. Writes settings.md.

One gateway for each setting, and one as it ships, run side by side, and take turns at short bursts of calls to a near vendor over
plain HTTP, as the egress proxy speaks it. CPU time a call is steadier than requests/s. What else the machine does only ever adds
to it, so that the lower quartile of the rounds says more than their middle.
"""

import random
import shlex
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from support.gateway import PROJECT, START
from support.table import table

from . import peers
from .load import result, wrk
from .upstream import Upstream

ROUNDS, SECONDS, CALLERS = 12, 1, 8
CLOSED = "http://127.0.0.1:9"
NAMED = "127.0.0.1,api.openai.com,generativelanguage.googleapis.com,api.anthropic.com"


@dataclass(frozen=True, eq=False)
class Setting:
    """Something to set: variables that the server starts with, and `edits` of the shipped files (file, old, new)."""

    title: str
    variables: dict[str, str] = field(default_factory=dict)
    edits: tuple[tuple[str, str, str], ...] = ()
    python: str = ""


SHIPPED = Setting("as it ships")
SETTINGS = (
    Setting("as it ships, once more (what differs here is noise)"),
    Setting("chats in the server's own table, kept", edits=(("run.yaml", "backend: sql_nowhere", "backend: sql_default"),)),
    Setting("no log filter", edits=(("deploy/serve.sh", 'sed "$by_line" -E -f deploy/log.sed -f "$form"', "cat"),)),
    Setting("`OTEL_SDK_DISABLED=true`", {"OTEL_SDK_DISABLED": "true"}),
    Setting("Python 3.13", python="3.13"),
    Setting("`PYTHONOPTIMIZE=1`", {"PYTHONOPTIMIZE": "1"}),
    Setting("`MALLOC_ARENA_MAX=1`", {"MALLOC_ARENA_MAX": "1"}),
    Setting("`SSL_CERT_DIR`: an empty folder", {"SSL_CERT_DIR": "/nonexistent"}),
    Setting("no `CORS` block", edits=(("run.yaml", "  cors:\n", "  x-cors:\n"),)),
    Setting(
        "proxies: HTTP_PROXY, HTTPS_PROXY and ALL_PROXY at a closed port",
        dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), CLOSED) | {"NO_PROXY": NAMED},
    ),
    Setting("proxies: ALL_PROXY only", {"ALL_PROXY": CLOSED, "NO_PROXY": NAMED}),
)


def gateway(setting: Setting, up: Upstream, home: Path) -> peers.Server:
    """A gateway with `setting`, not yet started. Raises Skipped if the shipped files no longer have what it edits.

    The variables are set at the last moment, by a `python` of its own, so that nothing in deploy/serve.sh undoes them.
    """
    project, shim, python = home / "project", home / "bin", peers.own_environment(setting.python)
    shutil.copytree(PROJECT / "deploy", project / "deploy")
    shutil.copy(PROJECT / "run.yaml", project / "run.yaml")
    for name, old, new in setting.edits:
        text = (project / name).read_text()
        if old not in text:
            raise peers.Skipped(f"{name} no longer has {old.strip()}")
        (project / name).write_text(text.replace(old, new))
    shim.mkdir()
    unset = [
        f"-u {name}" for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "no_proxy") if "proxies" in setting.title
    ]
    variables = [shlex.quote(f"{name}={value}") for name, value in setting.variables.items() if name != "SQLITE_STORE_DIR"]
    (shim / "python").write_text(f'#!/bin/sh\nexec env {" ".join(unset + variables)} {python / "bin/python"} "$@"\n')
    (shim / "python").chmod(0o700)
    store = Path(tempfile.mkdtemp(dir=setting.variables.get("SQLITE_STORE_DIR", home)))
    return peers.Server(
        home,
        START,
        cwd=project,
        PATH=f"{shim}:{python / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        EGRESS="0",
        SSL_CERT_DIR=str(up.hashed),
        SQLITE_STORE_DIR=str(store),
        **dict.fromkeys(peers.vendor_urls(up), f"{up.plain}/near"),
    )


def measure(say: Callable[[str], None] = print) -> tuple[str, list[list[str]]]:
    """Run them all. Returns what was measured about the shipped files, in words, and the rows of the table."""
    skipped: dict[str, str] = {}
    costs: dict[Setting, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, ExitStack() as stack:
        up = stack.enter_context(Upstream(Path(folder)))
        servers: dict[Setting, peers.Server] = {}
        try:
            for number, setting in enumerate((SHIPPED, *SETTINGS)):
                say(f"starting a gateway: {setting.title}")
                try:
                    server = gateway(setting, up, Path(folder) / str(number))
                    stack.callback(shutil.rmtree, server.settings["SQLITE_STORE_DIR"], ignore_errors=True)
                    servers[setting] = stack.enter_context(server)
                except (peers.Skipped, RuntimeError) as reason:
                    skipped[setting.title] = str(reason)
            for number in range(ROUNDS + 1):
                say(f"round {number} of {ROUNDS}" if number else "warming up")
                for setting in random.sample(list(servers), len(servers)):
                    server = servers[setting]
                    before = server.cpu()
                    seen = result(wrk(peers.provider_data_calls(server)["near"], CALLERS, SECONDS, Path(folder)))
                    server.idle()
                    if not seen["served"] or seen["errors"] or seen["broken"]:
                        skipped[setting.title] = f"{seen['errors'] + seen['broken']:.0f} of {seen['requests']:.0f} calls failed"
                    elif number:
                        costs[setting].append((server.cpu() - before) / seen["requests"] * 1e3)
        finally:
            peers.deaf()
    quartiles = {setting: statistics.quantiles(values, n=4) for setting, values in costs.items()}
    shipped = quartiles[SHIPPED][0]
    rows = []
    for setting in SETTINGS:
        if setting.title in skipped:
            rows.append([setting.title, "-", f"not possible: {skipped[setting.title].splitlines()[-1][:90]}"])
            continue
        low, middle, _ = quartiles[setting]
        rows.append([setting.title, f"{low:.2f} ({middle:.2f})", f"{(low / shipped - 1) * 100:+.1f} %"])
    return "{:.2f} ({:.2f}) ms".format(*quartiles[SHIPPED]), rows


def main() -> None:
    """Measure, print, and write settings.md."""
    shipped, rows = measure()
    text = (
        f"# What settings cost\n\nWritten by `make profile SETTINGS=1`: CPU time of the whole gateway (server and log filter) a regular "
        f"call, one worker, {CALLERS} callers, the vendor near and spoken to over plain HTTP. As it ships: {shipped} a call. Lower "
        f"quartiles of {ROUNDS} rounds, and medians in brackets; the change is that of the lower quartile.\n\n"
        f"{table(['set', 'ms a call', 'change'], rows)}\n"
    )
    Path(__file__).with_suffix(".md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    peers.run_tool("profile SETTINGS=1", main)
