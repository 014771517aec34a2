"""`make profile`: where the server's time goes in regular calls, in wrong keys and in streams. Writes profile.md.

py-spy (installed into `.bench/`) samples one worker while wrk, or 50 streams, keep it busy. Samples are of the thread that
holds Python's lock, or runs native code without it; each counts for the first line of `PARTS` that its stack matches.
"""

import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from . import peers
from .load import Call, result, stream, wrk
from .upstream import Upstream

SECONDS = 10
PARTS = {
    "printing a traceback of the error": r"print_exception|traceback\.py",
    "writing the log line of the call": r"structlog|logging/__init__|uvicorn/logging",
    "inserting the chat into the view": r"store_chat_completion|sqlalchemy|aiosqlite",
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
    record = [
        spy,
        "record",
        "--gil",
        "--full-filenames",
        "-d",
        str(SECONDS),
        "-r",
        "250",
        "-f",
        "raw",
        "-o",
        out,
        "-p",
        str(server.server),
    ]
    if kind == "streams":
        load = threading.Thread(target=stream, args=(call, 50, int(SECONDS / 0.05) + 60, 50))
        load.start()
        done = subprocess.run(record, capture_output=True, text=True, check=False)
        load.join()
    else:
        load = wrk(call, 8, SECONDS + 2, folder)
        done = subprocess.run(record, capture_output=True, text=True, check=False)
        result(load)
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
    peers.prepare("profile")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, Upstream(Path(folder)) as up:
        contender = peers.ours(up, Path(folder) / "ours", 1)
        kinds = {"regular calls": "near", "wrong keys": "wrong", "streams": "paced"}
        with contender.server as server:
            columns = [shares(sample(server, contender.calls[call], kind, Path(folder))) for kind, call in kinds.items()]
    lines = [f"| {part} | {' | '.join(f'{column[i]:.0f} %' for column in columns)} |" for i, part in enumerate(PARTS)]
    head = f"`make profile`: one worker, 8 callers or 50 streams, {contender.version}, share of the server's Python time.\n\n"
    table = f"| | {' | '.join(kinds)} |\n|---|{'---:|' * len(kinds)}\n" + "\n".join(lines) + "\n"
    (Path(__file__).parent / "profile.md").write_text(head + table)
    print(head + table)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, peers.Skipped) as error:
        sys.exit(f"The profile was not taken: {error}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")
