"""`make profile`: where the server's time goes in regular calls, in wrong keys and in streams. Writes profile.md.

py-spy (installed into `.bench/`) samples one worker while wrk, or 50 streams, keep it busy. Samples are of the thread that
holds Python's lock, or runs native code without it; each counts for the first line of `PARTS` that its stack matches.
"""

import contextlib
import re
import subprocess
import tempfile
import threading
from pathlib import Path

from support.table import table

from . import peers
from .load import Call, result, stream, wrk
from .upstream import Upstream

SECONDS = 10
PARTS = {
    "printing a traceback of the error": r"print_exception|traceback\.py",
    "writing the log line of the call": r"structlog|logging/__init__|uvicorn/logging",
    "inserting the chat, which nothing keeps": r"store_chat_completion|sqlalchemy|aiosqlite",
    "building the client and its TLS context": r"_get_openai_client|create_ssl_context|load_verify_locations",
    "TCP and TLS to the vendor": r"start_tls|do_handshake|connect_tcp|sslproto|anyio/streams/tls",
    "checking and writing JSON (pydantic)": r"site-packages/pydantic|json/(en|de)coder",
    "the OpenAI SDK and httpx: request and answer": r"site-packages/(openai|httpx|httpcore)/",
    "everything else: FastAPI, middleware, event loop": r"",
}


def sample(server: peers.Server, call: Call, kind: str, folder: Path) -> list[tuple[str, int]]:
    """Stacks, outermost frame first, and how often each was seen while `call` was made over and over.

    Raises RuntimeError with py-spy's own words where it may not look into other processes.
    """
    out = folder / f"{kind}.txt"
    spy = peers.environment("py-spy", "py-spy") / "bin/py-spy"
    options = f"--gil --full-filenames --format raw --rate 250 --duration {SECONDS} --pid {server.server}"
    record = [spy, "record", *options.split(), "--output", out]
    if kind == "streams":
        load = threading.Thread(target=stream, args=(call, 50, int(SECONDS / 0.05) + 60, 50), daemon=True)
        load.start()
        done = subprocess.run(record, capture_output=True, text=True, check=False)
        load.join()
    else:
        load = wrk(call, 8, SECONDS + 2, folder)
        try:
            done = subprocess.run(record, capture_output=True, text=True, check=False)
            result(load)
        finally:
            load.kill()
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return [(stack, int(count)) for stack, _, count in (line.rpartition(" ") for line in out.read_text().splitlines())]


def shares(stacks: list[tuple[str, int]]) -> list[float]:
    """The share of samples, in percent, of each of `PARTS`."""
    found = dict.fromkeys(PARTS, 0)
    for stack, count in stacks:
        found[next(part for part, pattern in PARTS.items() if re.search(pattern, stack))] += count
    return [100 * count / sum(found.values()) for count in found.values()]


def main() -> None:
    """Sample, print the table, and keep it beside the results of the bench."""
    kinds = {"regular calls": "near", "wrong keys": "wrong", "streams": "paced"}
    columns: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        up = stack.enter_context(Upstream(folder))
        try:
            for start, name in {"both doors": "both-1", "no doors": "neither"}.items():
                contender = peers.MAKERS[name](up, folder / name)
                with contender.server as server:
                    for kind, call in kinds.items():
                        print(f"sampling {contender.title}: {kind}", flush=True)
                        columns[f"{kind}, {start}"] = shares(sample(server, contender.calls[call], kind, folder))
        finally:
            peers.deaf()
    order = sorted(columns, key=lambda title: list(kinds).index(title.partition(",")[0]))
    rows = [[part, *(f"{columns[title][i]:.0f} %" for title in order)] for i, part in enumerate(PARTS)]
    text = (
        f"`make profile`: one worker, 8 callers or 50 streams, the vendor near, {contender.version}, share of the server's Python "
        f"time.\n\n{table(['', *order], rows)}\n"
    )
    (Path(__file__).parent / "profile.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    peers.run_tool("profile", main)
