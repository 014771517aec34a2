"""Start and stop the real gateway, the way its users do, in an environment that the machine cannot leak into."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

PROJECT = Path(__file__).parent.parent.parent
PROVIDER_DATA = "X-LlamaStack-Provider-Data"

# The two commands under `make server`, and under nothing.
SERVE = ("deploy/serve.sh",)
BY_HAND = ("llama", "stack", "run", "run.yaml")

# Debian keeps it where only root looks.
HAPROXY = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin")


def clean_environ(home: Path | str, **settings: str) -> dict[str, str]:
    """An environment with nothing in it but a search path, an empty home and `settings`.

    The machine's own proxies, certificates and keys are left out, because they would decide a test's outcome. `uv run`
    names itself in UV: it may be the one that make installed into the project. UV_PYTHON is make's choice of a Python.
    """
    folders = [str(Path(program).parent) for program in (sys.executable, os.environ.get("UV")) if program]
    path = os.pathsep.join([*folders, os.environ["PATH"]])
    python = {"UV_PYTHON": os.environ["UV_PYTHON"]} if "UV_PYTHON" in os.environ else {}
    return {"PATH": path, "HOME": str(home), "LANG": "C.UTF-8"} | python | settings


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Gateway:
    """One gateway process and everything it starts. A context manager that leaves nothing running.

    `command` is what a user types, `home` an empty folder, `settings` the environment on top of `clean_environ`. Where the
    settings ask for TLS, `trust` has the CA that signed the certificate.
    """

    trust: ssl.SSLContext | bool = True
    health = "/v1/health"  # the path that answers once it is up

    def __init__(self, home: Path, command: tuple[str, ...] = ("make", "server"), cwd: Path = PROJECT, **settings: str) -> None:
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

    def start(self, seconds: float = 60) -> "Gateway":
        """Start the process and wait until it answers `health`.

        Raises RuntimeError with the end of its log if it exits, or takes longer than `seconds`.
        """
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
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and self.process.poll() is None:
                if self.answers():
                    return self
                time.sleep(0.1)
            raise RuntimeError(f"The gateway did not start. The end of its log:\n{self.log[-3000:]}")
        except BaseException:
            self.stop()
            raise

    def answers(self) -> bool:
        """Whether it answers `health`."""
        try:
            return httpx.get(f"{self.url}{self.health}", trust_env=False, verify=self.trust).is_success
        except httpx.HTTPError:
            return False

    def stop(self, seconds: float = 20) -> int:
        """Ask it to end, insist after `seconds`, and return the exit code of the command."""
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.signal(signal.SIGKILL)
        return self.process.wait()

    def signal(self, number: int) -> None:
        """Send a signal to the command and all that it started, as Ctrl-C in a terminal would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @property
    def server(self) -> int:
        """The process id of the server itself, below whatever started it; of the supervisor where there are workers."""
        (pid,) = [pid for pid, *line in processes(self.process.pid) if "run.yaml" in line and "python" in line[0]]
        return int(pid)

    @property
    def environ(self) -> dict[str, str]:
        """The environment that the server was given. Source: /proc/PID/environ."""
        return dict(item.split("=", 1) for item in Path(f"/proc/{self.server}/environ").read_text().split("\0") if item)

    def of_processes(self, name: str) -> list[list[str]]:
        """The fields of /proc/PID/`name`, from behind the program's name on, for each process that still lives."""
        found = []
        for pid, *_ in processes(self.process.pid):
            with contextlib.suppress(OSError):
                found.append(Path(f"/proc/{pid}/{name}").read_text().rpartition(") ")[2].split())
        return found

    def resident(self) -> int:
        """Resident memory of the largest process, in bytes. Source: proc(5), statm, in pages."""
        return max(int(fields[1]) for fields in self.of_processes("statm")) * os.sysconf("SC_PAGE_SIZE")

    def cpu(self) -> float:
        """CPU time of all processes so far, in seconds. Source: proc(5), stat, utime and stime, in ticks."""
        return sum(int(fields[11]) + int(fields[12]) for fields in self.of_processes("stat")) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What `condition` returns as soon as that is true, or at last after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def listening(port: int) -> list[str]:
    """The addresses on which this machine listens on a TCP port, in the kernel's hexadecimal: 0100007F is 127.0.0.1.

    Source: proc(5), /proc/net/tcp and tcp6, where 0A is LISTEN.
    """
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    sockets = [(*fields[1].split(":"), fields[3]) for fields in lines]
    return [address for address, number, state in sockets if state == "0A" and int(number, 16) == port]


def copy_project(folder: Path) -> Path:
    """Copy what a server needs into `folder`, for those who change run.yaml. Returns `folder`."""
    (folder / "deploy").mkdir(parents=True)
    for file in [
        PROJECT / "run.yaml",
        *(file for kind in ("sh", "sql", "sed") for file in (PROJECT / "deploy").glob(f"*.{kind}")),
    ]:
        shutil.copy(file, folder / file.relative_to(PROJECT))
    return folder


def processes(leader: int) -> list[tuple[str, ...]]:
    """The process id and the arguments of every living process in the session that `leader` leads. Source: /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (folder / "cmdline").read_text()  # Empty once the process has ended.
            if arguments and os.getsid(int(folder.name)) == leader:
                found.append((folder.name, *arguments.split("\0")))
    return found
