"""Start and stop the real gateway, the way its users do, in an environment that the machine cannot leak into."""

import contextlib
import inspect
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

PROJECT = Path(__file__).parent.parent.parent
PROVIDER_DATA = "X-LlamaStack-Provider-Data"

# The command under `make server`, and the stock server's own.
START = (sys.executable, "-I", "deploy/start")
BY_HAND = ("llama", "stack", "run", "run.yaml")

# The stock server without HAProxy around it, though that is installed.
ALONE = {"FRONT": "0", "EGRESS": "0"}
# No vendor can be reached, which a start finds out at once: the discard port as a proxy, or as the egress door's name server.
NOWHERE = {"HTTPS_PROXY": "http://127.0.0.1:9", "EGRESS_NAMESERVER": "127.0.0.1:9"}
# Both doors, where nobody is behind the egress door: it asks a name server that is not there.
BOTH_DOORS = {"EGRESS_NAMESERVER": NOWHERE["EGRESS_NAMESERVER"]}

# Debian keeps it where only root looks.
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin")


# What `free_port` has given away.
HELD: list[contextlib.ExitStack] = []


def clean_environ(home: Path | str, **settings: str) -> dict[str, str]:
    """An environment with nothing in it but a search path, an empty home and `settings`.

    The machine's own proxies, certificates and keys are left out, because they would decide a test's outcome. `uv run`
    names itself in UV: it may be the one that make installed into the project. UV_PYTHON is make's choice of a Python.
    """
    own_uv = PROJECT / ".uv" / "bin" / "uv"  # Where pytest was started without `uv run`.
    uv = os.environ.get("UV") or (own_uv if own_uv.exists() else None)
    folders = [str(Path(program).parent) for program in (sys.executable, uv) if program]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    python = {"UV_PYTHON": os.environ["UV_PYTHON"]} if "UV_PYTHON" in os.environ else {}
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"} | python | settings


def make_environ(home: Path, **settings: str) -> dict[str, str]:
    """The same for `make server`, with a uv that does nothing: the real one would look for packages, and may not be there."""
    stub = home / "tools" / "uv"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#!/bin/sh\n")
    stub.chmod(0o755)
    environ = clean_environ(home, UV_PROJECT_ENVIRONMENT=sys.prefix, **settings)
    return environ | {"PATH": f"{stub.parent}{os.pathsep}{environ['PATH']}"}


def free_port() -> int:
    """A TCP port that nobody listens on, on any address, nor on the next, where the egress door listens unless told.

    It is below those that the kernel gives to connections and to servers that leave the choice to it. Both stay bound as long as
    this process lives: a server that asks with SO_REUSEADDR gets them all the same, and who looks here for a free one does not.
    """
    for port in random.sample(range(10_000, 32_000, 2), 1_000):
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for number in (port, port + 1):
                probe = opened.enter_context(socket.socket())
                probe.bind(("", number))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            HELD.append(opened.pop_all())
            return port
    raise OSError("None of 1,000 ports between 10,000 and 32,000 is free.")


class Gateway:
    """One gateway process and everything it starts. A context manager that leaves nothing running.

    `command` is what runs under `make server` unless told, `home` an empty folder, `settings` the environment on top of
    `clean_environ`. Where the settings ask for TLS, `trust` has the CA that signed the certificate.
    """

    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # Nobody. Made once, because the one that httpx makes takes it 20 ms.
    health = "/v1/health"  # the path that answers once it is up

    def __init__(self, home: Path, command: tuple[str, ...] = START, cwd: Path = PROJECT, **settings: str) -> None:
        self.home, self.command, self.cwd = home, command, cwd
        self.port = int(settings.setdefault("LLAMA_STACK_PORT", str(free_port())))
        scheme = "https" if "LLAMA_STACK_TLS_CERTFILE" in settings else "http"
        self.url = f"{scheme}://{settings.get('LLAMA_STACK_HOST', '127.0.0.1')}:{self.port}"
        self.settings = settings
        self.log_file = home / f"gateway-{self.port}.log"

    @property
    def log(self) -> str:
        """All that the process has printed so far."""
        return self.log_file.read_text()

    def launch(self) -> None:
        """Start the process, and wait for nothing."""
        self.home.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("a") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=clean_environ(self.home, **self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, seconds: float = 200) -> "Gateway":
        """Start the process and wait until it answers `health`.

        Raises RuntimeError with the end of its log if it exits, or takes longer than `seconds`.
        """
        self.launch()
        try:
            if self.announces:
                eventually(lambda: self.process.poll() is not None or "The gateway answers" in self.log, seconds)
                seconds = 30  # More of it does not help where the one who announces it is wrong.
            eventually(lambda: self.process.poll() is not None or self.answers(), seconds)
            if self.process.poll() is not None or not self.answers():
                raise RuntimeError(f"The gateway did not start. The end of its log:\n{self.log[-3000:]}")
        except BaseException:
            self.stop()
            raise
        return self

    def environ_at_start(self, also: Callable[[], Any] = lambda: True) -> dict[str, str]:
        """The environment that the server is given, from a start that ends as soon as that is known, and `also` holds.

        Its log is whole then.
        """
        self.launch()
        try:
            wait_for(self.servers, seen=lambda: self.log)
            environ = self.environ
            wait_for(also, seen=lambda: self.log)
            return environ
        finally:
            self.stop()

    def start_workers(self, seconds: float) -> tuple[int, int, float]:
        """Start several workers, and stop when all are up: how many were, how many had been replaced, and after how long.

        Gives up after `seconds`.
        """
        wanted, seen, start = int(self.settings["LLAMA_STACK_WORKERS"]), set(), time.monotonic()

        def up() -> int:
            seen.update(self.workers)
            return self.log.count("Application startup complete")

        self.launch()
        try:
            eventually(lambda: up() == wanted, seconds)
            return up(), len(seen) - wanted, time.monotonic() - start
        finally:
            self.stop(3)

    @property
    def announces(self) -> bool:
        """Whether its log says that it answers. Nobody asks for `health` before that: the log would have each request."""
        return self.command == START or self.command[0] == "make"

    def answers(self) -> bool:
        """Whether it answers `health`."""
        try:
            return httpx.get(f"{self.url}{self.health}", trust_env=False, verify=self.trust, timeout=30).is_success
        except httpx.HTTPError:
            return False

    def stop(self, seconds: float = 20) -> int:
        """Ask it to end, insist after `seconds`, and return the exit code of the command."""
        started = family(self.process.pid)  # Some may be in a session of their own, and outlive who started them.
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.signal(signal.SIGKILL)
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        return self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the command and all that it started, as Ctrl-C in a terminal would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @property
    def server(self) -> int:
        """The process id of the server itself, below whatever started it; of the supervisor where there are workers."""
        (pid,) = self.servers()
        return pid

    def servers(self) -> list[int]:
        """The process id of the server, as soon as it is there."""
        return [int(pid) for pid, *line in processes(self.process.pid) if "run.yaml" in line and "python" in line[0]]

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers, where there are more than one."""
        return [int(pid) for pid, *line in processes(self.process.pid) if "spawn_main" in " ".join(line)]

    @property
    def environ(self) -> dict[str, str]:
        """The environment that the server was given."""
        return psutil.Process(self.server).environ()

    @property
    def server_port(self) -> int:
        """Where the server itself listens: behind the front, if there is one."""
        return int(self.environ["LLAMA_STACK_PORT"])

    def of_processes(self, measure: Callable[[psutil.Process], float]) -> list[float]:
        """What `measure` says of each process that still lives."""
        found = []
        for process in family(self.process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(measure(process))
        return found

    def resident(self) -> float:
        """Resident memory of the largest process, in bytes."""
        return max(self.of_processes(lambda process: process.memory_info().rss))

    def cpu(self) -> float:
        """CPU time of all processes so far, in seconds."""
        return sum(self.of_processes(lambda process: sum(process.cpu_times()[:2])))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop(3)  # A stream that a test has left without an end is not waited for.


@contextlib.contextmanager
def one_cpu() -> Iterator[None]:
    """One CPU for all that is started meanwhile."""
    all_of_them = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(all_of_them)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)


def eventually(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """What `condition` returns as soon as that is true, or at last after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 60, seen: Callable[[], Any] | None = None) -> float:
    """The seconds until `condition` holds. After `seconds` raises AssertionError, which has what `seen` returns then."""
    start = time.monotonic()
    if not eventually(condition, seconds):
        end = f" What is seen: {str(seen())[-3000:]}" if seen else ""
        what = (
            inspect.getsource(condition).strip()
            if inspect.isroutine(condition) and not inspect.isbuiltin(condition)
            else condition
        )
        raise AssertionError(f"In {seconds} s it did not come to this: {what}{end}")
    return time.monotonic() - start


def listening(port: int) -> list[str]:
    """The addresses on which this machine listens on a TCP port."""
    sockets = psutil.net_connections("tcp")
    return [socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port]


def refused(home: Path, cwd: Path = PROJECT, shell: str = "", **settings: str) -> str:
    """What a start says that refuses to be one, in sentences. `shell` goes before it on a shell's line."""
    environ = clean_environ(home, **{"LLAMA_STACK_PORT": str(free_port())} | settings)
    command = ["sh", "-c", f'{shell} exec "$@"', "sh", *START]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=cwd, env=environ, **pipes) as start:
        if started := start.stdout.readline():  # Only one that goes on says anything there.
            start.kill()
        _, said = start.communicate(timeout=120)
    assert (start.returncode, started) == (2, ""), f"{start.returncode}: {started} {said}"
    return said


def copy_project(folder: Path) -> Path:
    """Copy what a gateway needs into `folder`, for those who change run.yaml. Returns `folder`."""
    shutil.copytree(PROJECT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__", "kubernetes"))
    shutil.copy(PROJECT / "run.yaml", folder)
    return folder


def family(leader: int) -> list[psutil.Process]:
    """Every living process that `leader` has started, directly or not, and all of its session, which may outlive it."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(leader).children(recursive=True)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == leader and process not in found:
                found.append(process)
    return [process for process in found if alive(process)]


def alive(process: psutil.Process) -> bool:
    """Whether a process has not ended, be it that nobody has asked for its exit code yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def processes(leader: int) -> list[tuple[str, ...]]:
    """The process id and the arguments of every living process of the family of `leader`."""
    found = []
    for process in family(leader):
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append((str(process.pid), *process.cmdline()))
    return found


def in_memory(pid: int, pattern: bytes) -> set[bytes]:
    """What a process has of `pattern` in the memory that it may write to. Source: proc(5), maps and mem."""
    found: set[bytes] = set()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            if rights.startswith("rw"):
                start, end = (int(address, 16) for address in span.split("-"))
                with contextlib.suppress(OSError):
                    memory.seek(start)
                    found |= set(re.findall(pattern, memory.read(end - start)))
    return found
