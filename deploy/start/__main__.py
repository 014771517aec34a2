"""Start the gateway: the stock server with run.yaml, and HAProxy before and behind it. Run it with the server's own Python:

    python -I deploy/start

This file is the table of contents of a start. settings.py has what can be set, run_yaml.py what is taken from run.yaml, doors.py
HAProxy's doors, store.py the database that keeps nothing, environment.py who may be reached, processes.py how all of it lives and
dies together, log.py what may be read of it, reachability.py who cannot be reached.
"""

import contextlib
import os
import resource
import signal
import sys
import threading

sys.dont_write_bytecode = True  # The project's folder may be somebody else's.

import environment
import log
import reachability
import run_yaml
import settings as settings_
import store
from doors import CONFIGURATION, Doors, open_doors
from processes import Ended, Gateway, Signal
from settings import PROJECT, Refused, Settings

# It is `llama stack run`, though from no file: several workers would each import that before they answer uvicorn, which replaces
# one that is silent for 5 s. -P keeps what lies in the project's folder from being taken for a module of the server's.
# Python looks for garbage after 700 new objects. With this a single worker takes 9 % less CPU time a call, and the slowest 1 % of
# callers wait half as long; memory is the same. Several workers do not run it (make profile SETTINGS=1).
GARBAGE = "import gc; gc.set_threshold(10_000, 20, 20); "
SERVER = [sys.executable, "-P", "-c", GARBAGE + "from llama_stack.cli.llama import main; main()", "stack", "run", "run.yaml"]

ENDED = "The {} has ended, and the gateway with it."
NOT_STARTED = "The {} did not start. What it said last is above."


def main() -> int:
    """Start a gateway, and stay until it has ended. Returns the exit code: 2 where it cannot start."""
    os.umask(0o077)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback while there is nothing else to end.
    try:
        config = run_yaml.read()
        settings = settings_.read(os.environ, config.defaults)
        folder = store.prepare(settings)
        doors = open_doors(settings, folder)
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 2
    allow_many_files()

    output = log.Output()
    held = [each.fileno() for each in doors.egress.sockets] if doors.egress else []
    gateway = Gateway(held)
    gateway.watch(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    output.say("The gateway starts. It asks each vendor for its models first, and waits for one that is silent.")

    environ = environment.for_server(settings, config.vendors, doors, folder)
    if doors.haproxy:
        take = lambda line: log.take_haproxy(output, line)
        gateway.spawn(
            "HAProxy", doors.command, environment.for_haproxy(settings, doors), doors.descriptors, cwd=CONFIGURATION, take=take
        )
        doors.close()
    events = gateway.events.put
    seen_by_haproxy = bool(doors.front), bool(doors.egress)
    lines = log.OfServer(output, settings.workers, *seen_by_haproxy, lambda: events("up"), lambda: events("failing"))
    gateway.spawn("server", [*wrapper(environ), *SERVER], environ, held, cwd=PROJECT, take=lines.take)

    warn = lambda sentence: output.say(sentence, "warning")
    for sentence in (*doors.closed, *settings.warnings, *of_providers(config.nowhere), *of_traces(environ)):
        warn(sentence)
    reachability.check(whom_it_calls(settings, config.vendors, doors, environ), settings, environ, warn)
    return stay(gateway, settings, doors, output, lines)


def stay(gateway: Gateway, settings: Settings, doors: Doors, output: log.Output, lines: log.OfServer) -> int:
    """Act on what happens, one thing after the other, until nothing of the gateway is left. Returns the exit code.

    Kills first and speaks then: whoever reads what is said may be gone.
    """
    is_up, is_failing, stopping, code, last_words = False, False, False, 0, "The gateway has stopped."
    while True:
        event = gateway.events.get()
        match event:
            case "up":
                is_up = True
                if not stopping:
                    doors.admit()
                    for sentence in where_it_is(settings, doors):
                        output.say(sentence)
            case "failing":
                # It would neither serve nor end. A second is enough for what it has to say.
                is_failing = True
                threading.Timer(1, gateway.signal, ("server", signal.SIGKILL)).start()
            case Signal(signal.SIGINT) if stopping:
                code = 130
                break
            case Signal() if not lines.taking_calls:
                break  # Asked to end, a server that waits for a silent vendor would look up half an hour later.
            case Signal():
                if not stopping:
                    stopping = True
                    doors.turn_away()
                    gateway.signal("server", signal.SIGTERM)
                    output.say("The gateway stops when the calls in flight have ended. Ctrl-C ends it at once.")
            case Ended("server", exit_code):
                if exit_code != -signal.SIGTERM or not stopping:
                    code = exit_code if exit_code >= 0 else 128 - exit_code
                if not stopping:
                    # 2 is for what would fail again. Whoever restarts services tries again after a signal, such as the kernel's
                    # when memory is short.
                    code, last_words = (code, ENDED) if is_up else (2 if exit_code >= 0 or is_failing else 1, NOT_STARTED)
                    last_words = last_words.format("server")
                    break
                if not gateway.lives("HAProxy"):
                    break
                # It closes its doors, and ends with the last call on a native path.
                doors.hang_up()
                gateway.signal("HAProxy", signal.SIGUSR1)
            case Ended("HAProxy") if stopping and not gateway.lives("server"):
                break
            case Ended(name):
                code, last_words = (1, ENDED) if is_up or stopping else (2, NOT_STARTED)
                last_words = last_words.format(name)
                break
    gateway.kill()
    if code == 2:
        output.flush()
        print(last_words, file=sys.stderr)
    elif code != 130:
        output.say(last_words, "error" if code else "info")
    output.flush()
    return code


def allow_many_files() -> None:
    """Each connection takes a descriptor, and the server never closes an idle one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if most == resource.RLIM_INFINITY else min(65_536, most)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def wrapper(environ: dict[str, str]) -> list[str]:
    """The server sends metrics by itself, but traces, and numbers that tell one worker from the next, take OpenTelemetry's wrapper."""
    if not environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return []
    return [os.path.join(os.path.dirname(sys.executable), "opentelemetry-instrument")]


def of_providers(nowhere: list[str]) -> list[str]:
    """What an operator should know who has added a provider of which run.yaml does not say where it connects to."""
    return [
        f"Calls to the provider {name} may fail: it has no base_url in run.yaml. Name the host that it calls in NO_PROXY."
        for name in nowhere
    ]


def of_traces(environ: dict[str, str]) -> list[str]:
    """What an operator should know who asks for traces."""
    if environ.get("OTEL_TRACES_EXPORTER", "none") == "none":
        return []
    return [
        "Traces are exported: what callers write into URLs, their calls' with the query and MCP servers', and into `tracestate`."
    ]


def whom_it_calls(settings: Settings, vendors: list[run_yaml.Vendor], doors: Doors, environ: dict[str, str]) -> list[str]:
    """The URLs of the vendors, and of whom the operator names, to whom calls should come through."""
    of_vendors = [settings.environ.get(vendor.setting) or vendor.url for vendor in vendors]
    named = settings.get("AUTH_JWKS_URI"), environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    # Only HAProxy asks that name server.
    unknown = doors.egress and settings.get("EGRESS_NAMESERVER")
    return [*([] if unknown else of_vendors), *filter(None, named)]


def where_it_is(settings: Settings, doors: Doors) -> list[str]:
    """Which doors are open, and last what one pastes: the base URL."""
    scheme = "https" if settings.certificate else "http"
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::", "localhost") else settings.host
    url = f"{scheme}://[{host}]:{settings.port}" if ":" in host else f"{scheme}://{host}:{settings.port}"
    opened = []
    if doors.front:
        native = "native paths, " if doors.egress and not settings.get("AUTH_JWKS_URI") else ""
        opened.append(f"the front on port {settings.port} (API keys, {native}the page at {url}/)")
    if doors.egress:
        opened.append(f"the egress door on port {doors.egress.port}")
    doors_line = [f"Open: {', and '.join(opened)}."] if opened else ["Calls go straight to the vendors."]
    return [*doors_line, f"The gateway answers, until Ctrl-C, at {url}/v1"]


if __name__ == "__main__":
    # Not sys.exit(), which would wait for whoever reads the log.
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
