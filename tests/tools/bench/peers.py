"""The contenders: how each is installed, configured, started and called.

Peers live in environments of their own in `.bench/`, newest release of each, and are set up the way their documentation
recommends for production, as far as that can be had without a database: each setting here has its reason beside it.
All of them find the same vendor, over TLS, with the same throwaway CA.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from support.gateway import HAPROXY, PROJECT, PROVIDER_DATA, Gateway, free_port
from support.services import ISSUER, Services

from .load import Call
from .upstream import GOOD_KEY, WRONG_KEY, Upstream

CACHE = PROJECT / ".bench"
# The last commit before the start was a program, and before the front: `make server` with its egress proxy.
PREVIOUS = "4155940"


class Stopped(SystemExit):
    """The exit after a SIGTERM."""


def terminate(*_: object) -> NoReturn:
    """End this process as a SIGTERM should, with everything that it started."""
    raise Stopped(128 + signal.SIGTERM)


def deaf() -> None:
    """Let nothing interrupt the tidying up that follows."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def run_tool(target: str, main: Callable[[], None]) -> NoReturn:
    """Run `main` as `make {target}`: what goes wrong is a sentence, and the exit code tells of it.

    A SIGTERM ends it as Ctrl-C does, with everything that it started.
    """
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    if not sys.platform.startswith("linux"):
        sys.exit(f"make {target} needs Linux: it weighs processes by what /proc says of them.")
    if missing := [command for command in ("wrk", "nginx", "openssl") if not shutil.which(command)]:
        sys.exit(f"make {target} needs {' and '.join(missing)}: sudo apt-get install {' '.join(missing)}")
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Stopped:
        print("Stopped.", file=sys.stderr)
        raise
    except (RuntimeError, OSError, Skipped) as error:
        sys.exit(f"make {target} ended early: {error}")
    sys.exit()


class Skipped(Exception):
    """A contender that cannot take part, and why, in a sentence."""


class Server(Gateway):
    """A contender's process, and what it says it is healthy at."""

    def __init__(self, home: Path, command: tuple, health: str = "/v1/health", cwd: Path = PROJECT, **settings: str) -> None:
        super().__init__(home, tuple(map(str, command)), cwd, **settings)
        self.health = health

    def start(self, seconds: float = 180) -> Gateway:
        """As any gateway, but patiently: some peers take long."""
        return super().start(seconds)

    def memory(self) -> float:
        """The memory of all its processes, in MB, what they share counted once (PSS)."""
        return sum(self.of_processes(lambda process: process.memory_full_info().pss)) / 1e6

    def idle(self, seconds: float = 10) -> bool:
        """Wait until it has worked off what it was sent. Returns False if it is still busy after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            before = self.cpu()
            time.sleep(0.25)
            if self.cpu() - before < 0.02:
                return True
        return False


@dataclass
class Contender:
    """One way from a caller to the vendor. `calls` by kind: near, wrong (a wrong key), paced, far."""

    name: str
    title: str
    calls: dict[str, Call]
    server: Server | None = None
    version: str = ""
    size: float = 0.0  # MB on disk
    served: int = 0  # requests since its start


def run(*command: object, cwd: Path = PROJECT, **settings: str) -> str:
    """Run an installer. Raises Skipped with the end of what it printed if it fails."""
    if not shutil.which(str(command[0])):
        raise Skipped(f"{command[0]} is not installed")
    arguments = list(map(str, command))
    done = subprocess.run(arguments, check=False, cwd=cwd, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"{command[0]} could not install it: {done.stderr.strip()[-300:]}")
    return done.stdout


def megabytes(folder: Path) -> float:
    """The size of the files in a folder, without Python's compiled copies of them, in MB."""
    return sum(f.lstat().st_size for f in folder.rglob("*") if "__pycache__" not in f.parts and not f.is_dir()) / 1e6


@functools.cache
def environment(name: str, *packages: str) -> Path:
    """An environment in `.bench/` with `packages`, installed or brought up to date. Returns its folder."""
    folder = CACHE / name
    uv = os.environ.get("UV", "uv")
    if not (folder / "bin/python").exists():
        run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder)
    install = (uv, "pip", "install", "--quiet", "--upgrade", "--compile-bytecode", "--python", folder / "bin/python")
    # Not from the project's folder, where uv would hold peers to the stock server's constraints.
    run(*install, *packages, cwd=Path("/"))
    return folder


def version(folder: Path, package: str) -> str:
    """The version of `package` in an environment."""
    found = next((folder / "lib").glob(f"python3*/site-packages/{package}-*.dist-info"))
    return found.name.removesuffix(".dist-info").rpartition("-")[2]


def direct(up: Upstream, home: Path) -> Contender:
    """No gateway: callers that keep their connections to the vendor open."""
    return Contender(
        "direct",
        "the vendor itself",
        {
            kind: Call(f"{base}/v1/chat/completions", {"Authorization": f"Bearer {key}"}, "gpt-4o")
            for kind, base, key in (
                ("near", up.near, GOOD_KEY),
                ("wrong", up.near, WRONG_KEY),
                # Streams without TLS, as gateways hand them on: its cost to the reader here is not the vendor's.
                ("paced", f"{up.plain}/paced", GOOD_KEY),
                ("far", up.far, GOOD_KEY),
            )
        },
    )


@functools.cache
def own_environment(python: str = "", project: Path = PROJECT) -> Path:
    """The environment that `make server` installs: apart from the project's own, which has the test tools in it too."""
    folder = CACHE / f"{project.name if project != PROJECT else 'lls-openai'}-packages{python}"
    sync = (os.environ.get("UV", "uv"), "sync", "--quiet", "--frozen", "--compile-bytecode")
    other = ("--python", python, "--no-python-downloads") if python else ()
    run(*sync, *other, cwd=project, UV_PROJECT_ENVIRONMENT=str(folder), VIRTUAL_ENV="")
    return folder


@functools.cache
def previous() -> Path:
    """The project as it was before its start was a program, and before the front: a folder in `.bench/`."""
    folder = CACHE / PREVIOUS
    if not folder.exists():
        archive, unpacked = CACHE / f"{PREVIOUS}.tar", CACHE / f"{PREVIOUS}.part"
        run("git", "archive", "--output", archive, PREVIOUS)
        shutil.unpack_archive(archive, unpacked, filter="data")
        unpacked.rename(folder)
        archive.unlink()
    return folder


def provider_data_calls(server: Server, header: str = PROVIDER_DATA) -> dict[str, Call]:
    """The calls to a server that takes keys in a provider-data header."""

    def call(model: str, key: str) -> Call:
        keys = {f"{vendor}_authorization": f"Bearer {key}" for vendor in ("openai", "gemini", "anthropic")}
        return Call(f"{server.url}/v1/chat/completions", {header: json.dumps(keys)}, model)

    return {
        "near": call("openai/gpt-4o", GOOD_KEY),
        "wrong": call("openai/gpt-4o", WRONG_KEY),
        "paced": call("anthropic/claude-haiku-4-5-20251001", GOOD_KEY),
        "far": call("gemini/gemini-2.5-flash-lite", GOOD_KEY),
    }


def native_calls(server: Server) -> dict[str, Call]:
    """The same calls on the vendors' own paths, with a vendor's own key."""

    def call(path: str, key: str = GOOD_KEY) -> Call:
        return Call(f"{server.url}/{path}/chat/completions", {"Authorization": f"Bearer {key}"}, "gpt-4o")

    openai, anthropic, gemini = "openai/v1", "anthropic/v1", "gemini/v1beta/openai"
    return {"near": call(openai), "wrong": call(openai, WRONG_KEY), "paced": call(anthropic), "far": call(gemini)}


def vendor_urls(up: Upstream) -> dict[str, str]:
    """The settings of `run.yaml` that lead its vendors here: one address for each kind of call."""
    return {"OPENAI_PASSTHROUGH_URL": up.near, "ANTHROPIC_PASSTHROUGH_URL": up.paced, "GEMINI_PASSTHROUGH_URL": up.far}


def ours(
    up: Upstream, home: Path, title: str, *, front: bool = True, egress: bool = True, project: Path = PROJECT, **more: str
) -> Contender:
    """This project, by `make server`, with the doors that are asked for.

    By the egress door it finds the vendors by their names, as users' gateways do. Without it, it is told where they are, and has
    the CA in a folder of hashed ones, as on Debian and Fedora.
    """
    folder = own_environment(project=project)
    release = f"llama-stack {version(folder, 'llama_stack')}"
    if front or egress:
        if not HAPROXY:
            raise Skipped("HAProxy is not installed: sudo apt-get install haproxy")
        release += f", haproxy {subprocess.run([HAPROXY, '-v'], check=True, capture_output=True, text=True).stdout.split()[2]}"
    settings = {
        "UV_PROJECT_ENVIRONMENT": str(folder),
        "SQLITE_STORE_DIR": str(home / "store"),
        "FRONT": "01"[front],
        "EGRESS": "01"[egress],
    }
    if egress:
        settings |= {"EGRESS_NAMESERVER": f"127.0.0.1:{up.names}", "EGRESS_VENDOR_PORT": str(up.vendor_port)}
        settings |= {"EGRESS_CA": str(up.ca)}
    else:
        settings |= vendor_urls(up) | {"SSL_CERT_DIR": str(up.hashed)}
    server = Server(home, ("make", "--silent", "server"), cwd=project, **settings | more)
    return Contender(home.name, title, provider_data_calls(server), server, release, megabytes(folder))


def native(up: Upstream, home: Path) -> Contender:
    """The vendors' own paths, which pass the stock server by."""
    contender = ours(up, home, "make server, a native path")
    return replace(contender, calls=native_calls(contender.server))


def tokens(up: Upstream, home: Path) -> Contender:
    """This project once more, checking at each call a token of an identity provider, as LiteLLM checks its master key."""
    identity = Services()
    identity.__enter__()  # A daemon thread, which ends with this process.
    here = {"AUTH_JWKS_URI": f"{identity.url}/jwks", "AUTH_ISSUER": ISSUER}
    contender = ours(up, home, "make server, 1 worker, tokens", **here)
    bearer = {"Authorization": f"Bearer {identity.token(exp=int(time.time()) + 24 * 3600)}"}
    return replace(
        contender, calls={kind: replace(call, headers=call.headers | bearer) for kind, call in contender.calls.items()}
    )


def bare(up: Upstream, home: Path) -> Contender:
    """The same run.yaml, started with nothing of ours around it: CAs in a bundle file, as Python programs have them."""
    folder = own_environment()
    server = Server(
        home,
        (folder / "bin/llama", "stack", "run", "run.yaml"),
        SSL_CERT_FILE=str(up.bundle),
        SQLITE_STORE_DIR=str(home / "store"),
        **vendor_urls(up),
    )
    release = f"llama-stack {version(folder, 'llama_stack')}"
    return Contender("bare", "the same run.yaml, bare", provider_data_calls(server), server, release, megabytes(folder))


def ogx(up: Upstream, home: Path) -> Contender:
    """The stock server's successor with this run.yaml, in the environment that the start would give it."""
    folder = environment("ogx", "ogx")
    # It needs the file that takes its inserts as the stock server does.
    store = home / "store"
    store.mkdir(parents=True)
    with (PROJECT / "deploy" / "keeps-nothing.sql").open() as script:
        subprocess.run(
            [sys.executable, "-m", "sqlite3", store / "keeps-nothing.db"], stdin=script, check=True, capture_output=True
        )
    port = free_port()
    server = Server(
        home,
        # It wants TLS on its own port unless told otherwise. No other contender's port has it.
        (folder / "bin/ogx", "run", PROJECT / "run.yaml", "--insecure", "--port", port),
        cwd=home,
        LLAMA_STACK_PORT=str(port),
        SSL_CERT_DIR=str(up.hashed),
        OGX_LOG_FORMAT="json",
        SQLITE_STORE_DIR=str(store),
        **vendor_urls(up),
    )
    calls = provider_data_calls(server, "X-OGX-Provider-Data")
    return Contender("ogx", "OGX, this run.yaml", calls, server, f"ogx {version(folder, 'ogx')}", megabytes(folder))


def litellm(up: Upstream, home: Path, workers: int) -> Contender:
    """LiteLLM's proxy, after docs.litellm.ai/docs/proxy/prod: uvicorn workers, quiet logs, a master key, no database."""
    folder = environment("litellm", "litellm[proxy]")
    models = {
        "near": (up.near, GOOD_KEY),
        "wrong": (up.near, WRONG_KEY),
        "paced": (up.paced, GOOD_KEY),
        "far": (up.far, GOOD_KEY),
    }
    config = {
        "model_list": [
            {"model_name": kind, "litellm_params": {"model": "openai/gpt-4o", "api_base": f"{base}/v1", "api_key": key}}
            for kind, (base, key) in models.items()
        ],
        "litellm_settings": {"set_verbose": False, "json_logs": True, "request_timeout": 600, "telemetry": False},
        # So that each call is one call to the vendor, a wrong key's included.
        "router_settings": {"disable_cooldowns": True, "num_retries": 0},
    }
    home.mkdir(parents=True)
    (home / "config.yaml").write_text(json.dumps(config))
    port, master = free_port(), f"sk-{secrets.token_hex(32)}"
    command = (folder / "bin/litellm", "--config", home / "config.yaml", "--host", "127.0.0.1", "--port", port)
    server = Server(
        home,
        (*command, "--num_workers", workers),
        "/health/liveliness",
        home,
        LLAMA_STACK_PORT=str(port),
        SSL_CERT_FILE=str(up.bundle),
        LITELLM_MASTER_KEY=master,
        LITELLM_MODE="PRODUCTION",
        LITELLM_LOG="ERROR",
        # There is no internet to fetch prices from.
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    calls = {kind: Call(f"{server.url}/v1/chat/completions", {"Authorization": f"Bearer {master}"}, kind) for kind in models}
    title = f"LiteLLM, {workers} worker{'s' * (workers > 1)}"
    release = f"litellm {version(folder, 'litellm')}"
    return Contender(f"litellm-{workers}", title, calls, server, release, megabytes(folder))


def portkey(up: Upstream, home: Path) -> Contender:
    """Portkey's gateway on Node.js, one process: it has no workers."""
    folder = CACHE / "portkey"
    folder.mkdir(parents=True, exist_ok=True)
    # With a later node-server its streams fail: "TypeError: immutable" (github.com/Portkey-AI/gateway/issues/1389).
    package = {"private": True, "dependencies": {"@portkey-ai/gateway": "*"}, "overrides": {"@hono/node-server": "1.13.8"}}
    (folder / "package.json").write_text(json.dumps(package))
    run("npm", "install", "--no-audit", "--no-fund", "--silent", cwd=folder)
    gateway = folder / "node_modules/@portkey-ai/gateway"
    port = free_port()
    server = Server(
        home,
        ("node", gateway / "build/start-server.js", f"--port={port}", "--headless"),
        "/",
        home,
        LLAMA_STACK_PORT=str(port),
        NODE_ENV="production",
        NODE_EXTRA_CA_CERTS=str(up.ca),
    )

    def call(base: str, key: str = GOOD_KEY) -> Call:
        headers = {"Authorization": f"Bearer {key}", "x-portkey-provider": "openai", "x-portkey-custom-host": f"{base}/v1"}
        return Call(f"{server.url}/v1/chat/completions", headers, "gpt-4o")

    calls = {"near": call(up.near), "wrong": call(up.near, WRONG_KEY), "paced": call(up.paced), "far": call(up.far)}
    release = f"@portkey-ai/gateway {json.loads((gateway / 'package.json').read_text())['version']}"
    return Contender("portkey", "Portkey", calls, server, release, megabytes(folder))


MAKERS: dict[str, Callable[[Upstream, Path], Contender]] = {
    "direct": direct,
    "both-1": lambda up, home: ours(up, home, "make server, 1 worker"),
    "both-2": lambda up, home: ours(up, home, "make server, 2 workers", LLAMA_STACK_WORKERS="2"),
    "tokens": tokens,
    "native": native,
    "front": lambda up, home: ours(up, home, "make server EGRESS=0, 1 worker", egress=False),
    "egress": lambda up, home: ours(up, home, "make server FRONT=0, 1 worker", front=False),
    "neither": lambda up, home: ours(up, home, "make server FRONT=0 EGRESS=0, 1 worker", front=False, egress=False),
    "previous": lambda up, home: ours(up, home, "the previous start, 1 worker", front=False, project=previous()),
    "again": lambda up, home: ours(up, home, "the previous start, once more", front=False, project=previous()),
    "bare": bare,
    "ogx": ogx,
    "litellm-1": lambda up, home: litellm(up, home, 1),
    "litellm-2": lambda up, home: litellm(up, home, 2),
    "portkey": portkey,
}
