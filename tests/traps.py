"""`make traps`: undo what this project does about the stock server, one thing at a time, and measure what happens then.

Each trap is a function that starts the real server on a copy of run.yaml and deploy/serve.sh with one thing changed,
measures it, measures the same on the shipped files, and returns its row of the table that ends up in tests/traps.md.
`python tests/traps.py kept_chats console_logs` measures these two alone, and writes no file.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import certifi
import httpx
from world.calls import ALL_KEYS, MALFORMED, MODELS, SECRET, WRONG_KEY, caller, chat
from world.gateway import BY_HAND, PROJECT, PROVIDER_DATA, SERVE, Gateway, copy_project, listening
from world.vendors import Vendors

TABLE = Path(__file__).with_suffix(".md")
PROMPT = "word " * 800  # 4 KB
LONG_PROMPT = PROMPT * 16  # 64 KB, so that keeping it shows beside what a process grows by anyway.

# In every environment, undone or not: what a server's own environment might hold.
OF_THE_SERVER = {
    "OPENAI_API_KEY": "sk-fake-server",
    "OPENAI_ORG_ID": "org-of-the-server",
    "OPENAI_PROJECT_ID": "project-of-the-server",
}


class Skipped(Exception):
    """A trap that cannot be measured on this machine. The message is a sentence that says why."""


class Row(NamedTuple):
    """One trap: what the configuration does about it, what happens without, and both measurements, as table cells."""

    does: str
    trap: str
    without: str
    measured: str


class Edit(NamedTuple):
    """One thing undone: `old` in the file `name` of the project becomes `new`."""

    name: str
    old: str
    new: str


# 1. The bench on which a trap is measured.


class Bench:
    """The stand-in vendors, a folder for everything, and the gateway as it ships, started once for all."""

    def __init__(self, vendors: Vendors, folder: Path) -> None:
        self.vendors, self.folder = vendors, folder
        self.shipped = Gateway(folder / "shipped", SERVE, **vendors.environ(), **OF_THE_SERVER)

    def project(self, *edits: Edit) -> Path:
        """A copy of the files that a server needs, with `edits` made. Raises ValueError if there is nothing to undo."""
        copy = copy_project(Path(tempfile.mkdtemp(dir=self.folder)) / "project")
        for name, old, new in edits:
            text = (copy / name).read_text()
            if old not in text:
                raise ValueError(f"{name} no longer has what this undoes: {old}")
            (copy / name).write_text(text.replace(old, new))
        return copy

    def gateway(self, *edits: Edit, command: tuple[str, ...] = SERVE, **settings: str) -> Gateway:
        """A gateway, not yet started, of the project with `edits` made and `settings` in its environment."""
        copy = self.project(*edits)
        return Gateway(copy.parent / "home", command, copy, **self.vendors.environ() | OF_THE_SERVER | settings)

    def compare(self, does: str, trap: str, measure: Callable[[Gateway], str], *edits: Edit, **settings: str) -> Row:
        """The row of a trap that `measure` shows on a running gateway: with `edits` made, and as it ships."""
        with self.gateway(*edits, **settings) as gateway:
            without = measure(gateway)
        return Row(does, trap, without, measure(self.shipped))


def patient(gateway: Gateway, **settings: Any) -> httpx.Client:
    """A caller who also waits for a server that is busy printing tracebacks."""
    return caller(gateway.url, timeout=300, **settings)


def ask(client: httpx.Client, model: str = MODELS[0], header: dict[str, str] = ALL_KEYS, prompt: str = "Hello") -> httpx.Response:
    """One regular chat call."""
    return client.post("/v1/chat/completions", headers=header, json=chat(model, prompt))


def ask_many(gateway: Gateway, count: int, callers: int = 1, prompt: str = PROMPT) -> int:
    """Make `count` chat calls from `callers` callers at a time. Returns how many failed."""
    with patient(gateway) as client, ThreadPoolExecutor(callers) as pool:
        return sum(not answer.is_success for answer in pool.map(lambda _: ask(client, prompt=prompt), range(count)))


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


# 2. The traps: what callers send is kept.


def kept_chats(bench: Bench) -> Row:
    """The stock table instead of the view."""
    count = 200

    def measure(gateway: Gateway) -> str:
        readable(gateway)  # The first use makes the table, and chats that come meanwhile are lost.
        ask_many(gateway, count)
        return f"{readable(gateway)} of {count} chats readable by anyone, {on_disk(gateway) / count / 1000:.0f} KB a chat on disk"

    return bench.compare(
        "a view that keeps nothing, in place of the server's table of chats",
        "every chat is kept, and `GET /v1/chat/completions` hands it to any caller (4 KB prompts)",
        measure,
        Edit("run.yaml", "mode=rw&", "mode=rwc&"),
        Edit("deploy/serve.sh", 'mv "$new" "$store"', 'rm "$new"'),
    )


def memory_store(bench: Bench) -> Row:
    """The chats' table in memory, which looks like the simpler way to keep nothing."""
    warm_up, count = 50, 150
    backend = "file:${env.SQLITE_STORE_DIR:=~/.llama/distributions/lls-openai}/keeps-nothing.db?mode=rw&uri=true"

    def measure(gateway: Gateway) -> str:
        readable(gateway)  # As above: else the table may never be made.
        ask_many(gateway, warm_up, prompt=LONG_PROMPT)
        before = gateway.resident()
        ask_many(gateway, count, prompt=LONG_PROMPT)
        grown = (gateway.resident() - before) / count / 1000
        alone = readable(gateway)
        failed = ask_many(gateway, count, callers=8)
        kept = readable(gateway) - alone
        return f"{grown:.0f} KB more memory a chat; at 8 callers {kept} of {count} chats kept, {failed} calls fail"

    return bench.compare(
        "that view, rather than `:memory:` for the sql backend",
        "chats are kept in memory, but for those that its one connection loses under concurrent callers (64 KB prompts)",
        measure,
        Edit("run.yaml", backend, '":memory:"'),
        # deploy/serve.sh reads the default in the line that goes.
        SQLITE_STORE_DIR=str(bench.folder / "unused"),
    )


def by_hand(bench: Bench) -> Row:
    """A server that is started without deploy/serve.sh, in a folder that exists."""
    count = 20

    def measure(gateway: Gateway) -> str:
        store = gateway.home / "store"
        store.mkdir(parents=True)
        with gateway:
            readable(gateway)  # As above.
            failed = ask_many(gateway, count)
            read = readable(gateway)
        return f"{read} of {count} chats readable by anyone, {on_disk(gateway) / count / 1000:.0f} KB a chat on disk, {failed} failed"

    def server(*edits: Edit) -> Gateway:
        gateway = bench.gateway(*edits, command=BY_HAND, LLAMA_STACK_LOG_FORMAT="json")
        gateway.settings["SQLITE_STORE_DIR"] = str(gateway.home / "store")
        return gateway

    return Row(
        "`mode=rw` in the path of the database",
        "a server started by hand makes the table itself, and keeps every chat",
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


def log_level(bench: Bench) -> Row:
    """The server's own loggers at their usual level."""
    return bench.compare(
        "`logging_config: all: critical`",
        "the server's loggers quote what a malformed call holds",
        logged,
        Edit("run.yaml", "all: critical", "all: info"),
    )


def log_filter(bench: Bench) -> Row:
    """The server's tracebacks, unfiltered."""
    return bench.compare(
        "the filter behind the server's log",
        "tracebacks quote what a malformed call holds",
        logged,
        Edit("deploy/serve.sh", 'if [ "$LLAMA_STACK_LOG_FORMAT" = json ]', "if false"),
    )


# 3. The traps: who may call, and whose name a call carries.


def other_routes(bench: Bench) -> Row:
    """Every route of the server's own description, called without a key."""
    config = (PROJECT / "run.yaml").read_text()
    policy = config[config.index("  auth:\n") :]

    def measure(gateway: Gateway) -> str:
        prompt = {"prompt": f"Remember {SECRET}", "variables": []}
        with patient(gateway) as client:
            paths = client.get("/openapi.json").json()["paths"]
            routes = [(verb.upper(), path) for path, verbs in paths.items() for verb in verbs]
            answers = [client.request(verb, re.sub(r"\{.*?\}", "x", path), json={}).status_code for verb, path in routes]
            client.post("/v1/prompts", json=prompt)
            kept = client.get("/v1/prompts").text.count(SECRET)
        return (
            f"{sum(code != 403 for code in answers)} of {len(routes)} routes open, {kept} of 1 stored prompt readable by another"
        )

    return bench.compare(
        "`route_policy`: what is not listed is refused",
        "prompts, conversations, connectors and admin are open, and keep what they are sent",
        measure,
        Edit("run.yaml", policy, ""),
    )


def every_interface(bench: Bench) -> Row:
    """The addresses of the listening sockets."""

    def measure(gateway: Gateway) -> str:
        names = {"0100007F": "127.0.0.1", "00000000": "0.0.0.0 (every interface)", "0" * 32: ":: (every interface)"}
        return "listens on " + ", ".join(names.get(address, address) for address in listening(gateway.port))

    host = Edit("run.yaml", "  host: ${env.LLAMA_STACK_HOST:=127.0.0.1}\n", "")
    return bench.compare("`server.host`", "the server listens on every interface", measure, host)


def server_organization(bench: Bench) -> Row:
    """OPENAI_ORG_ID in the server's environment, and a caller with keys of its own."""

    def measure(gateway: Gateway) -> str:
        bench.vendors.seen.clear()
        with patient(gateway) as client:
            for model in [*MODELS, "gemini-native/gemini-2.5-flash"]:
                ask(client, model).raise_for_status()
        told = sorted({call.vendor for call in bench.vendors.seen if call.headers.get("openai-organization")})
        return f"sent to {', '.join(told) or 'nobody'}"

    return bench.compare(
        "no `OPENAI_ORG_ID` and `OPENAI_PROJECT_ID` from the server's environment",
        "they go out with every caller's call, to every vendor",
        measure,
        Edit("deploy/serve.sh", " OPENAI_ORG_ID OPENAI_PROJECT_ID", ""),
    )


# 4. The traps: what slows the server down.


def console_logs(bench: Bench) -> Row:
    """A wrong key, alone; then a good call that is sent a tenth of a second after a wrong one."""

    def seconds(client: httpx.Client, header: dict[str, str]) -> float:
        start = time.monotonic()
        ask(client, header=header)
        return time.monotonic() - start

    def measure(gateway: Gateway) -> str:
        with patient(gateway) as client, ThreadPoolExecutor(1) as other:
            alone = statistics.median(seconds(client, WRONG_KEY) for _ in range(3))
            other.submit(seconds, client, WRONG_KEY)
            time.sleep(0.1)
            beside = seconds(client, ALL_KEYS)
        return f"a wrong key takes {alone:.2f} s, a good call beside one {beside:.2f} s"

    return bench.compare(
        "`LLAMA_STACK_LOG_FORMAT=json`",
        "every error is rendered as a rich traceback, and nobody is served meanwhile",
        measure,
        Edit("deploy/serve.sh", "LLAMA_STACK_LOG_FORMAT:-json", "LLAMA_STACK_LOG_FORMAT:-console"),
    )


def hashed_cas(bench: Bench) -> Row:
    """The CAs that httpx trusts by default and the stand-ins' own, once as one file and once as a hashed directory."""
    count = 200
    if not shutil.which("openssl"):
        raise Skipped("There is no openssl command to hash the CAs with.")
    roots = Path(certifi.where()).read_text() + bench.vendors.ca_file.read_text()
    bundle, hashed = bench.folder / "bundle.pem", bench.folder / "hashed"
    bundle.write_text(roots)
    hashed.mkdir()
    certificates = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----\n", roots, re.DOTALL)
    for number, certificate in enumerate(certificates):
        (hashed / f"{number}.pem").write_text(certificate)
    subprocess.run(["openssl", "rehash", hashed], check=True, capture_output=True)

    def measure(gateway: Gateway) -> str:
        # As on a user's machine: serve.sh chooses, so the variable that leads to the stand-ins' CA has to go.
        with gateway:
            ask_many(gateway, 20, prompt="Hello")
            before, start = gateway.cpu(), time.monotonic()
            if failed := ask_many(gateway, count, prompt="Hello"):
                raise RuntimeError(f"{failed} of {count} calls failed")
            spent, took = gateway.cpu() - before, time.monotonic() - start
        return f"{spent * 1000 / count:.1f} ms of CPU a call, {count / took:.0f} calls/s from one caller"

    return Row(
        "`SSL_CERT_DIR`, a directory of hashed CAs",
        f"the server loads a bundle of {len(certificates)} CAs for every call",
        measure(bench.gateway(SSL_CERT_FILE=str(bundle))),
        measure(bench.gateway(Edit("deploy/serve.sh", "/etc/ssl/certs", str(hashed)), SSL_CERT_FILE="")),
    )


# 5. The traps: what outlives a change of run.yaml.


def old_models(bench: Bench) -> Row:
    """A model that is removed and one that is renamed, each after a first start."""
    removed = MODELS[-1]
    renamed = ("display_name: GPT-4o\n", "display_name: Renamed\n")

    def measure(*edits: Edit) -> str:
        gateway = bench.gateway(*edits)
        run_yaml = gateway.cwd / "run.yaml"
        config = run_yaml.read_text()
        entry = re.search(rf"  - model_id: {removed}\n(    .*\n)+", config)
        if not entry or renamed[0] not in config:
            raise ValueError("run.yaml no longer registers the models that this changes")
        with gateway:
            pass
        run_yaml.write_text(config.replace(entry[0], ""))
        with gateway, patient(gateway) as client:
            listed = removed in [model["id"] for model in client.get("/v1/models").json()["data"]]
        run_yaml.write_text(config.replace(*renamed))
        try:
            with gateway:
                boots = "starts"
        except RuntimeError:
            boots = "does not start"
        return f"removed: {'still' if listed else 'not'} listed; renamed: {boots}"

    on_disk = 'db_path: "${env.SQLITE_STORE_DIR:=~/.llama}/kv.db"'
    return Row(
        "the kv store in memory",
        "registered models are remembered: a change in `run.yaml` is ignored, or stops the start",
        measure(Edit("run.yaml", 'db_path: ":memory:"', on_disk)),
        measure(),
    )


# 6. The traps: packages. They need a package registry, as installing does.


def install(bench: Bench, leave_out: str) -> Path:
    """Resolve and install the project's packages afresh, without the line of pyproject.toml that has `leave_out` in it.

    Returns the environment's folder. Raises Skipped if uv does not succeed.
    """
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    lines = (PROJECT / "pyproject.toml").read_text().splitlines(keepends=True)
    (folder / "pyproject.toml").write_text("".join(line for line in lines if not leave_out or leave_out not in line))
    uv = os.environ.get("UV") or shutil.which("uv") or str(PROJECT / ".uv/bin/uv")
    outside = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    command = [uv, "sync", "--quiet", "--no-dev", "--python", sys.executable]
    if subprocess.run(command, cwd=folder, env=outside, check=False, capture_output=True).returncode:
        raise Skipped("The packages could not be installed: is there a package registry to be reached?")
    return folder / ".venv"


def version(environment: Path, package: str) -> str:
    """The version of a package in an environment."""
    (folder,) = environment.glob(f"lib/python*/site-packages/{package}-*.dist-info")
    return folder.name.removesuffix(".dist-info").partition("-")[2]


def first_call(bench: Bench, environment: Path) -> str:
    """What comes of starting the gateway with the packages in `environment`, and of a call."""
    path = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    gateway = bench.gateway(PATH=path)
    try:
        with gateway, patient(gateway) as client:
            return f"a call answers {ask(client).status_code}"
    except RuntimeError:
        errors = re.findall(r"^(?:\w+\.)*\w*Error: .*", gateway.log, re.MULTILINE)
        return f"no start: {errors[-1].split(' (')[0] if errors else gateway.log.splitlines()[-1]}"


def constraint(bench: Bench, package: str, trap: str) -> Row:
    """Without the constraint on a package, with the newest of everything, beside the same with it."""
    without, within = install(bench, f'"{package}<'), install(bench, "")
    return Row(
        f"the constraint on `{package}`",
        trap,
        f"{package} {version(without, package)}: {first_call(bench, without)}",
        f"{package} {version(within, package)}: {first_call(bench, within)}",
    )


def newest_mcp(bench: Bench) -> Row:
    """mcp 2 and later."""
    return constraint(bench, "mcp", "a fresh install does not start")


def newest_openai(bench: Bench) -> Row:
    """openai 2.34 and later."""
    return constraint(bench, "openai", "every call of a fresh install fails")


def unused_packages(bench: Bench) -> Row:
    """What the packages weigh that are left out."""

    def size(environment: Path) -> str:
        return f"{sum(path.lstat().st_blocks * 512 for path in environment.rglob('*')) / 1e6:.0f} MB"

    return Row(
        "the overrides in `pyproject.toml`",
        "packages are installed that nothing here uses",
        size(install(bench, "python_version < '0'")),
        size(install(bench, "")),
    )


# 7. The traps: what no configuration changes, and the way around it.


def gemini_embeddings(bench: Bench) -> Row:
    """The same model through passthrough and through the native provider."""

    def measure(model: str) -> str:
        with patient(bench.shipped) as client:
            answer = client.post("/v1/embeddings", headers=ALL_KEYS, json={"model": model, "input": "a text"})
        words = "" if answer.is_success else f": {answer.json()['error']['message']}"
        return f"{answer.status_code}{words}"

    return Row(
        "the `gemini-native` provider",
        "Gemini's embeddings lack fields that the server requires",
        measure("gemini/gemini-embedding-001"),
        measure("gemini-native/gemini-embedding-001"),
    )


def silent_close(bench: Bench) -> Row:
    """100 calls, each on the connection over which an error has just come back."""
    count = 100

    def measure(keep_alive: bool) -> str:
        lost, limits = 0, httpx.Limits(max_keepalive_connections=None if keep_alive else 0)
        with patient(bench.shipped, limits=limits) as client:
            for _ in range(count):
                ask(client, "openai/status-429")
                try:
                    ask(client)
                except httpx.TransportError:
                    lost += 1
        return f"{lost} of {count} calls after a 429 lost"

    return Row(
        "`main.py` opens a connection for each call",
        "the server closes a connection after an error without saying so",
        measure(keep_alive=True),
        measure(keep_alive=False),
    )


def list_header(bench: Bench) -> Row:
    """A header that is JSON but no object."""

    def measure(header: str) -> str:
        with patient(bench.shipped) as client:
            answer = ask(client, header={PROVIDER_DATA: header})
        return str(answer.status_code)

    return Row(
        "nothing: send a JSON object",
        "a header that is a JSON list is an error of the server's, not of the caller's",
        measure(json.dumps(["sk-fake"])),
        measure(ALL_KEYS[PROVIDER_DATA]),
    )


TRAPS: list[Callable[[Bench], Row]] = [
    kept_chats,
    memory_store,
    by_hand,
    log_level,
    log_filter,
    other_routes,
    every_interface,
    server_organization,
    console_logs,
    hashed_cas,
    old_models,
    newest_mcp,
    newest_openai,
    unused_packages,
    gemini_embeddings,
    silent_close,
    list_header,
]


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, under a line that says what was measured."""
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("llama-stack", "openai", "mcp", "httpx"))
    lines = [
        f"Measured by `make traps` on {os.cpu_count()} cores with {packages} and Python {platform.python_version()}.",
        "",
        "| What the configuration does | Without it | Measured without | Measured with |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]) + "\n"


def main(names: list[str]) -> int:
    """Measure the traps of these names, or all of them, and then write the table. Returns the exit code."""
    traps = [trap for trap in TRAPS if not names or trap.__name__ in names]
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
        print(f"\n{table(rows)}\n{TABLE.name} stays as it was, because not every trap was measured.")
    else:
        TABLE.write_text(table(rows))
        print(f"\nThe table is in tests/{TABLE.name}. The README has it between <!-- traps --> and <!-- /traps -->.")
    return 0


if __name__ == "__main__":
    # So that a SIGTERM, like Ctrl-C, leaves nothing running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
