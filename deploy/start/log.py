"""What the gateway says: its own sentences, and of the server's and HAProxy's lines what may be read by anybody.

The server's log and its tracebacks share one stream, in which tracebacks quote keys and prompts. So only lines of exactly the
shapes below pass, each of which the server has written at once, and of what callers write nothing but a path of plain characters,
without what follows the `?`.
A line goes to whoever reads the log as JSON, and to a person at a terminal in short.
"""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime


class Output:
    """Lines for standard output, written by a thread of their own.

    A reader that is stuck, or has gone, holds nobody up: what does not fit into the queue is dropped, and counted.
    """

    def __init__(self, descriptor: int = 1, size: int = 1000) -> None:
        self.descriptor, self.is_terminal = descriptor, os.isatty(descriptor)
        self.lines: queue.Queue[bytes] = queue.Queue(size)
        self.dropped = 0
        threading.Thread(target=self.write, daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queue a line."""
        try:
            self.lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def say(self, sentence: str, level: str = "info") -> None:
        """Queue a sentence of the start's own."""
        self.put(self.shown(sentence, level))

    def shown(self, sentence: str, level: str) -> bytes:
        """A sentence as it is for a person, and as JSON elsewhere."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        line = {"event": sentence, "level": level, "logger": "deploy/start", "timestamp": now}
        return (sentence if self.is_terminal else json.dumps(line, ensure_ascii=False)).encode(errors="replace") + b"\n"

    def write(self) -> None:
        """Write what is queued, for ever."""
        while True:
            line, missing = self.lines.get(), self.dropped
            if missing:
                line = self.shown(f"{missing} lines of the log are missing: its reader was too slow, or gone.", "warning") + line
            if self.written(line):
                self.dropped -= missing
            else:
                self.dropped += 1
            self.lines.task_done()

    def written(self, data: bytes) -> bool:
        """Write all of it, however long the reader takes. Whether there still is one, and room on its disk."""
        while data:
            try:
                data = data[os.write(self.descriptor, data) :]
            except BlockingIOError:  # Another process that shares the pipe has made it non-blocking.
                time.sleep(0.01)
            except OSError:
                return False
        return True

    def flush(self, seconds: float = 1) -> None:
        """Wait until all is written, but no longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while self.lines.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.01)

    def show(self, of_json: dict[str, object], short: str | None) -> None:
        """Queue a line that is JSON to a program, and `short` to a person, who is spared those that have no short form."""
        if not self.is_terminal:
            self.put(json.dumps(of_json, ensure_ascii=False).encode(errors="replace") + b"\n")
        elif short is not None:
            self.put(short.encode(errors="replace") + b"\n")


# --- the server's lines ---

TIME = r"(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z)"

ACCESS = re.compile(
    r'\{"event": "(?P<client>[0-9a-f.:]+):\d+ - \\"(?P<method>[A-Z]{1,20}) (?P<path>[\]A-Za-z0-9_.~:@!$&\'()*+,;=%/\[-]{1,200})(?:\?.*)?'
    rf' HTTP/1\.[01]\\" (?P<status>[1-5]\d\d)", "level": "info", "logger": "uvicorn\.access", "category": "server", "timestamp": "{TIME}"\}}'
)

EXCEPTION = re.compile(
    r'\{"event": "Exception in ASGI application\\n", "exc_info": \["<class \'(?P<kind>[\w.]+)\'>", .*\], '
    rf'"level": "error", "logger": "uvicorn\.error", "category": "server", "timestamp": "{TIME}"\}}'
)

# The Responses API answers a failed call by itself, and logs its exception without a traceback. A vendor's error is a warning.
FAILED_RESPONSE = re.compile(
    r'\{"category": "agents::builtin", ("error_type": "(?P<kind>\w+)", "exc_info"|"exc"): ".*", '
    r'"event": "(Unexpected|Provider SDK) error during response generation", "level": "(error|warning)", '
    rf'"logger": "llama_stack\.providers\.inline\.responses\.builtin\.responses\.streaming", "timestamp": "{TIME}"\}}'
)

# The server does not say which it was.
REFUSED_TOKEN = re.compile(
    r'\{"category": "core::auth", "exc_info": true, "event": "Error during authentication", '
    rf'"level": "error", "logger": "llama_stack\.core\.server\.auth", "timestamp": "{TIME}"\}}'
)
TOKEN_WAS_REFUSED = (
    "A token was refused: it has expired, is for another audience or issuer, is not signed by a key at AUTH_JWKS_URI, "
    "or nothing answers there."
)

ITS_OWN = re.compile(
    r'\{"event": "(?P<event>(Started|Finished) server process \[\d+\]|Uvicorn running on https?://[\]0-9A-Za-z.:\[-]+|'
    r"Waiting for application (startup|shutdown)\.|Application (startup|shutdown) complete\.|Shutting down|"
    r'Invalid HTTP request received\.)( \(Press CTRL\+C to quit\))?", "level": "(?P<level>[a-z]+)", "logger": "uvicorn\.error", '
    rf'("color_message": "[^"]*", )?"category": "server", "timestamp": "{TIME}"\}}'
)

# Why a call failed: the last line of a traceback that says so, and fixed words for it.
REASONS = [
    (re.compile(r"httpx\.ConnectError: .*CERTIFICATE_VERIFY_FAILED"), "the vendor's certificate is not trusted (SSL_CERT_FILE)"),
    (re.compile(r"httpx\.ConnectError: \[Errno (-\d+|8)\]"), "no name server knows the vendor's name"),
    (re.compile(r"(httpcore|httpx)\.ConnectError: .*(Errno 111|Errno 61|refused)"), "the connection was refused"),
    # The library's words for one address or several, whatever was wrong with each.
    (re.compile(r"httpx\.ConnectError: All connection attempts failed"), "the connection was refused, or there is no way there"),
    (re.compile(r"httpx\.(Connect|Read|Write|Pool)Timeout"), "the vendor timed out"),
    (re.compile(r"httpx\.ProxyError: "), "the proxy of HTTPS_PROXY refused the connection"),
    (re.compile(r"httpx\.(RemoteProtocolError|ReadError|WriteError)"), "the connection broke off"),
]
NO_CONNECTION = "no connection to the vendor"
BY_THE_VENDOR = "the vendor answered with an error"

OF_THE_VENDOR = """BadRequestError AuthenticationError PermissionDeniedError NotFoundError ConflictError UnprocessableEntityError
RateLimitError InternalServerError APIStatusError APIError"""
KINDS = {
    "openai.APIConnectionError": NO_CONNECTION,
    "openai.APITimeoutError": "the vendor timed out",
    **{f"openai.{kind}": BY_THE_VENDOR for kind in OF_THE_VENDOR.split()},
}


class OfServer:
    """The server's lines, one after the other.

    Until it takes calls, all that it says is shown, but for tracebacks: no caller's words can be in it. `up` is called once it
    takes calls with all workers, `failing` where it has an error from which it neither recovers nor ends.
    """

    def __init__(
        self, output: Output, workers: int, front: bool, egress: bool, up: Callable[[], None], failing: Callable[[], None]
    ) -> None:
        self.output, self.front, self.egress, self.up, self.failing = output, front, egress, up, failing
        self.workers, self.complete, self.taking_calls = workers, 0, False
        self.reason = ""

    def take(self, line: str) -> None:
        """What the server has written at once: a line of its log, without its end, or a part of a traceback."""
        if not line.startswith("{") or "\n" in line:
            self.take_text(line)
        elif found := ACCESS.fullmatch(line):
            if not self.front:  # Which has an access log of its own.
                self.show_access(found)
        elif found := EXCEPTION.fullmatch(line):
            self.show_failure(found["kind"], found["time"])
        elif found := FAILED_RESPONSE.fullmatch(line):
            self.show_failure(f"openai.{found['kind'] or 'APIStatusError'}", found["time"])
        elif found := REFUSED_TOKEN.fullmatch(line):
            self.show_sentence(TOKEN_WAS_REFUSED, "error", found["time"])
        elif found := ITS_OWN.fullmatch(line):
            self.output.show({"event": found["event"], "level": found["level"], "timestamp": found["time"]}, None)
            self.note(found["event"])
        elif not self.taking_calls and '"level": "critical"' in line:
            self.output.put(line.encode() + b"\n")

    def take_text(self, text: str) -> None:
        """A part of a traceback, or words in which the server says why it does not start."""
        for pattern, reason in REASONS:
            if pattern.match(text):
                self.reason = reason
        for line in [] if self.taking_calls else text.splitlines():
            if re.match(r'  File ".*, in create_app$|Process SpawnProcess-', line):
                self.failing()
            elif line.strip() and not re.match(r" |Traceback|During handling|The above exception", line):
                self.output.put(line.encode(errors="replace") + b"\n")

    def note(self, event: str) -> None:
        """Of several workers each takes calls when it is complete; a single one has its port only in the line that comes last."""
        complete = event == "Application startup complete."
        self.complete += complete
        running = event.startswith("Uvicorn running on")
        if self.workers > 1:
            is_up = complete and self.complete == self.workers
            self.taking_calls = self.taking_calls or self.complete > 0
        else:
            self.taking_calls = self.taking_calls or running
            is_up = running
        if is_up:
            self.up()

    def show_access(self, found: re.Match[str]) -> None:
        call = {name: found[name] for name in ("time", "method", "path")} | {
            "status": int(found["status"]),
            "client": found["client"],
        }
        self.output.show(call, short_form(call))

    def show_failure(self, kind: str, at: str) -> None:
        reason = KINDS.get(kind, "an error in the server, or a call that it cannot take")
        if self.egress and reason == BY_THE_VENDOR:
            reason = "the vendor answered with an error, or the egress door in its place, which says why"
        self.show_sentence(f"A call failed: {self.reason if self.reason and reason == NO_CONNECTION else reason}.", "error", at)
        self.reason = ""

    def show_sentence(self, sentence: str, level: str, at: str) -> None:
        self.output.show({"event": sentence, "level": level, "timestamp": at}, f"{at[11:19]}  {sentence}")


# --- HAProxy's lines ---


def take_haproxy(output: Output, line: str) -> None:
    """One line of HAProxy's: its configuration writes calls as JSON, in which a caller shapes nothing but the path."""
    said = re.fullmatch(r"\[(ALERT|WARNING)] *\(\d+\) : (.*)", line)
    try:
        call = json.loads(line)
        output.show(call, short_form(call))
    except (ValueError, KeyError, TypeError):
        # What it says of itself, but for what the start has brought about, and for vendors that are found at an address.
        usual = r"Proxy \S+ stopped|Server gateways/a |backend 'gateways' has no server|\S+ changed its IP|Server \S+ .*\bREADY"
        if said and not re.match(usual, said[2]):
            output.say(f"HAProxy: {said[2]}", {"ALERT": "error", "WARNING": "warning"}[said[1]])


def short_form(call: dict[str, object]) -> str | None:
    """A call on a person's line: the time (UTC), the status, what was asked for or to whom it went, and why it failed.

    Nothing where the egress door tells of what the vendor answered: the caller's own line has that status as well.
    """
    why = str(call.get("why", ""))
    if why.endswith("answered so") or why == "-":
        why = ""
    if "path" not in call and not why:
        return None
    what = f"{call['method']} {call['path']}" if "path" in call else f"to {call['to']}"
    return f"{str(call['time'])[11:19]}  {call['status']}  {what}" + (f"  ({why})" if why else "")
