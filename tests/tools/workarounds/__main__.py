"""`make workarounds`: undo what this project does about the stock server, one thing at a time, and measure what happens then.

make workarounds                                 all of them, written to tests/tools/workarounds/results.md
make workarounds ONLY="kept_chats console_logs"  these two alone, which writes no file
"""

import importlib.metadata
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from support.gateway import PROJECT
from support.table import table
from support.vendors import Vendors

from . import Bench, Row, Skipped, access, around, kept, models, packages, slow

TABLE = PROJECT / "tests" / "tools" / "workarounds" / "results.md"

TRAPS: list[Callable[[Bench], Row]] = [
    kept.kept_chats,
    kept.kept_responses,
    kept.memory_store,
    kept.by_hand,
    kept.log_level,
    kept.log_filter,
    access.other_routes,
    access.every_interface,
    access.server_organization,
    access.keyless_calls,
    access.rebound_names,
    slow.console_logs,
    slow.hashed_cas,
    slow.imported_command,
    slow.one_attempt,
    models.old_models,
    packages.newest_mcp,
    packages.newest_openai,
    packages.unused_packages,
    packages.endless_headers,
    around.gemini_embeddings,
    around.silent_close,
    around.list_header,
]


def report(rows: list[Row]) -> str:
    """The rows as a Markdown table, under a line that says what was measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("llama-stack", "openai", "mcp", "httpx"))
    measured = f"Measured by `make workarounds` on {os.cpu_count()} cores with {versions} and Python {platform.python_version()}."
    header = ("What the configuration does", "Without it", "Measured without", "Measured with")
    return f"{measured}\n\n{table(header, rows, text=4)}\n"


def main(names: list[str]) -> int:
    """Measure the traps of these names, or all of them, and then write the table. Returns the exit code."""
    traps = [trap for trap in TRAPS if not names or trap.__name__ in names]
    if unknown := set(names) - {trap.__name__ for trap in TRAPS}:
        known = ", ".join(trap.__name__ for trap in TRAPS)
        print(f"There is no trap {' or '.join(sorted(unknown))}. There are {known}.", file=sys.stderr)
        return 1
    rows, skipped = [], []
    print(f"Measuring {len(traps)} traps of the stock server, with stand-ins for the vendors ...", flush=True)
    with tempfile.TemporaryDirectory() as folder, Vendors() as vendors:
        bench = Bench(vendors, Path(folder))
        with bench.shipped:
            for trap in traps:
                start = time.monotonic()
                try:
                    row = trap(bench)
                except Skipped as reason:
                    print(f"{trap.__name__}: skipped. {reason}", flush=True)
                    skipped.append(trap)
                    continue
                rows.append(row)
                took = time.monotonic() - start
                print(f"{trap.__name__} ({took:.0f} s)\n  without: {row.without}\n  with:    {row.measured}", flush=True)
    if names or skipped:
        print(f"\n{report(rows)}\n{TABLE.name} stays as it was, because not every trap was measured.")
    else:
        TABLE.write_text(report(rows))
        print(f"\nThe table is in tests/{TABLE.name}.")
    return 0


if __name__ == "__main__":
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
