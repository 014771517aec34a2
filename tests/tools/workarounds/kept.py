"""What callers send is kept: chats and responses in a database or in memory, and what the log quotes."""

import contextlib
import sqlite3
import time

from support.calls import ALL_KEYS, MALFORMED, MODELS, SECRET
from support.gateway import BY_HAND, Gateway

from . import PROMPT, Bench, Edit, Row, ask_many, patient

LONG_PROMPT = PROMPT * 16  # 64 KB, so that keeping it shows beside what a process grows by anyway.


def readable(gateway: Gateway) -> int:
    """How many chats somebody without any key can read: none from a server that has no database, whose answer is an error."""
    time.sleep(1)  # The server inserts after it has answered.
    with patient(gateway) as client:
        return len(client.get("/v1/chat/completions", params={"limit": 10_000}).json().get("data", []))


def on_disk(gateway: Gateway) -> int:
    """Bytes of the databases that a gateway has made, once what is in their logs has been written to them."""
    for path in gateway.home.rglob("*.db"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return sum(path.stat().st_size for path in gateway.home.rglob("*.db*"))


def kept_chats(bench: Bench) -> Row:
    """Chats in the database, in the server's own table."""
    count = 200

    def measure(gateway: Gateway) -> str:
        readable(gateway)  # The first use makes the table, and chats that come meanwhile are lost.
        ask_many(gateway, count)
        return f"{readable(gateway)} of {count} chats readable by anyone, {on_disk(gateway) / count / 1000:.0f} KB a chat on disk"

    return bench.compare(
        "a store of chats that cannot be opened",
        "every chat is kept, and `GET /v1/chat/completions` hands it to any caller (4 KB prompts)",
        measure,
        Edit("run.yaml", "backend: sql_nowhere", "backend: sql_default"),
    )


def respond(gateway: Gateway, count: int) -> str:
    """Make calls of the Responses API, and say how many failed, and how many somebody without any key can read."""
    with patient(gateway) as client:
        client.get("/v1/responses")  # The first use makes the tables.
        body = {"model": MODELS[0], "input": PROMPT}
        failed = sum(client.post("/v1/responses", headers=ALL_KEYS, json=body).is_error for _ in range(count))
        time.sleep(1)
        read = len(client.get("/v1/responses", params={"limit": 100}).json().get("data", []))
    return f"{read} of {count} responses readable by anyone, {failed} failed"


def kept_responses(bench: Bench) -> Row:
    """The table of responses without its trigger."""
    return bench.compare(
        "a trigger that drops what is inserted into the server's table of responses",
        "every response is kept, and `GET /v1/responses` hands it to any caller",
        lambda gateway: respond(gateway, 50),
        Edit("deploy/keeps-nothing.sql", "= 'queued';\n  SELECT RAISE(IGNORE);\n", "= 'queued';\n"),
    )


def memory_store(bench: Bench) -> Row:
    """The chats' table in memory, which looks like the simpler way to keep nothing."""
    warm_up, count = 50, 150

    def measure(gateway: Gateway) -> str:
        readable(gateway)  # As above.
        ask_many(gateway, warm_up, prompt=LONG_PROMPT)
        before = gateway.resident()
        ask_many(gateway, count, prompt=LONG_PROMPT)
        grown = (gateway.resident() - before) / count / 1000
        alone = readable(gateway)
        failed = ask_many(gateway, count, callers=8)
        kept = readable(gateway) - alone
        return f"{grown:.0f} KB more memory a chat; at 8 callers {kept} of {count} chats kept, {failed} calls fail"

    return bench.compare(
        "that store, rather than `:memory:`",
        "chats are kept in memory, but for those that its one connection loses under concurrent callers (64 KB prompts)",
        measure,
        Edit("run.yaml", "nowhere?timeout=chats+are+not+kept", '":memory:"'),
    )


def by_hand(bench: Bench) -> Row:
    """A server that is started without deploy/start, in a folder that exists."""

    def measure(gateway: Gateway) -> str:
        store = gateway.home / "store"
        store.mkdir(parents=True)
        with gateway:
            return respond(gateway, 20)

    def server(*edits: Edit) -> Gateway:
        gateway = bench.gateway(*edits, command=BY_HAND, LLAMA_STACK_LOG_FORMAT="json")
        gateway.settings["SQLITE_STORE_DIR"] = str(gateway.home / "store")
        return gateway

    return Row(
        "`mode=rw` in the path of the database",
        "a server started by hand makes the tables itself, and keeps every response",
        measure(server(Edit("run.yaml", "?mode=rw&", "?"))),
        measure(server()),
    )


def logged(gateway: Gateway) -> str:
    """How much of malformed calls is to be found in the log."""
    before = len(gateway.log)
    with patient(gateway) as client:
        for call in MALFORMED:
            client.post("/v1/chat/completions", **call)
    time.sleep(1)
    lines = gateway.log[before:].splitlines()
    return f"{sum(SECRET in line for line in lines)} of {len(lines)} log lines quote it ({len(MALFORMED)} calls)"


UNFILTERED = Edit(
    "deploy/start/log.py",
    "        if not line.startswith",
    '        self.output.put(line.encode() + b"\\n")\n        if not line.startswith',
)


def log_level(bench: Bench) -> Row:
    """The server's own loggers at debug level, where their lines are not filtered."""

    def quoted(*edits: Edit) -> str:
        with bench.gateway(UNFILTERED, *edits, LLAMA_STACK_LOGGING="all=debug") as gateway:
            before, count = len(gateway.log), 10
            ask_many(gateway, count, prompt=SECRET)
            time.sleep(1)
            lines = gateway.log[before:].splitlines()
        return f"{sum(SECRET in line for line in lines)} of {len(lines)} log lines quote the prompt ({count} good calls)"

    return Row(
        "`logging_config`, whatever `LLAMA_STACK_LOGGING` says",
        "at debug level the server's loggers print every prompt, where no filter is behind them",
        quoted(Edit("run.yaml", "all: critical", "all: debug"), Edit("run.yaml", "core: error", "core: debug")),
        quoted(),
    )


def log_filter(bench: Bench) -> Row:
    """The server's tracebacks, unfiltered."""
    return bench.compare(
        "the filter behind the server's log",
        "tracebacks quote what a malformed call holds",
        logged,
        UNFILTERED,
    )
