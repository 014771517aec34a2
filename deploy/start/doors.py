"""The two doors that HAProxy has: the front, to which callers come, and the egress door, by which calls leave for the vendors.

Their sockets are opened here, so that whoever holds a port is known, and handed to HAProxy. Which doors there are:

    HAProxy 2.6 or later   proxy demanded (HTTPS_PROXY)   FRONT      EGRESS
    is there               no                             opens      opens
    is there               yes                            opens      closed, because HAProxy cannot go through another proxy
    is missing             either                         closed     closed

FRONT=0 and EGRESS=0 close one of them. FRONT=1 and EGRESS=1 refuse to start where it cannot open.
"""

import contextlib
import errno
import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from settings import PROJECT, Refused, Settings

CONFIGURATION = PROJECT / "deploy" / "haproxy"

# The loopback address that is `localhost` as well, for each on which the gateway may listen.
HELD = (
    ("127.0.0.1", socket.AF_INET6, "::1"),
    ("0.0.0.0", socket.AF_INET6, "::1"),
    ("::1", socket.AF_INET, "127.0.0.1"),
)

# Debian keeps it where only root looks.
SEARCHED = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"))

INSTALL = "sudo apt-get install haproxy (Debian, Ubuntu), sudo dnf install haproxy (Fedora), brew install haproxy (macOS)"


@dataclass
class Door:
    """One door: the sockets on which it listens, and the port that all of them have."""

    port: int
    sockets: list[socket.socket]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bind(self) -> str:
        """How HAProxy is told."""
        return ",".join(f"fd@{each.fileno()}" for each in self.sockets)


@dataclass
class Doors:
    """The doors that are open, where the server itself listens, and why a door is closed that could be open."""

    server_host: str
    server_port: int
    front: Door | None = None
    egress: Door | None = None
    haproxy: str = ""
    closed: list[str] = field(default_factory=list)
    # A listening Unix socket for HAProxy, and our connection to it. It has no name any more, so nobody else can connect.
    admin: socket.socket | None = None
    control: socket.socket | None = None
    # Held, so that nobody else can be `localhost`.
    held: list[socket.socket] = field(default_factory=list)
    # The vendors that HAProxy knows the way to.
    vendors: set[str] = field(default_factory=set)
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        """HAProxy's command line."""
        parts = ["global", "vendors", *(["egress"] if self.egress else []), *(["front"] if self.front else [])]
        return [self.haproxy, "-db", *(word for part in parts for word in ("-f", f"{part}.cfg"))]

    @property
    def descriptors(self) -> list[int]:
        """What HAProxy inherits."""
        sockets = [each for door in (self.front, self.egress) if door for each in door.sockets]
        return [each.fileno() for each in (*sockets, self.admin) if each]

    def admit(self) -> None:
        """Let the front send calls to the server, which has its port by now."""
        self.tell("enable server gateways/a")

    def turn_away(self) -> None:
        """Let the front answer new calls itself, with a sentence."""
        self.tell("set server gateways/a state drain")

    def tell(self, command: str) -> None:
        """Send HAProxy a command."""
        if self.control:
            with contextlib.suppress(OSError):  # It has ended, which is told elsewhere.
                self.control.sendall(f"{command}\n".encode())

    def hang_up(self) -> None:
        """End our connection to HAProxy, for which it would wait before it ends."""
        if self.control:
            self.control.close()

    def close(self) -> None:
        """Leave the front to HAProxy alone, so that it is closed when HAProxy closes it. The egress door stays held."""
        for each in (self.front.sockets if self.front else []) + ([self.admin] if self.admin else []):
            each.close()


def open_doors(settings: Settings, run_folder: Path) -> Doors:
    """Find HAProxy and open the sockets of the doors. Raises Refused where a port is taken, or a demanded door cannot open.

    `run_folder` is a folder that only we may write to.
    """
    haproxy, front, egress, closed = decide(settings)
    opened = listen(settings.host, settings.port, "LLAMA_STACK_PORT")
    held = hold_other_loopback(settings)
    if front:
        doors = Doors("127.0.0.1", free_port(), Door(settings.port, opened), closed=closed, held=held)
    else:
        doors = Doors(settings.host, settings.port, closed=closed, held=held)
        for each in opened:  # Which the server opens itself. So far it is known that nobody else has it.
            each.close()
    if egress:
        doors.egress = Door(settings.egress_port, listen("127.0.0.1", settings.egress_port, "EGRESS_PORT"))
    if front or egress:
        doors.haproxy = haproxy
        doors.vendors = set(re.findall(r"^backend vendor-(\S+)", (CONFIGURATION / "vendors.cfg").read_text(), re.MULTILINE))
        try:
            doors.admin, doors.control = admin_sockets(run_folder)
            doors.environ = environ_of(doors, settings, run_folder)
        except OSError as error:
            raise Refused(f"SQLITE_STORE_DIR is {run_folder}, which cannot be used: {error}.") from error
    return doors


def decide(settings: Settings) -> tuple[str, bool, bool, list[str]]:
    """The path of HAProxy, whether the front opens, whether the egress door opens, and why one is closed. Raises Refused."""
    haproxy = find_haproxy()
    front, egress = settings.demanded("FRONT"), settings.demanded("EGRESS")
    if not haproxy and (front or egress):
        name = "FRONT" if front else "EGRESS"
        raise Refused(f"{name}=1 needs HAProxy 2.6 or later. Install it: {INSTALL}. Or start with {name}=0.")
    if settings.proxy and egress:
        raise Refused(
            "The egress door connects to the vendors itself, past the proxy that HTTPS_PROXY or ALL_PROXY names. "
            "Start with EGRESS=0, or unset the variable."
        )
    closed = []
    if not haproxy:
        if front is None:
            closed.append(f"HAProxy 2.6 or later is not installed: keys in the header only, no native paths, no page. {INSTALL}")
    elif settings.proxy and egress is None:
        closed.append("HTTPS_PROXY is set, and HAProxy cannot go through another proxy: no egress door, no native paths.")
    return (
        haproxy,
        bool(haproxy) and front is not False,
        bool(haproxy) and egress is not False and not settings.proxy,
        closed,
    )


def find_haproxy() -> str:
    """The path of HAProxy 2.6 or later, or nothing."""
    path = shutil.which("haproxy", path=SEARCHED)
    if not path:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run([path, "-v"], capture_output=True, text=True, timeout=20, check=False).stdout
        if (found := re.search(r"version (\d+)\.(\d+)", said)) and (int(found[1]), int(found[2])) >= (2, 6):
            return path
    return ""


def taken(port: int, setting: str) -> str:
    """The sentence for a port that is in use."""
    if setting == "EGRESS_PORT":
        return f"Port {port}, where the egress door is to listen, is in use. Choose another with EGRESS_PORT."
    return f"Port {port} is in use. Stop what listens there, or choose another with {setting}."


def listen(host: str, port: int, setting: str) -> list[socket.socket]:
    """Listening sockets on all addresses that `host` stands for. Raises Refused where one cannot be had."""
    sockets, missing = [], None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise Refused(f"LLAMA_STACK_HOST is '{host}': {getattr(error, 'strerror', None) or 'not a name'}.") from error
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            opened = socket.socket(family)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # Only `::` stands for IPv4 as well.
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
            opened.bind(address)
            opened.listen(1024)
            sockets.append(opened)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Refused(taken(port, setting)) from error
            missing = error  # `localhost` may be ::1 as well where there is no IPv6.
    if missing and not sockets:
        raise Refused(f"LLAMA_STACK_HOST is '{host}', LLAMA_STACK_PORT is '{port}': {missing.strerror}.") from missing
    return sockets


def hold_other_loopback(settings: Settings) -> list[socket.socket]:
    """Sockets on the loopback address on which the gateway does not listen. Raises Refused where somebody else does.

    It is `localhost` to many clients, which may send their keys there. Held, so that nobody else can be that later.
    """
    held = []
    for host, family, other in HELD:
        if settings.host == host:
            try:
                held.append(socket.socket(family))
                held[-1].bind((other, settings.port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise Refused(taken(settings.port, "LLAMA_STACK_PORT")) from error
    return held


def free_port() -> int:
    """A port of 127.0.0.1 for the server behind the front, which nobody needs to know.

    Below those that the kernel gives to outgoing connections, one of which could get it before the server does.
    """
    for port in random.sample(range(20_000, 32_000), 1_000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise Refused("None of 1,000 ports between 20,000 and 32,000 is free for the server behind the front.")


def admin_sockets(run_folder: Path) -> tuple[socket.socket, socket.socket]:
    """A listening Unix socket for HAProxy, and a connection to it."""
    here, name = os.getcwd(), f"haproxy.{os.getpid()}"
    os.chdir(run_folder)  # A Unix socket's path may have 100 characters, and a folder's many more.
    Path(name).unlink(missing_ok=True)
    listening, connected = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    listening.bind(name)
    listening.listen(1)
    connected.connect(name)
    # More than one command, whenever it comes. 24 days are the most that HAProxy knows.
    connected.sendall(b"prompt\nset timeout cli 24d\n")
    Path(name).unlink()
    os.chdir(here)
    return listening, connected


def environ_of(doors: Doors, settings: Settings, run_folder: Path) -> dict[str, str]:
    """What HAProxy's configuration is told about the doors."""
    assert doors.admin
    environ = {"START": "1", "START_WORKERS": str(settings.workers), "HAPROXY_SOCKET": f"fd@{doors.admin.fileno()}"}
    if doors.front:
        environ |= {"FRONT_BIND": doors.front.bind, "GATEWAY_A": f"127.0.0.1:{doors.server_port}"}
        if settings.certificate:
            environ["FRONT_CRT"] = str(linked(run_folder, *settings.certificate))
    return environ | ({"EGRESS_BIND": doors.egress.bind} if doors.egress else {"EGRESS": "0"})


def linked(run_folder: Path, certificate: str, key: str) -> Path:
    """The certificate and its key under the two names by which HAProxy 2.6 takes them from two files.

    They tell which certificate it is, because another gateway with the same folder may have another one.
    """
    path = run_folder / f"front-{hashlib.sha256(f'{certificate} {key}'.encode()).hexdigest()[:8]}.pem"
    for link, target in ((path, certificate), (Path(f"{path}.key"), key)):
        new = link.with_name(f"{link.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        new.symlink_to(Path(target).absolute())
        new.replace(link)
    return path
