"""The two doors that HAProxy has: the front, to which callers come, and the egress door, by which calls leave for the vendors.

Their sockets are opened here, so that whoever holds a port is known, and handed to HAProxy. Which doors there are:

    HAProxy 2.6 or later   proxy demanded (HTTPS_PROXY)   FRONT      EGRESS
    is there               no                             opens      opens
    is there               yes                            opens      closed, because HAProxy cannot go through another proxy
    is missing             either                         closed     closed

FRONT=0 and EGRESS=0 close one of them. FRONT=1 and EGRESS=1 refuse to start where it cannot open.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from settings import PROJECT, Refused, Settings

CONFIGURATION = PROJECT / "deploy" / "haproxy"

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
    refuse_taken(settings)
    if not front:
        doors = Doors(settings.host, settings.port, closed=closed)
    else:
        doors = Doors("127.0.0.1", free_port(), closed=closed)
        doors.front = Door(settings.port, listen(settings.host, settings.port, "LLAMA_STACK_PORT"))
    if settings.for_this_machine_alone:
        doors.held += hold_other_loopback(settings)
    if egress:
        doors.egress = Door(settings.egress_port, listen("127.0.0.1", settings.egress_port, "EGRESS_PORT"))
    if front or egress:
        doors.haproxy = haproxy
        doors.vendors = set(re.findall(r"^backend vendor-(\S+)", (CONFIGURATION / "vendors.cfg").read_text(), re.MULTILINE))
        doors.admin, doors.control = admin_sockets(run_folder)
        doors.environ = environ_of(doors, settings, run_folder)
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


def refuse_taken(settings: Settings) -> None:
    """Raise Refused if somebody answers on our port of this machine's loopback addresses: clients may send it their keys.

    Another address than loopback is the server's own to say that it is taken.
    """
    if settings.for_this_machine_alone and settings.host in ("127.0.0.1", "::1", "localhost"):
        for address in ("127.0.0.1", "::1"):
            with contextlib.suppress(OSError):
                socket.create_connection((address, settings.port), timeout=1).close()
                raise Refused(taken(settings.port, "LLAMA_STACK_PORT"))


def taken(port: int, setting: str) -> str:
    """The sentence for a port that is in use."""
    if setting == "EGRESS_PORT":
        return f"Port {port}, where the egress door is to listen, is in use. Choose another with EGRESS_PORT."
    return f"Port {port} is in use. Stop what listens there, or choose another with {setting}."


def listen(host: str, port: int, setting: str) -> list[socket.socket]:
    """Listening sockets on all addresses that `host` stands for. Raises Refused where one cannot be had."""
    sockets = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            sockets.append(opened := socket.socket(family))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # Only `::` stands for IPv4 as well.
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
            opened.bind(address)
            opened.listen(1024)
    except OSError as error:
        for each in sockets:
            each.close()
        if error.errno in (98, 48):  # EADDRINUSE, Linux's and macOS's.
            raise Refused(taken(port, setting)) from error
        raise Refused(f"LLAMA_STACK_HOST is '{host}', LLAMA_STACK_PORT is '{port}': {error.strerror}.") from error
    return sockets


def hold_other_loopback(settings: Settings) -> list[socket.socket]:
    """Sockets on the loopback addresses on which the gateway does not listen, so that nobody else is `localhost` later."""
    held = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        if settings.host in ("127.0.0.1", "::1") and settings.host != address:
            with contextlib.suppress(OSError):  # No IPv6 here, say.
                other = socket.socket(family)
                held.append(other)
                other.bind((address, settings.port))
    return held


def free_port() -> int:
    """A port of 127.0.0.1 for the server behind the front, which nobody needs to know."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def admin_sockets(run_folder: Path) -> tuple[socket.socket, socket.socket]:
    """A listening Unix socket for HAProxy, and a connection to it."""
    here = os.getcwd()
    os.chdir(run_folder)  # A Unix socket's path may have 100 characters, and a folder's many more.
    try:
        name = f"haproxy.{os.getpid()}"
        Path(name).unlink(missing_ok=True)
        listening, connected = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        listening.bind(name)
        listening.listen(1)
        connected.connect(name)
        Path(name).unlink()
        # More than one command, whenever it comes. 24 days are the most that HAProxy knows.
        connected.sendall(b"prompt\nset timeout cli 24d\n")
    finally:
        os.chdir(here)
    return listening, connected


def environ_of(doors: Doors, settings: Settings, run_folder: Path) -> dict[str, str]:
    """What HAProxy's configuration is told about the doors."""
    assert doors.admin
    environ = {"START": "1", "HAPROXY_SOCKET": f"fd@{doors.admin.fileno()}"}
    if doors.front:
        environ |= {"FRONT_BIND": doors.front.bind, "GATEWAY_A": f"127.0.0.1:{doors.server_port}"}
        if settings.certificate:
            environ["FRONT_CRT"] = str(linked(run_folder, *settings.certificate))
    return environ | ({"EGRESS_BIND": doors.egress.bind} if doors.egress else {"EGRESS": "0"})


def linked(run_folder: Path, certificate: str, key: str) -> Path:
    """The certificate and its key under the two names by which HAProxy 2.6 takes them from two files."""
    path = run_folder / "front.pem"
    for link, target in ((path, certificate), (path.with_name("front.pem.key"), key)):
        link.unlink(missing_ok=True)
        link.symlink_to(Path(target).absolute())
    return path
